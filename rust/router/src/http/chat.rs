//! `POST /v1/chat/completions`: reads OpenAI's request, writes its answers. `docs/http_api.md` lists the fields.

mod answer;

use std::num::NonZeroU32;

use orchestra_core::sampling::LOGPROBS_MAX;
use serde_json::{Map, Value, value::RawValue};

pub(super) use self::answer::ChatFormat;
use super::{
    fields::{Fields, missing, read, wrong_type},
    sampling::{OutputOptions, generate_input},
    unsupported::{refuse_in_chat, unsupported},
};
use crate::{
    error::ApiError,
    request::{GenerateInput, Prompt},
};

/// The longest role, bytes. Templates decide which roles there are.
const ROLE_BYTES_MAX: usize = 64;

/// A request, parsed.
#[derive(Debug)]
pub(super) struct ChatRequest {
    pub(super) input: GenerateInput,
    pub(super) options: OutputOptions,
}

impl ChatRequest {
    /// Reads a body.
    #[cfg(test)]
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        Self::from_fields(&Fields::parse(body)?)
    }

    /// Reads the fields of a body.
    pub(super) fn from_fields(fields: &Fields<'_>) -> Result<Self, ApiError> {
        refuse_in_chat(fields)?;
        let messages = fields.raw("messages").ok_or_else(|| missing("messages"))?;
        let prompt = Prompt::Chat {
            messages: messages_of(messages)?,
            tools: tools(fields)?,
            template_kwargs: fields
                .read("chat_template_kwargs", "an object")?
                .unwrap_or_default(),
        };
        let mut input = generate_input(fields, prompt, logprobs(fields)?)?;
        // OpenAI's newer name of the same limit; it wins where both are given.
        let max_tokens = fields.read("max_completion_tokens", "a positive integer")?;
        input.sampling.max_tokens = max_tokens
            .map(NonZeroU32::get)
            .or(input.sampling.max_tokens);
        Ok(Self {
            input,
            options: OutputOptions::parse(fields)?,
        })
    }
}

fn logprobs(fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let is_wanted = fields.switch("logprobs")?;
    let top = fields.read("top_logprobs", "an integer between 0 and 20")?;
    if top.is_some() && !is_wanted {
        let message = "top_logprobs is only allowed where logprobs is true";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    if top.is_some_and(|top| top > LOGPROBS_MAX) {
        let message = format!("top_logprobs must be between 0 and {LOGPROBS_MAX}");
        return Err(ApiError::invalid("top_logprobs", message));
    }
    Ok(is_wanted.then(|| top.unwrap_or(0)))
}

/// The messages of a chat, each with its content as one string.
pub(crate) fn messages_of(raw: &RawValue) -> Result<Vec<Value>, ApiError> {
    let mut messages: Vec<Value> = read(raw, "messages", "a list of objects")?;
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages must hold at least one message",
        ));
    }
    for (index, message) in messages.iter_mut().enumerate() {
        let path = format!("messages[{index}]");
        let message = message
            .as_object_mut()
            .ok_or_else(|| wrong_type(&path, "an object"))?;
        check_message(&path, message)?;
    }
    Ok(messages)
}

/// Checks one message and joins its content to one string, as templates want it. Further keys (`name`, `tool_calls`,
/// `tool_call_id`) go to the template as they are.
fn check_message(path: &str, message: &mut Map<String, Value>) -> Result<(), ApiError> {
    let role_path = format!("{path}.role");
    let role = match message.get("role") {
        None | Some(Value::Null) => return Err(missing(&role_path)),
        Some(Value::String(role)) if (1..=ROLE_BYTES_MAX).contains(&role.len()) => role,
        Some(_) => return Err(wrong_type(&role_path, "a string of 1 to 64 bytes")),
    };
    // An assistant that only called tools said nothing.
    let may_be_silent = role == "assistant";
    let content_path = format!("{path}.content");
    match message.get_mut("content") {
        Some(Value::String(_)) => Ok(()),
        Some(content @ Value::Array(_)) => {
            *content = Value::String(join_parts(&content_path, content)?);
            Ok(())
        }
        None | Some(Value::Null) if may_be_silent => {
            message.insert("content".to_owned(), Value::Null);
            Ok(())
        }
        None | Some(Value::Null) => Err(missing(&content_path)),
        Some(_) => Err(wrong_type(&content_path, "a string or a list of parts")),
    }
}

