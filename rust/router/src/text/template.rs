//! Chat templates: a conversation as the text that the model was trained on.
//!
//! Templates are Jinja, written for Hugging Face transformers; what they may use there works here. They come with
//! the model and are run within bounds: instructions, size of the output, depth.

use std::{collections::BTreeMap, fmt, io, time::SystemTime};

use minijinja::{
    Environment, Error, ErrorKind, Value, default_auto_escape_callback, escape_formatter,
    syntax::SyntaxConfig,
    value::{Serde, ValueKind},
};
use orchestra_core::ErrorCode;
use serde_json::Value as Json;

use super::{clock, json};
use crate::error::ApiError;

#[cfg(test)]
mod tests;

/// Template instructions per conversation. Large templates spend about 200 per message, and ten million take
/// about a second.
const FUEL: u64 = 10_000_000;
/// Twice the largest body that the router takes by default.
const RENDERED_BYTES_MAX: usize = 32 << 20;
/// The special tokens that transformers hands to a template.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The model's files hold no usable template. The text says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// None of the files has one.
    #[error("the model has no chat template")]
    Missing,
    /// It is not a template.
    #[error("the model's chat template cannot be read: {0}")]
    Broken(String),
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        Self {
            param: Some("messages".to_owned()),
            ..Self::new(ErrorCode::Unsupported, error.to_string())
        }
    }
}

/// What a template is given.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// The OpenAI `messages`.
    pub messages: &'a [Json],
    /// The OpenAI `tools`; templates see `none` where there are none.
    pub tools: &'a [Json],
    /// Further variables; they override special tokens and `add_generation_prompt`, nothing else.
    pub template_kwargs: &'a serde_json::Map<String, Json>,
}

/// A model's chat template, compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Takes the template from `chat_template.jinja` where that is not empty, else from `tokenizer_config.json`.
    pub fn from_files(tokenizer_config: &Json, chat_template: &str) -> Result<Self, TemplateError> {
        let mut environment = environment();
        let mut has_tool_use = false;
        for (name, source) in sources(tokenizer_config, chat_template)? {
            has_tool_use |= name == TOOL_USE;
            environment
                .add_template_owned(name, without_generation_tags(&source))
                .map_err(|error| TemplateError::Broken(describe(&error)))?;
        }
        environment
            .get_template(DEFAULT)
            .map_err(|_| TemplateError::Missing)?;
        let special_tokens = SPECIAL_TOKENS
            .into_iter()
            .filter_map(|name| Some((name, token_text(&tokenizer_config[name])?)))
            .collect();
        Ok(Self {
            environment,
            has_tool_use,
            special_tokens,
        })
    }

    /// The prompt for a conversation, ready for the assistant's answer. `now` is what `strftime_now` shows.
    pub fn render(
        &self,
        conversation: &Conversation<'_>,
        now: SystemTime,
    ) -> Result<String, ApiError> {
        let has_tools = !conversation.tools.is_empty();
        let name = if has_tools && self.has_tool_use {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(|error| refusal(&error))?;
        let mut prompt = Bounded::default();
        template
            .render_captured_to(self.context(conversation, now), &mut prompt)
            .map_err(|error| refusal(&error))?;
        String::from_utf8(prompt.bytes)
            .map_err(|_| ApiError::new(ErrorCode::Internal, "the chat template wrote invalid text"))
    }

    fn context(&self, conversation: &Conversation<'_>, now: SystemTime) -> Value {
        let list = |items: &[Json]| Value::from(Serde(items));
        let tools = conversation.tools;
        let strftime = move |format: &str| clock::strftime(format, now);
        let special = self.special_tokens.iter();
        let special =
            special.map(|(name, token)| ((*name).to_owned(), Value::from(token.as_str())));
        let kwargs = conversation.template_kwargs.iter();
        let kwargs = kwargs.map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        let fixed = [
            ("messages", list(conversation.messages)),
            (
                "tools",
                if tools.is_empty() {
                    Value::from(())
                } else {
                    list(tools)
                },
            ),
            ("strftime_now", Value::from_function(strftime)),
            ("raise_exception", Value::from_function(raise_exception)),
        ];
        // Of equal names the later one counts.
        let mut context: BTreeMap<String, Value> = special.collect();
        context.insert("add_generation_prompt".to_owned(), Value::from(true));
        context.extend(kwargs);
        context.extend(fixed.map(|(name, value)| (name.to_owned(), value)));
        Value::from(context)
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    if let Ok(syntax) = syntax.build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(default_auto_escape_callback);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", json::to_json);
    environment.add_test("iterable", is_iterable);
    // Python's spelling of the values that have two.
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        _ => escape_formatter(out, state, value),
    });
    environment
}

