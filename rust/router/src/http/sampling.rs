//! The fields that chat and completions share. Types are checked here, ranges by the corridor, alike for all doors.

use std::num::NonZeroU32;

use orchestra_core::{TokenId, scheduler::AdmissionClass};
use serde_json::value::RawValue;

use super::fields::{Fields, read, wrong_type};
use crate::{
    caller::Caller,
    error::ApiError,
    observe::Record,
    request::{GenerateInput, Prompt, SamplingPatch},
};

/// How the answer should look, as far as both routes have it in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OutputOptions {
    /// Server-sent events instead of one body.
    pub(crate) stream: bool,
    /// A last event with the usage.
    pub(crate) include_usage: bool,
    /// Token ids beside the text.
    pub(crate) return_token_ids: bool,
}

impl OutputOptions {
    pub(crate) fn parse(fields: &Fields<'_>) -> Result<Self, ApiError> {
        let stream = fields.switch("stream")?;
        let include_usage = match fields.raw("stream_options") {
            None => false,
            Some(_) if !stream => {
                let message = "stream_options is only allowed where stream is true";
                return Err(ApiError::invalid("stream_options", message));
            }
            Some(raw) => {
                let options: serde_json::Map<String, serde_json::Value> =
                    read(raw, "stream_options", "an object")?;
                match options.get("include_usage") {
                    None | Some(serde_json::Value::Null) => false,
                    Some(serde_json::Value::Bool(is_wanted)) => *is_wanted,
                    Some(_) => {
                        return Err(wrong_type("stream_options.include_usage", "true or false"));
                    }
                }
            }
        };
        Ok(Self {
            stream,
            include_usage,
            return_token_ids: fields.switch("return_token_ids")?,
        })
    }
}

/// Reads everything of a [`GenerateInput`] that both routes share.
pub(crate) fn generate_input(
    fields: &Fields<'_>,
    prompt: Prompt,
    logprobs: Option<u32>,
) -> Result<GenerateInput, ApiError> {
    Ok(GenerateInput {
        model: fields.require("model", "a string")?,
        prompt,
        sampling: sampling_patch(fields, logprobs)?,
        stop: stop_strings(fields)?,
        n: fields
            .read("n", "a positive integer")?
            .map_or(1, NonZeroU32::get),
        timeout: None,
        cache_salt: fields.read("cache_salt", "a string")?.unwrap_or_default(),
        caller: Caller {
            asked_class: service_tier(fields)?,
            ..Caller::default()
        },
        record: Record::default(),
    })
}

/// OpenAI's tiers as classes; `scale` is one that is paid for there and is nothing of its own here.
pub(crate) fn service_tier(fields: &Fields<'_>) -> Result<Option<AdmissionClass>, ApiError> {
    let expected = "auto, default, flex, priority or scale";
    let tier: Option<String> = fields.read("service_tier", expected)?;
    match tier.as_deref() {
        None | Some("auto") => Ok(None),
        Some("default" | "scale") => Ok(Some(AdmissionClass::Standard)),
        Some("flex") => Ok(Some(AdmissionClass::Batch)),
        Some("priority") => Ok(Some(AdmissionClass::Interactive)),
        Some(_) => Err(wrong_type("service_tier", expected)),
    }
}

/// The sampling fields, each of its type.
pub(crate) fn sampling_patch(
    fields: &Fields<'_>,
    logprobs: Option<u32>,
) -> Result<SamplingPatch, ApiError> {
    // Read as f64, so that a number beyond f32 is out of range and not of a wrong type.
    let number = |name| -> Result<Option<f32>, ApiError> {
        Ok(fields
            .read::<f64>(name, "a number")?
            .map(|value| value as f32))
    };
    Ok(SamplingPatch {
        max_tokens: fields.read("max_tokens", "a positive integer")?,
        temperature: number("temperature")?,
        top_p: number("top_p")?,
        top_k: top_k(fields)?,
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
        presence_penalty: number("presence_penalty")?,
        frequency_penalty: number("frequency_penalty")?,
        seed: seed(fields)?,
        stop_token_ids: fields
            .read("stop_token_ids", "a list of token ids")?
            .unwrap_or_default(),
        ignore_eos: fields.switch("ignore_eos")?,
        logprobs,
        logit_bias: fields
            .raw("logit_bias")
            .map(logit_bias)
            .transpose()?
            .unwrap_or_default(),
    })
}

/// -1 means all to vLLM and `SGLang`, 0 to us and to llama.cpp: both are taken.
fn top_k(fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let expected = "a positive integer, or 0 or -1 for all";
    match fields.read::<i64>("top_k", expected)? {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(count) => count
            .try_into()
            .map(Some)
            .map_err(|_| wrong_type("top_k", expected)),
    }
}

/// Any 64-bit integer; a negative one is taken by its bits, so that equal seeds stay equal.
fn seed(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    let Some(raw) = fields.raw("seed") else {
        return Ok(None);
    };
    match read::<i64>(raw, "seed", "an integer") {
        Ok(seed) => Ok(Some(seed as u64)),
        Err(_) => read(raw, "seed", "an integer of 64 bits").map(Some),
    }
}

/// The stop strings, of which there may be one or a list.
pub(crate) fn stop_strings(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let Some(raw) = fields.raw("stop") else {
        return Ok(Vec::new());
    };
    let expected = "a string or a list of strings";
    if raw.get().starts_with('[') {
        return read(raw, "stop", expected);
    }
    Ok(vec![read(raw, "stop", expected)?])
}

