//! `POST /v1/completions`: reads OpenAI's request, writes its answers. `docs/http_api.md` lists the fields.

mod answer;

use orchestra_core::TokenId;
use serde_json::value::RawValue;

pub(super) use self::answer::CompletionFormat;
use super::{
    fields::{Fields, missing, read, wrong_type},
    sampling::{OutputOptions, generate_input},
    unsupported::{refuse_in_completions, unsupported},
};
use crate::{
    error::ApiError,
    request::{GenerateInput, Prompt},
};

/// Most prompts of one request, and most choices of all of them together.
const PROMPTS_MAX: usize = 128;
/// What OpenAI generates where `max_tokens` is not given.
const MAX_TOKENS_DEFAULT: u32 = 16;
const PROMPT_FORMS: &str =
    "a string, a list of strings, a list of token ids or a list of such lists";

/// A request, parsed: one input per prompt, alike but for the prompt.
#[derive(Debug)]
pub(super) struct CompletionRequest {
    pub(super) inputs: Vec<GenerateInput>,
    pub(super) options: OutputOptions,
    /// Whether each choice begins with its prompt.
    pub(super) echo: bool,
}

impl CompletionRequest {
    /// Reads a body.
    #[cfg(test)]
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        Self::from_fields(&Fields::parse(body)?)
    }

    /// Reads the fields of a body.
    pub(super) fn from_fields(fields: &Fields<'_>) -> Result<Self, ApiError> {
        refuse_in_completions(fields)?;
        let prompts = prompts(fields.raw("prompt").ok_or_else(|| missing("prompt"))?)?;
        let logprobs = fields.read("logprobs", "an integer between 0 and 20")?;
        let echo = fields.switch("echo")?;
        if echo && logprobs.is_some() {
            return Err(unsupported("echo", "echo with logprobs is not offered"));
        }
        let mut template = generate_input(fields, Prompt::TokenIds(Vec::new()), logprobs)?;
        template
            .sampling
            .max_tokens
            .get_or_insert(MAX_TOKENS_DEFAULT);
        check_counts(fields, prompts.len(), template.n)?;
        let inputs = prompts
            .into_iter()
            .map(|prompt| GenerateInput {
                prompt,
                ..template.clone()
            })
            .collect();
        Ok(Self {
            inputs,
            options: OutputOptions::parse(fields)?,
            echo,
        })
    }
}

fn check_counts(fields: &Fields<'_>, num_prompts: usize, n: u32) -> Result<(), ApiError> {
    let choices = num_prompts.saturating_mul(n as usize);
    if num_prompts > 1 && choices > PROMPTS_MAX {
        let message = format!(
            "{num_prompts} prompts of {n} choices are {choices}, the limit is {PROMPTS_MAX}"
        );
        return Err(ApiError::invalid("n", message));
    }
    // Choosing the best of more than are returned is not offered; of as many, it changes nothing.
    match fields.read::<u32>("best_of", "a positive integer")? {
        Some(best_of) if best_of != n => Err(unsupported(
            "best_of",
            "best_of other than n is not offered",
        )),
        _ => Ok(()),
    }
}

/// The four forms, told apart by what the list begins with.
fn prompts(raw: &RawValue) -> Result<Vec<Prompt>, ApiError> {
    let text = raw.get();
    let Some(list) = text.strip_prefix('[') else {
        let text: String = read(raw, "prompt", PROMPT_FORMS)?;
        check_not_empty("prompt", text.len())?;
        return Ok(vec![Prompt::Text(text)]);
    };
    let prompts: Vec<Prompt> = match list.trim_start().bytes().next() {
        Some(b'"') => {
            let texts: Vec<String> = read(raw, "prompt", PROMPT_FORMS)?;
            texts.into_iter().map(Prompt::Text).collect()
        }
        Some(b'[') => {
            let lists: Vec<Vec<TokenId>> = read(raw, "prompt", PROMPT_FORMS)?;
            lists.into_iter().map(Prompt::TokenIds).collect()
        }
        Some(b'0'..=b'9' | b'-') => {
            return Ok(vec![Prompt::TokenIds(read(raw, "prompt", "token ids")?)]);
        }
        Some(b']') => return Err(ApiError::invalid("prompt", "prompt must not be empty")),
        _ => return Err(wrong_type("prompt", PROMPT_FORMS)),
    };
    if prompts.len() > PROMPTS_MAX {
        let message = format!(
            "{} prompts were given, the limit is {PROMPTS_MAX}",
            prompts.len()
        );
        return Err(ApiError::invalid("prompt", message));
    }
    for (index, prompt) in prompts.iter().enumerate() {
        let length = match prompt {
            Prompt::Text(text) => text.len(),
            Prompt::TokenIds(ids) => ids.len(),
            Prompt::Chat { messages, .. } => messages.len(),
        };
        check_not_empty(&format!("prompt[{index}]"), length)?;
    }
    Ok(prompts)
}