/// Text parts, one line each: as vLLM joins them for templates that take a string, so that a prompt has the same tokens
/// here and on an engine.
fn join_parts(path: &str, parts: &Value) -> Result<String, ApiError> {
    let mut joined = String::new();
    for (index, part) in parts.as_array().into_iter().flatten().enumerate() {
        let type_path = format!("{path}[{index}].type");
        match part.get("type").and_then(Value::as_str) {
            Some("text") => {
                let text = part.get("text").and_then(Value::as_str);
                let text_path = format!("{path}[{index}].text");
                if index > 0 {
                    joined.push('\n');
                }
                joined.push_str(text.ok_or_else(|| wrong_type(&text_path, "a string"))?);
            }
            Some(_) => {
                let message = format!("{type_path}: only parts of type text are offered");
                return Err(unsupported(&type_path, message));
            }
            None => return Err(wrong_type(&type_path, "a string")),
        }
    }
    Ok(joined)
}

/// Tools go to the template where the client reads the calls out of the text itself, which `"tool_choice": "none"`
/// says. Calls are not parsed out of the text, so any other choice would silently never call a tool.
fn tools(fields: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let tools: Vec<Value> = fields
        .read("tools", "a list of objects")?
        .unwrap_or_default();
    let choice = fields.read::<Value>("tool_choice", "a string or an object")?;
    if let Some(index) = tools.iter().position(|tool| !tool.is_object()) {
        return Err(wrong_type(&format!("tools[{index}]"), "an object"));
    }
    match &choice {
        Some(choice) if choice == "none" => Ok(tools),
        Some(choice) if choice != "auto" => Err(unsupported(
            "tool_choice",
            "only the tool_choice \"none\" is offered",
        )),
        _ if tools.is_empty() => Ok(tools),
        _ => {
            let message = "tools are only shown to the model: set tool_choice to \"none\" and read \
                           its calls from the text";
            Err(unsupported("tools", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use orchestra_core::ErrorCode::{self, InvalidRequest, Unsupported};

    use super::*;

    fn parse(body: &str) -> Result<ChatRequest, ApiError> {
        ChatRequest::parse(body.as_bytes())
    }

    fn prompt(body: &str) -> (Vec<Value>, Vec<Value>) {
        match parse(body).unwrap().input.prompt {
            Prompt::Chat {
                messages, tools, ..
            } => (messages, tools),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_reach_the_template_with_their_content_joined() {
        let (messages, tools) = prompt(
            r#"{"model": "m", "tool_choice": "none", "tools": [{"type": "function"}], "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": "", "tool_call_id": "1"}]}"#,
        );
        let expected = serde_json::json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "content": "", "tool_call_id": "1"}]);
        assert_eq!(Value::Array(messages), expected);
        assert_eq!(tools.len(), 1);
    }

    #[test]
    fn the_chat_s_own_fields_arrive() {
        let request = parse(
            r#"{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5,
                "max_completion_tokens": 7, "logprobs": true, "top_logprobs": 3,
                "chat_template_kwargs": {"enable_thinking": false}}"#,
        )
        .unwrap();
        assert_eq!(request.input.sampling.max_tokens, Some(7));
        assert_eq!(request.input.sampling.logprobs, Some(3));
        let Prompt::Chat {
            template_kwargs, ..
        } = request.input.prompt
        else {
            panic!("no chat")
        };
        assert_eq!(
            template_kwargs.get("enable_thinking"),
            Some(&Value::Bool(false))
        );
        let logprobs = |body: &str| {
            let messages = r#""messages": [{"role": "user", "content": "x"}]"#;
            parse(&format!(r#"{{"model": "m", {messages}, {body}}}"#))
                .unwrap()
                .input
                .sampling
                .logprobs
        };
        assert_eq!(logprobs(r#""logprobs": true"#), Some(0));
        assert_eq!(logprobs(r#""logprobs": false"#), None);
    }

    /// Each body after `model` is refused with this code, names this field, and repeats nothing.
    fn check(cases: &[(String, &str, ErrorCode)]) {
        for (body, field, code) in cases {
            let error = parse(&format!(r#"{{"model": "m", {body}}}"#)).unwrap_err();
            let got = (error.param.as_deref(), error.code);
            assert_eq!(got, (Some(*field), *code), "{body}");
            assert!(
                !error.message.contains("secret"),
                "{body}: {}",
                error.message
            );
        }
    }

    #[test]
    fn a_bad_message_names_its_place_and_never_its_value() {
        let message = |message: &str| format!(r#""messages": [{message}]"#);
        let content =
            |content: &str| message(&format!(r#"{{"role": "user", "content": {content}}}"#));
        check(&[
            (r#""x": 1"#.to_owned(), "messages", InvalidRequest),
            (
                r#""messages": "secret""#.to_owned(),
                "messages",
                InvalidRequest,
            ),
            (message(""), "messages", InvalidRequest),
            (message(r#""secret""#), "messages[0]", InvalidRequest),
            (
                message(r#"{"content": "x"}"#),
                "messages[0].role",
                InvalidRequest,
            ),
            (
                message(r#"{"role": 5, "content": "x"}"#),
                "messages[0].role",
                InvalidRequest,
            ),
            (
                message(r#"{"role": "", "content": "x"}"#),
                "messages[0].role",
                InvalidRequest,
            ),
            (
                message(r#"{"role": "user"}"#),
                "messages[0].content",
                InvalidRequest,
            ),
            (content("null"), "messages[0].content", InvalidRequest),
            (content("5"), "messages[0].content", InvalidRequest),
            (
                content(r#"{"secret": 1}"#),
                "messages[0].content",
                InvalidRequest,
            ),
            (
                content(r#"["secret"]"#),
                "messages[0].content[0].type",
                InvalidRequest,
            ),
            (
                content(r#"[{"type": "text"}]"#),
                "messages[0].content[0].text",
                InvalidRequest,
            ),
            (
                content(r#"[{"type": "image_url"}]"#),
                "messages[0].content[0].type",
                Unsupported,
            ),
            (content(r#""\ud800""#), "messages", InvalidRequest),
        ]);
    }

    #[test]
    fn a_bad_field_is_named_and_its_value_never() {
        let with =
            |field: &str| format!(r#""messages": [{{"role": "user", "content": "x"}}], {field}"#);
        let tools = |choice: &str| with(&format!(r#""tools": [{{}}], "tool_choice": {choice}"#));
        let top = |count: &str| with(&format!(r#""logprobs": true, "top_logprobs": {count}"#));
        let limit = |count: &str| with(&format!(r#""max_completion_tokens": {count}"#));
        let json_only = r#""response_format": {"type": "json_object"}"#;
        check(&[
            (with(r#""logprobs": 3"#), "logprobs", InvalidRequest),
            (with(r#""top_logprobs": 3"#), "top_logprobs", InvalidRequest),
            (top(r#""secret""#), "top_logprobs", InvalidRequest),
            (top("21"), "top_logprobs", InvalidRequest),
            (
                limit(r#""secret""#),
                "max_completion_tokens",
                InvalidRequest,
            ),
            (limit("0"), "max_completion_tokens", InvalidRequest),
            (
                with(r#""chat_template_kwargs": []"#),
                "chat_template_kwargs",
                InvalidRequest,
            ),
            (with(r#""tools": "secret""#), "tools", InvalidRequest),
            (with(r#""tools": ["secret"]"#), "tools[0]", InvalidRequest),
            (with(r#""tools": [{}]"#), "tools", Unsupported),
            (tools(r#""auto""#), "tools", Unsupported),
            (tools(r#""required""#), "tool_choice", Unsupported),
            (
                with(r#""tool_choice": {"secret": 1}"#),
                "tool_choice",
                Unsupported,
            ),
            (with(json_only), "response_format", Unsupported),
        ]);
    }
}