/// OpenAI's map from token ids, written as strings, to biases.
fn logit_bias(raw: &RawValue) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let expected = "an object from token ids to numbers";
    let map: serde_json::Map<String, serde_json::Value> = read(raw, "logit_bias", expected)?;
    map.iter()
        .map(|(key, value)| Some((key.parse().ok()?, value.as_f64()? as f32)))
        .collect::<Option<_>>()
        .ok_or_else(|| wrong_type("logit_bias", expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<(GenerateInput, OutputOptions), ApiError> {
        let fields = Fields::parse(body.as_bytes())?;
        let input = generate_input(&fields, Prompt::Text("x".to_owned()), None)?;
        Ok((input, OutputOptions::parse(&fields)?))
    }

    #[test]
    fn every_field_arrives() {
        let (input, options) = parse(
            r#"{"model": "m", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4,
                "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
                "frequency_penalty": -0.3, "seed": -1, "stop": ["a", "b"], "stop_token_ids": [7],
                "ignore_eos": true, "logit_bias": {"5": -100, "6": 0.5}, "n": 2, "cache_salt": "s",
                "stream": true, "stream_options": {"include_usage": true},
                "return_token_ids": true, "user": "ignored", "a newer field": {}}"#,
        )
        .unwrap();
        let sampling = "SamplingPatch { max_tokens: Some(3), temperature: Some(0.5), \
            top_p: Some(0.9), top_k: Some(4), min_p: Some(0.1), repetition_penalty: Some(1.1), \
            presence_penalty: Some(0.2), frequency_penalty: Some(-0.3), \
            seed: Some(18446744073709551615), stop_token_ids: [7], ignore_eos: true, \
            logprobs: None, logit_bias: [(5, -100.0), (6, 0.5)] }";
        assert_eq!(format!("{:?}", input.sampling), sampling);
        assert_eq!((input.model.as_str(), input.n), ("m", 2));
        assert_eq!(input.stop, ["a", "b"]);
        assert_eq!(input.cache_salt, "s");
        let expected = OutputOptions {
            stream: true,
            include_usage: true,
            return_token_ids: true,
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn spellings_of_the_same_are_the_same() {
        let input = |body: &str| parse(&format!(r#"{{"model": "m", {body}}}"#)).unwrap().0;
        assert_eq!(input(r#""stop": "a""#).stop, ["a"]);
        assert_eq!(input(r#""top_k": -1"#).sampling.top_k, Some(0));
        assert_eq!(
            input(r#""seed": 18446744073709551615"#).sampling.seed,
            Some(u64::MAX)
        );
        assert_eq!(input(r#""temperature": 1"#).sampling.temperature, Some(1.0));
        let nulls = input(r#""temperature": null, "stop": null, "seed": null, "n": null"#);
        assert_eq!(
            (nulls.n, nulls.sampling.seed, nulls.stop.len()),
            (1, None, 0)
        );
    }

    #[test]
    fn a_wrong_type_names_its_field_and_never_its_value() {
        let cases = [
            (r#""max_tokens": "secret""#, "max_tokens"),
            (r#""max_tokens": true"#, "max_tokens"),
            (r#""max_tokens": -1"#, "max_tokens"),
            (r#""max_tokens": 1.5"#, "max_tokens"),
            (r#""max_tokens": 4294967296"#, "max_tokens"),
            (r#""temperature": "secret""#, "temperature"),
            (r#""temperature": [0.5]"#, "temperature"),
            (r#""temperature": 1e999"#, "temperature"),
            (r#""top_k": -2"#, "top_k"),
            (r#""seed": 1.5"#, "seed"),
            (r#""seed": 18446744073709551616"#, "seed"),
            (r#""stop": 7"#, "stop"),
            (r#""stop": ["a", 7]"#, "stop"),
            (r#""stop": "\ud800""#, "stop"),
            (r#""stop_token_ids": "secret""#, "stop_token_ids"),
            (r#""stop_token_ids": [-1]"#, "stop_token_ids"),
            (r#""ignore_eos": "yes""#, "ignore_eos"),
            (r#""logit_bias": []"#, "logit_bias"),
            (r#""logit_bias": {"secret": 1}"#, "logit_bias"),
            (r#""logit_bias": {"5": "secret"}"#, "logit_bias"),
            (r#""n": "2""#, "n"),
            (r#""n": 0"#, "n"),
            (r#""stream": "yes""#, "stream"),
            (r#""stream": 1"#, "stream"),
            (
                r#""stream_options": {"include_usage": true}"#,
                "stream_options",
            ),
            (r#""stream": true, "stream_options": 1"#, "stream_options"),
            (
                r#""stream": true, "stream_options": {"include_usage": "secret"}"#,
                "stream_options.include_usage",
            ),
            (r#""cache_salt": 5"#, "cache_salt"),
            (r#""return_token_ids": "secret""#, "return_token_ids"),
        ];
        for (body, field) in cases {
            let error = parse(&format!(r#"{{"model": "m", {body}}}"#)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field), "{body}");
            assert_eq!(
                error.code,
                orchestra_core::ErrorCode::InvalidRequest,
                "{body}"
            );
            assert!(
                !error.message.contains("secret"),
                "{body}: {}",
                error.message
            );
        }
        for (body, message) in [
            ("{}", "model is required"),
            (r#"{"model": null}"#, "model is required"),
            (r#"{"model": 5}"#, "model must be a string"),
        ] {
            let error = parse(body).unwrap_err();
            assert_eq!(
                (error.message.as_str(), error.param.as_deref()),
                (message, Some("model"))
            );
        }
    }
}