/// As Python has it: text is, `none` is not.
fn is_iterable(value: &Value) -> bool {
    value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
}

/// The named templates: one string, or a list of `{name, template}`.
fn sources(config: &Json, chat_template: &str) -> Result<Vec<(String, String)>, TemplateError> {
    if !chat_template.is_empty() {
        return Ok(vec![(DEFAULT.to_owned(), chat_template.to_owned())]);
    }
    match &config["chat_template"] {
        Json::String(source) => Ok(vec![(DEFAULT.to_owned(), source.clone())]),
        Json::Array(named) => named
            .iter()
            .map(
                |entry| match (entry["name"].as_str(), entry["template"].as_str()) {
                    (Some(name), Some(source)) => Ok((name.to_owned(), source.to_owned())),
                    _ => Err(TemplateError::Broken(
                        "an entry lacks its name or template".to_owned(),
                    )),
                },
            )
            .collect(),
        _ => Err(TemplateError::Missing),
    }
}

/// A special token is a string, or an object with `content`.
fn token_text(token: &Json) -> Option<String> {
    token
        .as_str()
        .or_else(|| token["content"].as_str())
        .map(str::to_owned)
}

/// `{% generation %}` marks what a trainer counts as the answer; it prints its body.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        let replaced = [("generation", "if true"), ("endgeneration", "endif")]
            .into_iter()
            .find_map(|(name, with)| Some((word.strip_prefix(name)?, with)))
            .filter(|(after, _)| {
                after
                    .trim_start()
                    .trim_start_matches(['-', '+'])
                    .starts_with("%}")
            });
        rest = match replaced {
            Some((after, with)) => {
                out.push_str(&tag[..tag.len() - word.len()]);
                out.push_str(with);
                after
            }
            None => tag,
        };
    }
    out.push_str(rest);
    out
}

/// A refusal that the template's author wrote.
#[derive(Debug)]
struct Raised {
    message: String,
}

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised { message }))
}

/// Kind and line of an error. Its detail may quote values, which a client wrote.
fn describe(error: &Error) -> String {
    let line = error
        .line()
        .map(|line| format!(" in line {line}"))
        .unwrap_or_default();
    format!("{}{line}", error.kind())
}

fn refusal(error: &Error) -> ApiError {
    if let Some(raised) = find_raised(error) {
        // The author's own words help; words put together from the messages are not repeated.
        let is_literal = error
            .template_source()
            .is_none_or(|source| source.contains(raised.message.as_str()));
        let reason = if is_literal {
            raised.message.as_str()
        } else {
            "it does not take them"
        };
        return ApiError::invalid(
            "messages",
            format!("the chat template refused messages: {reason}"),
        );
    }
    let described = describe(error);
    match error.kind() {
        ErrorKind::UnknownFilter | ErrorKind::UnknownTest | ErrorKind::UnknownFunction => {
            TemplateError::Broken(described).into()
        }
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => {
            ApiError::invalid("messages", "messages are too long for the chat template")
        }
        _ => {
            let message = format!("the chat template could not render messages: {described}");
            ApiError::invalid("messages", message)
        }
    }
}

fn find_raised(error: &Error) -> Option<&Raised> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return Some(raised);
        }
        source = cause.source();
    }
    None
}

/// Output that refuses to grow beyond [`RENDERED_BYTES_MAX`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > RENDERED_BYTES_MAX {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