fn check_not_empty(path: &str, length: usize) -> Result<(), ApiError> {
    if length == 0 {
        return Err(ApiError::invalid(path, format!("{path} must not be empty")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use orchestra_core::ErrorCode::{InvalidRequest, Unsupported};

    use super::*;

    fn parse(body: &str) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::parse(format!(r#"{{"model": "m", {body}}}"#).as_bytes())
    }

    #[test]
    fn a_prompt_has_four_forms() {
        let prompts = |prompt: &str| {
            let request = parse(&format!(r#""prompt": {prompt}"#)).unwrap();
            let prompts = request
                .inputs
                .into_iter()
                .map(|input| format!("{:?}", input.prompt));
            prompts.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(prompts(r#""a""#), r#"Text("a")"#);
        assert_eq!(prompts(r#"[ "a", "b" ]"#), r#"Text("a") Text("b")"#);
        assert_eq!(prompts("[1, 2]"), "TokenIds([1, 2])");
        assert_eq!(prompts("[ [1], [2, 3] ]"), "TokenIds([1]) TokenIds([2, 3])");
    }

    #[test]
    fn the_route_s_own_fields_arrive() {
        let request = parse(r#""prompt": "a", "logprobs": 0, "n": 2, "best_of": 2"#).unwrap();
        assert_eq!(request.inputs[0].sampling.logprobs, Some(0));
        assert_eq!(request.inputs[0].sampling.max_tokens, Some(16));
        assert_eq!(request.inputs[0].n, 2);
        assert!(parse(r#""prompt": "a", "echo": true"#).unwrap().echo);
        let request = parse(r#""prompt": "a", "max_tokens": 5"#).unwrap();
        assert_eq!(request.inputs[0].sampling.max_tokens, Some(5));
    }

    #[test]
    fn bad_input_names_its_field_and_never_its_value() {
        let many = format!(r#""prompt": [{}]"#, vec![r#""a""#; 129].join(","));
        let cases = [
            (r#""x": 1"#, "prompt", InvalidRequest),
            (r#""prompt": null"#, "prompt", InvalidRequest),
            (r#""prompt": 5"#, "prompt", InvalidRequest),
            (r#""prompt": {"secret": 1}"#, "prompt", InvalidRequest),
            (r#""prompt": """#, "prompt", InvalidRequest),
            (r#""prompt": []"#, "prompt", InvalidRequest),
            (r#""prompt": [null]"#, "prompt", InvalidRequest),
            (r#""prompt": [true]"#, "prompt", InvalidRequest),
            (r#""prompt": ["a", ""]"#, "prompt[1]", InvalidRequest),
            (r#""prompt": ["secret", 1]"#, "prompt", InvalidRequest),
            (r#""prompt": [1, "secret"]"#, "prompt", InvalidRequest),
            (r#""prompt": [-1]"#, "prompt", InvalidRequest),
            (r#""prompt": [1.5]"#, "prompt", InvalidRequest),
            (r#""prompt": [4294967296]"#, "prompt", InvalidRequest),
            (r#""prompt": [[1], []]"#, "prompt[1]", InvalidRequest),
            (r#""prompt": [[1], "secret"]"#, "prompt", InvalidRequest),
            (r#""prompt": "\ud800""#, "prompt", InvalidRequest),
            (&many, "prompt", InvalidRequest),
            (
                r#""prompt": ["a", "b", "c", "d", "e"], "n": 30"#,
                "n",
                InvalidRequest,
            ),
            (
                r#""prompt": ["a", "b"], "n": 4294967295"#,
                "n",
                InvalidRequest,
            ),
            (
                r#""prompt": "a", "logprobs": true"#,
                "logprobs",
                InvalidRequest,
            ),
            (r#""prompt": "a", "echo": "secret""#, "echo", InvalidRequest),
            (
                r#""prompt": "a", "echo": true, "logprobs": 1"#,
                "echo",
                Unsupported,
            ),
            (r#""prompt": "a", "best_of": 2"#, "best_of", Unsupported),
            (
                r#""prompt": "a", "suffix": "secret""#,
                "suffix",
                Unsupported,
            ),
        ];
        for (body, field, code) in cases {
            let error = parse(body).unwrap_err();
            assert_eq!(
                (error.param.as_deref(), error.code),
                (Some(field), code),
                "{body}"
            );
            assert!(
                !error.message.contains("secret"),
                "{body}: {}",
                error.message
            );
        }
    }
}
