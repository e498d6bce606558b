//! Wire types to ours and back.

use std::time::Duration;

use orchestra_core::{TokenId, step};
use orchestra_proto::v1::{self, generate_request};
use serde_json::{Value, json};

use crate::{
    caller::Caller,
    error::ApiError,
    observe::Record,
    request::{Chunk, Finish, GenerateInput, Prompt, SamplingPatch},
};

/// What a client asks, in the corridor's words. Ranges are the corridor's affair.
pub(super) fn generate_input(request: v1::GenerateRequest) -> Result<GenerateInput, ApiError> {
    let required = |field| ApiError::invalid(field, format!("{field} is required"));
    if request.model.is_empty() {
        return Err(required("model"));
    }
    Ok(GenerateInput {
        model: request.model,
        prompt: prompt(request.prompt.ok_or_else(|| required("prompt"))?)?,
        sampling: request.sampling.map(sampling_patch).unwrap_or_default(),
        stop: request.stop,
        n: request.n.max(1),
        timeout: (request.timeout_ms > 0)
            .then(|| Duration::from_millis(u64::from(request.timeout_ms))),
        cache_salt: request.cache_salt,
        // From the metadata.
        caller: Caller::default(),
        record: Record::default(),
    })
}

fn prompt(prompt: generate_request::Prompt) -> Result<Prompt, ApiError> {
    let empty = |field: &str| ApiError::invalid(field, format!("{field} must not be empty"));
    match prompt {
        generate_request::Prompt::Text(text) if text.is_empty() => Err(empty("text")),
        generate_request::Prompt::Text(text) => Ok(Prompt::Text(text)),
        generate_request::Prompt::TokenIds(list) if list.ids.is_empty() => Err(empty("token_ids")),
        generate_request::Prompt::TokenIds(list) => Ok(Prompt::TokenIds(list.ids)),
        generate_request::Prompt::Chat(chat) => {
            if chat.messages.is_empty() {
                return Err(empty("chat.messages"));
            }
            if let Some(index) = chat
                .messages
                .iter()
                .position(|message| message.role.is_empty())
            {
                return Err(empty(&format!("chat.messages[{index}].role")));
            }
            let as_object = |message: v1::ChatMessage| -> Value {
                json!({"role": message.role, "content": message.content})
            };
            Ok(Prompt::Chat {
                messages: chat.messages.into_iter().map(as_object).collect(),
                tools: Vec::new(),
                template_kwargs: serde_json::Map::new(),
            })
        }
    }
}

fn sampling_patch(sampling: v1::SamplingParams) -> SamplingPatch {
    let logit_bias = sampling
        .logit_bias
        .iter()
        .map(|entry| (entry.token_id, entry.bias));
    SamplingPatch {
        max_tokens: sampling.max_tokens,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
        logit_bias: logit_bias.collect(),
        stop_token_ids: sampling.stop_token_ids,
        ignore_eos: sampling.ignore_eos,
        logprobs: sampling.logprobs,
    }
}

/// A piece as the wire has it.
pub(super) fn generate_response(chunk: Chunk, prompt_tokens: u32) -> v1::GenerateResponse {
    let token_ids = chunk.token_ids.iter();
    let logprobs = token_ids
        .zip(&chunk.logprobs)
        .map(|(&id, logprobs)| token_logprobs(id, logprobs));
    v1::GenerateResponse {
        index: chunk.index,
        logprobs: logprobs.collect(),
        text: chunk.text,
        token_ids: chunk.token_ids,
        finish: chunk.finish.map(|end| finish(end, prompt_tokens)),
    }
}

fn token_logprobs(token_id: TokenId, logprobs: &step::TokenLogprobs) -> v1::TokenLogprobs {
    let entry = |token_id, logprob| v1::TokenLogprob { token_id, logprob };
    v1::TokenLogprobs {
        chosen: Some(entry(token_id, logprobs.chosen)),
        top: logprobs
            .top
            .iter()
            .map(|&(id, logprob)| entry(id, logprob))
            .collect(),
    }
}

fn finish(end: Finish, prompt_tokens: u32) -> v1::Finish {
    let reason = match end.reason {
        step::FinishReason::Stop => v1::FinishReason::Stop,
        step::FinishReason::Length => v1::FinishReason::Length,
        step::FinishReason::Abort => v1::FinishReason::Abort,
        step::FinishReason::Error => v1::FinishReason::Error,
    };
    v1::Finish {
        reason: reason.into(),
        usage: Some(v1::Usage {
            prompt_tokens,
            completion_tokens: end.completion_tokens,
            cached_tokens: end.cached_tokens,
        }),
        stop_string: end.stop_string,
    }
}

