//! Fields that change what a client would get and that are not offered. Ignoring one would answer another question
//! than the one asked, so each is refused by name unless it has the value that it has anyway.

use orchestra_core::ErrorCode;
use serde_json::Value;

use super::fields::Fields;
use crate::error::ApiError;

/// A field and the values that change nothing, as JSON.
type Row = (&'static str, &'static [&'static str]);

/// Both routes; the lower half are vLLM's and `SGLang`'s.
const COMMON: &[Row] = &[
    ("response_format", &[r#"{"type":"text"}"#]),
    ("structured_outputs", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("json_schema", &[]),
    ("regex", &[]),
    ("ebnf", &[]),
    ("min_tokens", &["0"]),
    ("bad_words", &["[]"]),
    ("use_beam_search", &["false"]),
    ("length_penalty", &["1", "1.0"]),
    ("prompt_logprobs", &[]),
    ("truncate_prompt_tokens", &[]),
    ("include_stop_str_in_output", &["false"]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("priority", &["0"]),
];

const CHAT: &[Row] = &[
    ("functions", &["[]"]),
    ("function_call", &[r#""none""#, r#""auto""#]),
    ("audio", &[]),
    ("modalities", &[r#"["text"]"#]),
    ("prediction", &[]),
    ("web_search_options", &[]),
    ("echo", &["false"]),
    ("documents", &["[]"]),
    ("add_generation_prompt", &["true"]),
    ("continue_final_message", &["false"]),
    ("add_special_tokens", &["false"]),
];

const COMPLETIONS: &[Row] = &[
    ("suffix", &[r#""""#]),
    ("add_special_tokens", &["true"]),
    ("prompt_embeds", &[]),
];

/// Refuses what chat does not offer.
pub(super) fn refuse_in_chat(fields: &Fields<'_>) -> Result<(), ApiError> {
    refuse(fields, COMMON)?;
    refuse(fields, CHAT)
}

/// Refuses what completions do not offer.
pub(super) fn refuse_in_completions(fields: &Fields<'_>) -> Result<(), ApiError> {
    refuse(fields, COMMON)?;
    refuse(fields, COMPLETIONS)
}

/// The error for a field that is understood and not offered.
pub(super) fn unsupported(path: &str, message: impl Into<String>) -> ApiError {
    let param = Some(path.to_owned());
    ApiError {
        param,
        ..ApiError::new(ErrorCode::Unsupported, message)
    }
}

fn refuse(fields: &Fields<'_>, rows: &[Row]) -> Result<(), ApiError> {
    for (name, harmless) in rows {
        let Some(raw) = fields.raw(name) else {
            continue;
        };
        let value = |json| serde_json::from_str::<Value>(json).ok();
        let given = value(raw.get());
        if given.is_none() || !harmless.iter().any(|json| value(json) == given) {
            return Err(unsupported(name, format!("{name} is not offered")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_refused_by_name_and_harmless_values_pass() {
        for (rows, refuse) in [
            (
                COMMON,
                refuse_in_chat as fn(&Fields<'_>) -> Result<(), ApiError>,
            ),
            (COMMON, refuse_in_completions),
            (CHAT, refuse_in_chat),
            (COMPLETIONS, refuse_in_completions),
        ] {
            for (name, harmless) in rows {
                let body = format!(r#"{{"{name}": {{"other": "than the default"}}}}"#);
                let error = refuse(&Fields::parse(body.as_bytes()).unwrap()).unwrap_err();
                assert_eq!(error.code, ErrorCode::Unsupported);
                assert_eq!(error.param.as_deref(), Some(*name));
                for value in harmless.iter().chain(&["null"]) {
                    let body = format!(r#"{{"{name}": {value}}}"#);
                    refuse(&Fields::parse(body.as_bytes()).unwrap()).unwrap();
                }
            }
        }
    }

    #[test]
    fn each_row_is_in_the_docs() {
        let docs = include_str!("../../../../docs/http_api.md");
        let (_, not_offered) = docs.split_once("### Not offered").unwrap();
        let (not_offered, _) = not_offered.split_once("\n## ").unwrap();
        for (name, _) in [COMMON, CHAT, COMPLETIONS].concat() {
            assert!(not_offered.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn white_space_does_not_make_a_value_another() {
        let body = br#"{"response_format": { "type" :  "text" }, "modalities": [ "text" ]}"#;
        refuse_in_chat(&Fields::parse(body).unwrap()).unwrap();
    }
}
