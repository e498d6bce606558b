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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    /// One rendering; `expected` is what transformers made of it (`testdata/chat_templates/render.py`).
    #[derive(Deserialize)]
    struct Case {
        template: String,
        messages: Vec<Json>,
        #[serde(default)]
        tools: Vec<Json>,
        #[serde(default)]
        template_kwargs: serde_json::Map<String, Json>,
        expected: String,
    }

    fn source(name: &str) -> &'static str {
        match name {
            "chatml" => include_str!("../../testdata/chat_templates/chatml.jinja"),
            "llama3" => include_str!("../../testdata/chat_templates/llama3.jinja"),
            "qwen3" => include_str!("../../testdata/chat_templates/qwen3.jinja"),
            "mistral" => include_str!("../../testdata/chat_templates/mistral.jinja"),
            name => panic!("no template {name}"),
        }
    }

    fn config() -> Json {
        json!({"bos_token": "<s>", "eos_token": {"content": "<|eot_id|>", "lstrip": false}, "pad_token": null})
    }

    /// The date in `render.py`.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_210_096)
    }

    fn render(template: &str, messages: &Json, kwargs: &Json) -> Result<String, ApiError> {
        let template = ChatTemplate::from_files(&config(), template).unwrap();
        let conversation = Conversation {
            messages: messages.as_array().unwrap(),
            tools: &[],
            template_kwargs: kwargs.as_object().unwrap(),
        };
        template.render(&conversation, now())
    }

    #[test]
    fn renders_what_transformers_renders() {
        let cases = include_str!("../../testdata/chat_templates/cases.json");
        let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
        for (index, case) in cases.into_iter().enumerate() {
            let template = ChatTemplate::from_files(&config(), source(&case.template)).unwrap();
            let conversation = Conversation {
                messages: &case.messages,
                tools: &case.tools,
                template_kwargs: &case.template_kwargs,
            };
            let rendered = template.render(&conversation, now()).unwrap();
            assert_eq!(rendered, case.expected, "case {index}, {}", case.template);
        }
    }

    #[test]
    fn the_template_comes_from_either_file() {
        let named = json!({"chat_template": [
            {"name": "tool_use", "template": "tools: {{ tools | length }}"},
            {"name": "default", "template": "plain: {{ tools }}"},
        ]});
        let template = ChatTemplate::from_files(&named, "").unwrap();
        let kwargs = serde_json::Map::new();
        let render = |tools: &[Json]| {
            let conversation = Conversation {
                messages: &[],
                tools,
                template_kwargs: &kwargs,
            };
            template.render(&conversation, now()).unwrap()
        };
        assert_eq!(render(&[]), "plain: None");
        assert_eq!(render(&[json!({})]), "tools: 1");
        let both = ChatTemplate::from_files(&named, "from the file").unwrap();
        let conversation = Conversation {
            messages: &[],
            tools: &[],
            template_kwargs: &kwargs,
        };
        assert_eq!(both.render(&conversation, now()).unwrap(), "from the file");
    }

    #[test]
    fn a_model_without_a_template_offers_no_chat() {
        for config in [
            json!({}),
            json!({"chat_template": null}),
            json!({"chat_template": []}),
        ] {
            let error = ChatTemplate::from_files(&config, "").err().unwrap();
            assert_eq!(error, TemplateError::Missing);
            let error = ApiError::from(error);
            assert_eq!(
                (error.code, error.param.as_deref()),
                (ErrorCode::Unsupported, Some("messages"))
            );
        }
        let broken = ChatTemplate::from_files(&json!({}), "{% if %}")
            .err()
            .unwrap();
        assert!(matches!(broken, TemplateError::Broken(_)));
    }

    #[test]
    fn variables_override_what_they_may() {
        let template = "{{ bos_token }}|{{ add_generation_prompt }}|{{ messages | length }}";
        let kwargs = json!({"bos_token": "B", "add_generation_prompt": false, "messages": [1, 2]});
        assert_eq!(
            render(template, &json!([{}]), &kwargs).unwrap(),
            "B|False|1"
        );
    }

    #[test]
    fn refusals_repeat_the_author_and_never_the_client() {
        let refuse = |template: &str| {
            let error = render(
                template,
                &json!([{"role": "SECRET", "content": 5}]),
                &json!({}),
            )
            .unwrap_err();
            assert_eq!(error.param.as_deref(), Some("messages"));
            assert!(!error.message.contains("SECRET"), "{}", error.message);
            error
        };
        let error = refuse("{{ raise_exception('Roles must alternate') }}");
        assert!(
            error.message.contains("Roles must alternate"),
            "{}",
            error.message
        );
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        refuse("{{ raise_exception('No role ' + messages[0].role) }}");
        refuse("{{ messages[0].role.nothing.deeper }}");
        refuse("{{ messages[0].role | int }}");
        let error = refuse("{{ messages[0].role | no_such_filter }}");
        assert_eq!(error.code, ErrorCode::Unsupported);
    }

    #[test]
    fn templates_run_within_bounds() {
        let endless =
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        let error = render(endless, &json!([]), &json!({})).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        let large = "{% for a in range(100000) %}{{ messages[0] }}{% endfor %}";
        let error = render(large, &json!(["x".repeat(1000)]), &json!({})).unwrap_err();
        assert!(error.message.contains("too long"), "{}", error.message);
        let deep = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
        assert!(render(deep, &json!([]), &json!({})).is_err());
    }

    #[test]
    fn generation_tags_print_their_body() {
        let source = "a {%- generation -%} b {%- endgeneration %}c{% set generations = 1 %}{{ generations }}";
        assert_eq!(render(source, &json!([]), &json!({})).unwrap(), "abc1");
    }
}
