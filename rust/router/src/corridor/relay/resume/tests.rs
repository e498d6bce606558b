use std::sync::Arc;

use axum::http::HeaderMap;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    corridor::relay::read::{Outward, read},
    metrics::Metrics,
    models::ForeignModel,
};

/// A request, and what was sent of its answer.
fn resumption(route: Route, body: &Value, events: &[Value]) -> Option<Resumption> {
    let body = Bytes::from(body.to_string());
    let model = Arc::new(ForeignModel {
        name: "m".to_owned(),
        text: std::sync::OnceLock::new(),
    });
    let fields = Fields::parse(&body).unwrap();
    let outward = Outward::of(&HeaderMap::new());
    let request = Arc::new(read(route, outward, model, &body, &fields).unwrap());
    let mut memory = Memory::new(request.checked.num_choices);
    for event in events {
        memory
            .take(event.to_string().as_bytes(), &Metrics::new())
            .unwrap();
    }
    Resumption::new(&request, &memory)
}

fn config(replay: ReplayMeans) -> EngineConfig {
    EngineConfig {
        replay,
        ..EngineConfig::new("http://a:1".parse().unwrap())
    }
}

fn body(resumption: &Resumption, replay: ReplayMeans, kind: EngineKind) -> Option<Value> {
    let body = resumption.body(&config(replay), kind)?;
    Some(serde_json::from_slice(&body).unwrap())
}

