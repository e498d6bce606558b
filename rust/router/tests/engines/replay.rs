//! Streams that break in the middle: another engine continues them, and the client sees one stream.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Answer, Call, Client, Engine, MODEL, chat, chunk, config, delta, eventually, num_up, post,
    start, within,
};

/// How a stream breaks.
#[derive(Clone, Copy, Debug)]
enum Break {
    Reset,
    Fin,
    Garbage,
    HalfEvent,
    ErrorEvent,
    EarlyDone,
    BadChunk,
    Stall,
}

const BREAKS: [Break; 8] = [
    Break::Reset,
    Break::Fin,
    Break::Garbage,
    Break::HalfEvent,
    Break::ErrorEvent,
    Break::EarlyDone,
    Break::BadChunk,
    Break::Stall,
];

impl Break {
    async fn strike(self, mut call: Call) {
        match self {
            Self::Reset => call.reset(),
            Self::Fin => drop(call),
            Self::Garbage => call.event("{\"choices\": [}").await,
            Self::HalfEvent => call.write(chunk("data: {\"choices\": [{\"ind")).await,
            Self::ErrorEvent => {
                let dead = "{\"error\": {\"message\": \"dead\", \"code\": 500}}";
                call.event(dead).await;
            }
            Self::EarlyDone => call.event("[DONE]").await,
            Self::BadChunk => call.write("zz\r\nnot a chunk").await,
            Self::Stall => call.gone().await,
        }
    }
}

/// Two engines and a chat that one of them has begun with "one " and "two ".
async fn begun(
    config: orchestra_router::RouterConfig,
    fields: &str,
) -> (Client, Call, Engine, Engine, orchestra_router::Router) {
    let (mut a, mut b) = (Engine::start().await, Engine::start().await);
    let (router, address) = start(config, &[&a, &b]).await;
    let mut client = Client::send(address, chat(&format!(", \"stream\": true{fields}"))).await;
    let (mut call, this, other) = tokio::select! {
        call = a.call() => (call, a, b),
        call = b.call() => (call, b, a),
    };
    call.begin_stream().await;
    let role = json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": MODEL,
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}],
    });
    call.event(&role.to_string()).await;
    call.say("one ").await;
    call.say("two ").await;
    client.wait_for("two ").await;
    (client, call, this, other, router)
}

/// Everything that must be alike in each event of one answer.
fn names(answer: &Answer) -> Vec<(Value, Value, Value)> {
    let events = answer.events();
    let pieces = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let mut names: Vec<_> = pieces
        .map(|piece| {
            (
                piece["id"].clone(),
                piece["created"].clone(),
                piece["model"].clone(),
            )
        })
        .collect();
    names.dedup();
    names
}

#[tokio::test]
async fn a_broken_stream_is_continued_elsewhere() {
    for broken in BREAKS {
        let mut config = config();
        config.engines.engine_stall_timeout.0 = Duration::from_millis(500);
        let (client, call, _this, mut other, _router) = begun(config, ", \"max_tokens\": 10").await;
        broken.strike(call).await;
        let mut call = other.call().await;
        let body = call.json();
        assert_eq!(
            body["messages"][1],
            json!({"role": "assistant", "content": "one two "}),
            "{broken:?}"
        );
        assert_eq!(body["continue_final_message"], true);
        assert_eq!(body["add_generation_prompt"], false);
        assert_eq!(body["max_tokens"], 8);
        call.begin_stream().await;
        let role = json!({"id": "other", "created": 9, "model": MODEL,
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]});
        call.event(&role.to_string()).await;
        call.say("three ").await;
        call.say("four").await;
        call.finish_stream().await;
        let answer = client.answer().await;
        assert_eq!(
            answer.text(),
            ("one two three four".to_owned(), true),
            "{broken:?}: {answer:?}"
        );
        assert_eq!(
            names(&answer),
            [(json!("chatcmpl-1"), json!(1_700_000_000), json!(MODEL))]
        );
        assert_eq!(answer.body.matches("\"role\"").count(), 1, "{answer:?}");
        assert_eq!(answer.body.matches("[DONE]").count(), 1);
    }
}

