//! What is checked of a body before an engine sees it: that it is JSON which every parser reads alike, and that the
//! fields which the router knows have values that make sense.

use std::{borrow::Cow, num::NonZeroU32};

use bytes::Bytes;
use orchestra_core::{SamplingParams, sampling::SamplingError};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::{read::Route, shape};
use crate::{
    error::ApiError,
    http::{
        fields::{Fields, missing, read, wrong_type},
        sampling::{OutputOptions, sampling_patch},
    },
    request::SamplingPatch,
};

/// Deepest nesting of a body.
const DEPTH_MAX: usize = 128;
/// Most choices of one prompt, and most choices in all.
const CHOICES_MAX: u32 = 128;
/// Most prompts of one request.
const PROMPTS_MAX: usize = 1024;
/// The longest role, bytes.
const ROLE_BYTES_MAX: usize = 64;
/// Longest cache salt, bytes.
const SALT_BYTES_MAX: usize = 256;

/// What the router knows of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Checked {
    pub(super) stream: bool,
    /// The client wants a last event with the usage.
    pub(super) include_usage: bool,
    /// Choices of all prompts together.
    pub(super) num_choices: u32,
    pub(super) max_tokens: Option<u32>,
    pub(super) cache_salt: String,
}

pub(super) fn check(route: Route, body: &Bytes, fields: &Fields<'_>) -> Result<Checked, ApiError> {
    check_shape(body)?;
    let options = OutputOptions::parse(fields)?;
    let num_prompts = match route {
        Route::Chat => check_messages(fields)?,
        Route::Completions => check_prompt(fields)?,
    };
    let n = fields
        .read("n", "a positive integer")?
        .map_or(1, NonZeroU32::get);
    let num_choices = num_prompts.saturating_mul(n);
    if n > CHOICES_MAX || num_choices > PROMPTS_MAX as u32 {
        let message =
            format!("n must be at most {CHOICES_MAX}, and at most {PROMPTS_MAX} for all prompts");
        return Err(ApiError::invalid("n", message));
    }
    let cache_salt: String = fields.read("cache_salt", "a string")?.unwrap_or_default();
    if cache_salt.len() > SALT_BYTES_MAX {
        let message = format!("cache_salt must have at most {SALT_BYTES_MAX} bytes");
        return Err(ApiError::invalid("cache_salt", message));
    }
    Ok(Checked {
        stream: options.stream,
        include_usage: options.include_usage,
        num_choices,
        max_tokens: max_tokens(route, fields)?,
        cache_salt,
    })
}

/// The ranges that are the same everywhere; what engines add is theirs to check.
fn max_tokens(route: Route, fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let given = sampling_patch(fields, None)?;
    let newer = match route {
        Route::Chat => fields.read("max_completion_tokens", "a positive integer")?,
        Route::Completions => None,
    };
    let max_tokens = newer.map(NonZeroU32::get).or(given.max_tokens);
    let known = SamplingPatch {
        max_tokens,
        top_k: None,
        stop_token_ids: Vec::new(),
        logit_bias: Vec::new(),
        logprobs: None,
        ..given
    };
    known
        .over(&SamplingParams::default(), 1)
        .validate()
        .map_err(|error: SamplingError| ApiError::from(error))?;
    Ok(max_tokens)
}

/// Nesting and escapes, which the first reading of a body passes over. Cheap where there are few brackets and no `\u`.
fn check_shape(body: &[u8]) -> Result<(), ApiError> {
    let has_many_brackets = memchr::memchr2_iter(b'[', b'{', body)
        .nth(DEPTH_MAX)
        .is_some();
    if has_many_brackets && shape::depth(body) > DEPTH_MAX {
        let message = format!("the body is nested deeper than {DEPTH_MAX} levels");
        return Err(ApiError::new(
            orchestra_core::ErrorCode::InvalidRequest,
            message,
        ));
    }
    if memchr::memmem::find(body, b"\\u").is_some()
        && let Some(at) = shape::lone_surrogate(body)
    {
        let message = format!("the body holds half a character at byte {at}");
        return Err(ApiError::new(
            orchestra_core::ErrorCode::InvalidRequest,
            message,
        ));
    }
    Ok(())
}

/// A message, as far as the router looks at it.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    role: Option<&'a RawValue>,
}

fn check_messages(fields: &Fields<'_>) -> Result<u32, ApiError> {
    let raw = fields.raw("messages").ok_or_else(|| missing("messages"))?;
    let expected = "a list of objects";
    if !raw.get().starts_with('[') {
        return Err(wrong_type("messages", expected));
    }
    if shape::have_roles(raw.get().as_bytes(), ROLE_BYTES_MAX) {
        return Ok(1);
    }
    let messages: Vec<Message<'_>> = match serde_json::from_str(raw.get()) {
        Ok(messages) => messages,
        Err(_) => return Err(first_wrong(raw, "messages", expected)),
    };
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages must hold at least one message",
        ));
    }
    for (index, message) in messages.iter().enumerate() {
        let role = message.role.filter(|raw| raw.get() != "null");
        let path = || format!("messages[{index}].role");
        let role = role.ok_or_else(|| missing(&path()))?;
        let text = role.get();
        if text.starts_with('"') && (3..=ROLE_BYTES_MAX + 2).contains(&text.len()) {
            continue;
        }
        return Err(wrong_type(&path(), "a string of 1 to 64 bytes"));
    }
    Ok(1)
}

/// Names the element that is no object.
fn first_wrong(raw: &RawValue, field: &str, expected: &str) -> ApiError {
    let elements: Vec<&RawValue> = match read(raw, field, expected) {
        Ok(elements) => elements,
        Err(error) => return error,
    };
    match elements
        .iter()
        .position(|element| !element.get().starts_with('{'))
    {
        Some(index) => wrong_type(&format!("{field}[{index}]"), "an object"),
        None => wrong_type(field, expected),
    }
}

/// How many prompts there are.
fn check_prompt(fields: &Fields<'_>) -> Result<u32, ApiError> {
    let expected = "a string, a list of strings, a list of token ids or a list of such lists";
    let raw = fields.raw("prompt").ok_or_else(|| missing("prompt"))?;
    let text = raw.get();
    let empty = || ApiError::invalid("prompt", "prompt must not be empty");
    if text.starts_with('"') {
        return if text.len() > 2 { Ok(1) } else { Err(empty()) };
    }
    let list = text
        .strip_prefix('[')
        .ok_or_else(|| wrong_type("prompt", expected))?;
    let count = match list.trim_ascii_start().bytes().next() {
        Some(b'0'..=b'9') => {
            let _: Vec<u32> = read(raw, "prompt", "token ids")?;
            1
        }
        Some(b'"') => read::<Vec<Cow<'_, str>>>(raw, "prompt", expected)?.len(),
        Some(b'[') => read::<Vec<Vec<u32>>>(raw, "prompt", expected)?.len(),
        // vLLM's prompts with parts beside the text.
        Some(b'{') => read::<Vec<IgnoredAny>>(raw, "prompt", expected)?.len(),
        Some(b']') => return Err(empty()),
        _ => return Err(wrong_type("prompt", expected)),
    };
    if count > PROMPTS_MAX {
        let message = format!("{count} prompts were given, the limit is {PROMPTS_MAX}");
        return Err(ApiError::invalid("prompt", message));
    }
    Ok(count as u32)
}