fn said(text: &str) -> Value {
    json!({"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]})
}

fn wrote(text: &str) -> Value {
    json!({"id": "x", "choices": [{"index": 0, "text": text}]})
}

fn chat(extra: &Value) -> Value {
    let mut body =
        json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

fn completion(extra: &Value) -> Value {
    let mut body = json!({"model": "m", "stream": true, "prompt": "Once "});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn each_kind_of_engine_gets_what_it_understands() {
    let given = chat(&json!({"max_tokens": 10, "temperature": 0.5}));
    let resumption = resumption(Route::Chat, &given, &[said("a "), said("b")]).unwrap();
    let messages =
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}]);
    for kind in [EngineKind::Vllm, EngineKind::Sglang] {
        let body = body(&resumption, ReplayMeans::Auto, kind).unwrap();
        assert_eq!(
            body,
            json!({
                "model": "m", "stream": true, "max_tokens": 8, "temperature": 0.5, "messages": messages,
                "add_generation_prompt": false, "continue_final_message": true,
            })
        );
    }
    let prefilled = body(&resumption, ReplayMeans::Auto, EngineKind::LlamaCpp).unwrap();
    assert_eq!(prefilled["messages"], messages);
    assert!(prefilled.get("continue_final_message").is_none());
    for kind in [EngineKind::Tgi, EngineKind::Unknown] {
        assert_eq!(body(&resumption, ReplayMeans::Auto, kind), None);
        assert!(body(&resumption, ReplayMeans::ContinueFinalMessage, kind).is_some());
    }
    assert_eq!(body(&resumption, ReplayMeans::None, EngineKind::Vllm), None);
}

#[test]
fn a_message_that_the_client_began_is_continued() {
    let messages = json!([{"role": "assistant", "content": "well, ", "name": "n"}]);
    let given = chat(&json!({
        "messages": messages, "continue_final_message": true, "add_generation_prompt": false,
    }));
    let begun = resumption(Route::Chat, &given, &[said("yes")]).unwrap();
    let expected = json!([{"role": "assistant", "content": "well, yes", "name": "n"}]);
    let got = body(&begun, ReplayMeans::Auto, EngineKind::Vllm).unwrap();
    assert_eq!(got["messages"], expected);
    // Without the flag, a last message of the assistant is over, but not for llama.cpp.
    let over = resumption(
        Route::Chat,
        &chat(&json!({"messages": messages})),
        &[said("yes")],
    )
    .unwrap();
    let got = body(&over, ReplayMeans::Auto, EngineKind::Vllm).unwrap();
    assert_eq!(got["messages"].as_array().unwrap().len(), 2);
    let got = body(&over, ReplayMeans::Auto, EngineKind::LlamaCpp).unwrap();
    assert_eq!(got["messages"], expected);
}

#[test]
fn completions_go_on_from_their_text_or_their_token_ids() {
    let text = resumption(
        Route::Completions,
        &completion(&json!({})),
        &[wrote("upon"), wrote(" a")],
    )
    .unwrap();
    for kind in [EngineKind::Vllm, EngineKind::Unknown] {
        let got = body(&text, ReplayMeans::Auto, kind).unwrap();
        assert_eq!(
            (&got["prompt"], &got["max_tokens"]),
            (&json!("Once upon a"), &json!(14))
        );
    }
    // llama.cpp sets no limit of its own.
    let got = body(&text, ReplayMeans::Auto, EngineKind::LlamaCpp).unwrap();
    assert!(got.get("max_tokens").is_none());
    assert_eq!(body(&text, ReplayMeans::TokenIds, EngineKind::Vllm), None);

    let ids = completion(&json!({"prompt": [1, 2], "max_tokens": 9}));
    let event = json!({"choices": [{"index": 0, "text": "x", "token_ids": [3, 4]}]});
    let known = resumption(Route::Completions, &ids, &[event]).unwrap();
    let got = body(&known, ReplayMeans::Auto, EngineKind::Vllm).unwrap();
    assert_eq!(
        (&got["prompt"], &got["max_tokens"]),
        (&json!([1, 2, 3, 4]), &json!(7))
    );
    let unknown = resumption(Route::Completions, &ids, &[wrote("x")]).unwrap();
    assert_eq!(body(&unknown, ReplayMeans::Auto, EngineKind::Vllm), None);

    let list = completion(&json!({"prompt": ["Once "]}));
    let one = resumption(Route::Completions, &list, &[wrote("more")]).unwrap();
    assert_eq!(
        body(&one, ReplayMeans::Auto, EngineKind::Vllm).unwrap()["prompt"],
        json!(["Once more"])
    );
}

#[test]
fn what_cannot_be_continued_truthfully_is_not() {
    for extra in [
        json!({"response_format": {"type": "json_object"}}),
        json!({"guided_regex": "a+"}),
        json!({"n": 2}),
    ] {
        assert!(
            resumption(Route::Chat, &chat(&extra), &[said("a")]).is_none(),
            "{extra}"
        );
    }
    let fine = json!({"response_format": {"type": "text"}, "use_beam_search": false});
    assert!(resumption(Route::Chat, &chat(&fine), &[said("a")]).is_some());
    for extra in [
        json!({"echo": true}),
        json!({"best_of": 2}),
        json!({"prompt": ["a", "b"]}),
    ] {
        assert!(
            resumption(Route::Completions, &completion(&extra), &[wrote("a")]).is_none(),
            "{extra}"
        );
    }
    for delta in [
        json!({"tool_calls": [{"index": 0}]}),
        json!({"reasoning_content": "hm"}),
        json!({"reasoning": "hm"}),
        json!({"refusal": "no"}),
    ] {
        let event = json!({"choices": [{"index": 0, "delta": delta}]});
        assert!(
            resumption(Route::Chat, &chat(&json!({})), &[event]).is_none(),
            "{delta}"
        );
    }
    let event = json!({"choices": [{"index": 0, "text": "a", "logprobs": {"text_offset": [0]}}]});
    assert!(resumption(Route::Completions, &completion(&json!({})), &[event]).is_none());
}

#[test]
fn limits_shrink_by_what_came() {
    let given = chat(&json!({"max_completion_tokens": 5, "max_tokens": 9, "min_tokens": 2}));
    let resumption = resumption(
        Route::Chat,
        &given,
        &[said("a"), said(""), said("b"), said("c")],
    )
    .unwrap();
    assert_eq!(resumption.tokens_left(EngineKind::Vllm), Some(2));
    let got = body(&resumption, ReplayMeans::Auto, EngineKind::Vllm).unwrap();
    let limits =
        ["max_completion_tokens", "max_tokens", "min_tokens"].map(|name| got[name].clone());
    assert_eq!(limits, [json!(2), json!(6), json!(0)]);
}

proptest! {
    /// Whatever text was sent, it is in the next body as it was.
    #[test]
    fn text_arrives_as_it_was_sent(pieces in proptest::collection::vec(".{0,20}", 1..5)) {
        let events: Vec<_> = pieces.iter().map(|piece| said(piece)).collect();
        let resumption = resumption(Route::Chat, &chat(&json!({})), &events).unwrap();
        let got = body(&resumption, ReplayMeans::Auto, EngineKind::Vllm).unwrap();
        prop_assert_eq!(got["messages"][1]["content"].as_str().unwrap(), pieces.concat());
    }
}