/// The `grpc-timeout` that clients send for their deadline: up to eight digits and a unit. What cannot be read is
/// no deadline: the client keeps its own.
pub(super) fn grpc_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt: generate_request::Prompt) -> v1::GenerateRequest {
        v1::GenerateRequest {
            model: "m".into(),
            prompt: Some(prompt),
            ..Default::default()
        }
    }

    #[test]
    fn bad_input_names_its_field() {
        use generate_request::Prompt::{Chat, Text, TokenIds};
        let message = v1::ChatMessage::default();
        let cases = [
            (v1::GenerateRequest::default(), "model"),
            (
                v1::GenerateRequest {
                    model: "m".into(),
                    ..Default::default()
                },
                "prompt",
            ),
            (request(Text(String::new())), "text"),
            (request(TokenIds(v1::TokenIds::default())), "token_ids"),
            (request(Chat(v1::ChatMessages::default())), "chat.messages"),
            (
                request(Chat(v1::ChatMessages {
                    messages: vec![message],
                })),
                "chat.messages[0].role",
            ),
        ];
        for (request, field) in cases {
            assert_eq!(
                generate_input(request).unwrap_err().param.as_deref(),
                Some(field)
            );
        }
    }

    #[test]
    fn absent_fields_take_their_defaults() {
        let input = generate_input(request(generate_request::Prompt::Text("x".into()))).unwrap();
        assert_eq!((input.n, input.timeout), (1, None));
        assert_eq!(input.sampling.temperature, None);
    }

    #[test]
    fn every_sampling_field_arrives() {
        let sampling = v1::SamplingParams {
            max_tokens: Some(1),
            temperature: Some(0.5),
            top_p: Some(0.6),
            top_k: Some(2),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(0.2),
            frequency_penalty: Some(0.3),
            seed: Some(3),
            stop_token_ids: vec![4],
            ignore_eos: true,
            logprobs: Some(5),
            logit_bias: vec![v1::LogitBias {
                token_id: 6,
                bias: 7.0,
            }],
        };
        let patch = sampling_patch(sampling);
        let expected = "SamplingPatch { max_tokens: Some(1), temperature: Some(0.5), top_p: Some(0.6), \
            top_k: Some(2), min_p: Some(0.1), repetition_penalty: Some(1.1), \
            presence_penalty: Some(0.2), frequency_penalty: Some(0.3), seed: Some(3), \
            stop_token_ids: [4], ignore_eos: true, logprobs: Some(5), logit_bias: [(6, 7.0)] }";
        assert_eq!(format!("{patch:?}"), expected);
    }

    #[test]
    fn a_piece_keeps_its_parts() {
        let logprobs = step::TokenLogprobs {
            chosen: -1.0,
            top: vec![(8, -0.5)],
        };
        let finish = Finish {
            reason: step::FinishReason::Stop,
            stop_string: Some("end".into()),
            completion_tokens: 2,
            cached_tokens: 16,
        };
        let chunk = Chunk {
            index: 3,
            text: "x".into(),
            token_ids: vec![9],
            logprobs: vec![logprobs],
            finish: Some(finish),
        };
        let response = generate_response(chunk, 20);
        assert_eq!((response.index, response.text.as_str()), (3, "x"));
        assert_eq!(
            response.logprobs[0].chosen,
            Some(v1::TokenLogprob {
                token_id: 9,
                logprob: -1.0
            })
        );
        assert_eq!(
            response.logprobs[0].top,
            [v1::TokenLogprob {
                token_id: 8,
                logprob: -0.5
            }]
        );
        let finish = response.finish.unwrap();
        assert_eq!(finish.reason(), v1::FinishReason::Stop);
        let usage = v1::Usage {
            prompt_tokens: 20,
            completion_tokens: 2,
            cached_tokens: 16,
        };
        assert_eq!(
            (finish.usage, finish.stop_string.as_deref()),
            (Some(usage), Some("end"))
        );
    }

    #[test]
    fn deadlines_are_read() {
        assert_eq!(grpc_timeout("2500m"), Some(Duration::from_millis(2500)));
        assert_eq!(
            grpc_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for odd in ["", "5", "m", "+5m", "-1S", "123456789S", "5x", "5é"] {
            assert_eq!(grpc_timeout(odd), None, "{odd}");
        }
    }
}
