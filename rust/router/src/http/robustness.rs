//! Whatever a client sends is read or refused: nothing panics, and no refusal repeats what was sent.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{chat::ChatRequest, completions::CompletionRequest};
use crate::error::ApiError;

/// Stands for whatever a client must not read back, or find in a log.
const SECRET: &str = "correct horse";

/// Fields that both or either route know, and one that none does.
const FIELDS: [&str; 26] = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "stop_token_ids",
    "ignore_eos",
    "return_token_ids",
    "cache_salt",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "best_of",
    "response_format",
    "unknown",
];

fn any_json() -> impl Strategy<Value = Value> {
    let key = prop::sample::select(&[
        "role",
        "content",
        "type",
        "text",
        "include_usage",
        "7",
        SECRET,
    ]);
    let text = prop::sample::select(&["user", "text", "none", "auto", "", "\u{0}", SECRET]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0..5).prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..4).prop_map(|entries| {
                let entries = entries
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value));
                Value::Object(entries.collect())
            }),
        ]
    })
}

/// A good request of either route, with some fields replaced.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let replaced = prop::collection::vec((prop::sample::select(&FIELDS), any_json()), 0..4);
    replaced.prop_map(|replaced| {
        let mut body = Map::new();
        body.insert("model".to_owned(), json!("m"));
        body.insert(
            "messages".to_owned(),
            json!([{"role": "user", "content": SECRET}]),
        );
        body.insert("prompt".to_owned(), json!(SECRET));
        body.extend(
            replaced
                .into_iter()
                .map(|(field, value)| (field.to_owned(), value)),
        );
        Value::Object(body).to_string().into_bytes()
    })
}

fn errors(body: &[u8]) -> impl Iterator<Item = ApiError> {
    let (chat, completion) = (
        ChatRequest::parse(body).err(),
        CompletionRequest::parse(body).err(),
    );
    [chat, completion].into_iter().flatten()
}

proptest! {
    #[test]
    fn any_value_in_any_field(body in any_request()) {
        for error in errors(&body) {
            let said = format!("{} {:?}", error.message, error.param);
            prop_assert!(!said.contains(SECRET), "{said}");
            // The body is JSON, so what is wrong with it has a name.
            prop_assert!(error.param.is_some(), "{said}");
        }
    }

    #[test]
    fn any_bytes(body in prop::collection::vec(any::<u8>(), 0..64)) {
        prop_assert_eq!(errors(&body).count(), 2);
    }

    #[test]
    fn any_piece_of_a_request(body in any_request(), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(body.len());
        prop_assert_eq!(errors(&body[..cut]).count(), 2);
    }
}