#[tokio::test]
async fn an_answer_may_break_more_than_once() {
    let (client, call, mut this, mut other, _router) = begun(config(), "").await;
    call.reset();
    let mut call = other.call().await;
    call.begin_stream().await;
    call.say("three ").await;
    drop(call);
    // The first engine is well again.
    let call = this.call().await;
    assert_eq!(call.json()["messages"][1]["content"], "one two three ");
    call.stream(&["four"]).await;
    assert_eq!(
        client.answer().await.text(),
        ("one two three four".to_owned(), true)
    );
}

#[tokio::test]
async fn several_tokens_in_one_event_are_counted() {
    let (mut client, mut call, _this, mut other, _router) =
        begun(config(), ", \"max_tokens\": 10").await;
    call.say("three four five ").await;
    client.wait_for("five ").await;
    call.reset();
    let call = other.call().await;
    assert_eq!(call.json()["max_tokens"], 5);
    call.stream(&["six"]).await;
    let answer = client.answer().await;
    assert_eq!(
        answer.text(),
        ("one two three four five six".to_owned(), true)
    );
}

#[tokio::test]
async fn usage_is_that_of_the_whole_answer() {
    let fields = ", \"stream_options\": {\"include_usage\": true}";
    let (client, call, _this, mut other, _router) = begun(config(), fields).await;
    call.reset();
    let mut call = other.call().await;
    call.begin_stream().await;
    call.say("three").await;
    call.event(&delta(0, "", Some("stop"))).await;
    let usage = json!({"id": "x", "choices": [], "usage": {"prompt_tokens": 22, "completion_tokens": 3, "total_tokens": 25}});
    call.event(&usage.to_string()).await;
    call.event("[DONE]").await;
    let answer = client.answer().await;
    let events = answer.events();
    let usage: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    let expected = json!({"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25});
    assert_eq!(usage["usage"], expected, "{answer:?}");
}

#[tokio::test]
async fn a_missing_end_is_added_once_every_choice_has_ended() {
    for with_reset in [false, true] {
        let (client, mut call, _this, mut other, _router) = begun(config(), "").await;
        call.event(&delta(0, "", Some("stop"))).await;
        if with_reset {
            tokio::time::sleep(Duration::from_millis(50)).await;
            call.reset();
        } else {
            drop(call);
        }
        let answer = client.answer().await;
        assert_eq!(answer.text(), ("one two ".to_owned(), true), "{answer:?}");
        assert!(other.is_idle());
    }
}

#[tokio::test]
async fn an_answer_that_broke_at_its_last_token_is_over() {
    let (client, call, _this, mut other, _router) = begun(config(), ", \"max_tokens\": 2").await;
    call.reset();
    let answer = client.answer().await;
    assert_eq!(answer.text(), ("one two ".to_owned(), true));
    assert!(
        answer.body.contains("\"finish_reason\":\"length\""),
        "{answer:?}"
    );
    assert!(other.is_idle());
}

#[tokio::test]
async fn a_stop_string_is_whole_also_where_the_parts_meet() {
    let (client, call, _this, mut other, _router) =
        begun(config(), ", \"stop\": [\"two three\"]").await;
    call.reset();
    let mut call = other.call().await;
    call.begin_stream().await;
    call.say("three four").await;
    let answer = client.answer().await;
    assert_eq!(answer.text(), ("one two ".to_owned(), true), "{answer:?}");
    assert!(answer.body.contains("\"finish_reason\":\"stop\""));
    // Nobody wants the rest.
    call.gone().await;
}

#[tokio::test]
async fn what_cannot_be_continued_ends_with_an_error_event() {
    for fields in [
        ", \"n\": 2",
        ", \"response_format\": {\"type\": \"json_object\"}",
    ] {
        let (client, call, _this, mut other, _router) = begun(config(), fields).await;
        call.reset();
        let answer = client.answer().await;
        let events = answer.events();
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "worker_failed", "{answer:?}");
        assert!(!answer.body.contains("[DONE]"));
        assert!(answer.text().0 == "one two ");
        assert!(other.is_idle());
    }
}

#[tokio::test]
async fn an_engine_without_the_means_is_passed_over() {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let (mut a, b) = (
        Engine::start().await,
        Engine::start_at(any, MODEL, "somebody").await,
    );
    let mut b = b;
    let (_router, address) = start(config(), &[&a, &b]).await;
    loop {
        let mut client = Client::send(address, chat(", \"stream\": true")).await;
        let (mut call, is_a) = tokio::select! {
            call = a.call() => (call, true),
            call = b.call() => (call, false),
        };
        if !is_a {
            call.stream(&["x"]).await;
            client.answer().await;
            continue;
        }
        call.begin_stream().await;
        call.say("one").await;
        client.wait_for("one").await;
        call.reset();
        let answer = client.answer().await;
        assert!(answer.body.contains("worker_failed"), "{answer:?}");
        assert!(b.is_idle());
        return;
    }
}

#[tokio::test]
async fn completions_are_continued_by_text() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let body = format!(
        "{{\"model\": \"{MODEL}\", \"prompt\": \"Once \", \"stream\": true, \"max_tokens\": 9}}"
    );
    let mut client = Client::send(address, post("/v1/completions", &body)).await;
    let wrote = |text: &str, reason: Option<&str>| {
        json!({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL,
            "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]})
        .to_string()
    };
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.event(&wrote("upon ", None)).await;
    client.wait_for("upon ").await;
    call.reset();
    // There is no other engine, and this one is still there.
    let mut call = engine.call().await;
    assert_eq!(call.json()["prompt"], "Once upon ");
    assert_eq!(call.json()["max_tokens"], 8);
    call.begin_stream().await;
    call.event(&wrote("a time", Some("length"))).await;
    call.event("[DONE]").await;
    assert_eq!(
        client.answer().await.text(),
        ("upon a time".to_owned(), true)
    );
}

#[tokio::test]
async fn a_stream_waits_for_an_engine_to_come_back() {
    let mut engine = Engine::start().await;
    let (router, address) = start(config(), &[&engine]).await;
    let mut client = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    client.wait_for("one ").await;
    let at = engine.stop().await;
    call.reset();
    eventually("down", || {
        let is_down = num_up(&router) == 0;
        async move { is_down }
    })
    .await;
    let mut engine = Engine::start_at(at, MODEL, "vllm").await;
    engine.call().await.stream(&["two"]).await;
    assert_eq!(client.answer().await.text(), ("one two".to_owned(), true));
}

#[tokio::test]
async fn a_removed_engine_s_streams_go_elsewhere() {
    let (client, call, this, mut other, router) = begun(config(), "").await;
    router
        .state()
        .remove_engine(&this.url().parse().unwrap())
        .unwrap();
    call.gone().await;
    other.call().await.stream(&["three"]).await;
    assert_eq!(
        client.answer().await.text(),
        ("one two three".to_owned(), true)
    );
}

#[tokio::test]
async fn shutdown_ends_streams_with_an_error_event() {
    let mut config = config();
    config.listen.drain_timeout.0 = Duration::ZERO;
    let (client, call, _this, _other, router) = begun(config, "").await;
    let stopping = within("stop", router.stop(std::future::pending()));
    let (answer, ()) = tokio::join!(client.answer(), stopping);
    assert!(answer.body.contains("shutting_down"), "{answer:?}");
    assert!(!answer.body.contains("[DONE]"));
    call.gone().await;
}

#[tokio::test]
async fn a_slow_answer_is_kept_open_by_comments() {
    let mut engine = Engine::start().await;
    let mut config = config();
    config.listen.sse_keep_alive.0 = Duration::from_millis(50);
    let (_router, address) = start(config, &[&engine]).await;
    let mut client = Client::send(address, chat(", \"stream\": true")).await;
    let call = engine.call().await;
    client.wait_for(": keep-alive\n\n").await;
    // What fails now is still another attempt, and no longer another status.
    call.reset();
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one").await;
    client.wait_for("one").await;
    call.finish_stream().await;
    assert_eq!(client.answer().await.text(), ("one".to_owned(), true));
}
