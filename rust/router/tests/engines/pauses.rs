//! Batch streams on engines give way to interactive requests and go on later.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use orchestra_router::{Router, RouterConfig, engines::EngineConfig};
use serde_json::{Value, json};
use tokio::time;

use crate::support::{
    Answer, Call, Client, Engine, MODEL, PATIENCE, chat, chunk, config, delta, eventually, get,
    num_up, post, start, within,
};

/// One request at a time.
fn one_seat() -> RouterConfig {
    let mut config = config();
    config.corridor.max_concurrent_requests = 1;
    config
}

/// A streamed chat of class `batch`.
fn batch(fields: &str) -> String {
    chat(&format!(
        ", \"stream\": true, \"service_tier\": \"flex\"{fields}"
    ))
}

/// A chat of class `interactive`.
fn urgent() -> String {
    chat(", \"service_tier\": \"priority\"")
}

/// A router with one engine and one seat, and a batch stream that has begun with "one " and "two ".
async fn begun(fields: &str) -> (Router, SocketAddr, Engine, Client, Call) {
    let mut engine = Engine::start().await;
    let (router, address) = start(one_seat(), &[&engine]).await;
    let mut client = Client::send(address, batch(fields)).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    call.say("two ").await;
    client.wait_for("two ").await;
    (router, address, engine, client, call)
}

async fn metric(address: SocketAddr, name: &str) -> Option<u64> {
    let metrics = get(address, "/metrics").await.body;
    let value = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok())
}

async fn is_paused(address: SocketAddr) -> bool {
    metric(address, "orchestra_requests_preempted_total").await == Some(1)
}

fn usage(completion_tokens: u32) -> String {
    json!({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": completion_tokens,
            "total_tokens": 9 + completion_tokens}})
    .to_string()
}

/// What the client was told that the answer cost.
fn usage_of(answer: &Answer) -> Value {
    let events = answer.events();
    let mut pieces = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok());
    pieces
        .find(|piece| piece["usage"].is_object())
        .map_or(Value::Null, |piece| piece["usage"].clone())
}

#[tokio::test]
async fn a_batch_stream_gives_way_and_goes_on_where_it_was() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("engines-pauses.log");
    // Of an earlier run; usually there is none.
    let _ = fs::remove_file(&path);
    let mut config = one_seat();
    config.observe.access_log = Some(path.display().to_string());
    let mut engine = Engine::start().await;
    let (router, address) = start(config, &[&engine]).await;
    let fields = ", \"max_tokens\": 10, \"stream_options\": {\"include_usage\": true}";
    let mut client = Client::send(address, batch(fields)).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    call.say("two ").await;
    client.wait_for("two ").await;

    let first = Client::send(address, urgent()).await;
    let other = engine.call().await;
    assert!(!other.body.contains("flex"), "{}", other.body);
    call.gone().await;
    eventually("the pause", || is_paused(address)).await;
    assert_eq!(metric(address, "orchestra_requests_running").await, Some(1));
    other.answer(200, "{}").await;
    assert_eq!(first.answer().await.status, 200);

    let mut call = engine.call().await;
    let body = call.json();
    let so_far = json!({"role": "assistant", "content": "one two "});
    assert_eq!(body["messages"][1], so_far);
    assert_eq!(body["continue_final_message"], true);
    assert_eq!(body["max_tokens"], 8);
    call.begin_stream().await;
    call.say("three").await;
    call.event(&delta(0, "", Some("stop"))).await;
    call.event(&usage(1)).await;
    call.event("[DONE]").await;
    let answer = client.answer().await;
    assert_eq!(answer.text(), ("one two three".to_owned(), true));
    let usage = usage_of(&answer);
    assert_eq!(usage["completion_tokens"], 3, "{answer:?}");

    for (name, count) in [
        ("orchestra_requests_resumed_total", 1),
        ("orchestra_requests_running", 0),
        ("orchestra_engine_attempts_total{outcome=\"stopped\"}", 1),
        ("orchestra_engine_attempts_total{outcome=\"answered\"}", 2),
        ("orchestra_engine_attempts_total{outcome=\"broken\"}", 0),
        (
            "orchestra_requests_replayed_total{outcome=\"continued\"}",
            0,
        ),
    ] {
        assert_eq!(metric(address, name).await, Some(count), "{name}");
    }
    let line = || {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let line = text.lines().find(|line| line.contains("\"batch\""))?;
        serde_json::from_str::<Value>(line).ok()
    };
    eventually("line of the access log", || async { line().is_some() }).await;
    let line = line().unwrap();
    let seen = ["pauses", "replays", "retries", "completion_tokens"].map(|key| line[key].clone());
    assert_eq!(seen, [json!(1), json!(0), json!(0), json!(3)], "{line}");
    let admin = router.addresses().admin;
    let decision = get(admin, "/admin/decisions/test-1").await.json();
    assert!(decision["pauses"].is_u64(), "{decision}");
}

#[tokio::test]
async fn room_on_an_engine_is_given_up_too() {
    let mut engine = Engine::start().await;
    let router = Router::start(&config()).unwrap();
    let address = router.addresses().http;
    let small = EngineConfig {
        max_num_seqs: 1,
        ..EngineConfig::new(engine.url().parse().unwrap())
    };
    router.state().add_engine(small).unwrap();
    eventually("up", || {
        let is_up = num_up(&router) == 1;
        async move { is_up }
    })
    .await;
    let mut client = Client::send(address, batch("")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    client.wait_for("one ").await;
    let first = Client::send(address, urgent()).await;
    let other = engine.call().await;
    call.gone().await;
    other.answer(200, "{}").await;
    first.answer().await;
    engine.call().await.stream(&["two"]).await;
    assert_eq!(client.answer().await.text(), ("one two".to_owned(), true));
}

#[tokio::test]
async fn what_has_not_begun_begins_anew() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(one_seat(), &[&engine]).await;
    let client = Client::send(address, batch("")).await;
    let mut call = engine.call().await;
    let body = call.body.clone();
    call.begin_stream().await;
    // Whether it comes before the head was read or after.
    let first = Client::send(address, urgent()).await;
    let other = engine.call().await;
    call.gone().await;
    other.answer(200, "{}").await;
    first.answer().await;
    let call = engine.call().await;
    assert_eq!(call.body, body);
    call.stream(&["one"]).await;
    assert_eq!(client.answer().await.text(), ("one".to_owned(), true));
}

#[tokio::test]
async fn a_client_that_reads_nothing_gives_way_too() {
    let (_router, address, mut engine, client, mut call) = begun("").await;
    // Comments go to the client and are no part of the answer.
    let comment = chunk(&format!(": {}\n\n", "x".repeat(64 << 10)));
    let mut num_written = 0;
    let writing = async {
        while time::timeout(Duration::from_secs(1), call.write(&comment))
            .await
            .is_ok()
        {
            num_written += 1;
            assert!(num_written < 1024, "64 MiB went somewhere");
        }
    };
    within("back-pressure", writing).await;
    let first = Client::send(address, urgent()).await;
    engine.call().await.answer(200, "{}").await;
    assert_eq!(first.answer().await.status, 200);
    // The client has read nothing yet.
    call.gone().await;
    let going_on = async { engine.call().await.stream(&["three"]).await };
    let (answer, ()) = tokio::join!(client.answer(), going_on);
    assert_eq!(answer.text(), ("one two three".to_owned(), true));
}

#[tokio::test]
async fn nobody_gives_way_for_ever() {
    let (_router, address, mut engine, mut client, mut call) = begun("").await;
    for word in ["three ", "four ", "five "] {
        let first = Client::send(address, urgent()).await;
        engine.call().await.answer(200, "{}").await;
        first.answer().await;
        call.gone().await;
        call = engine.call().await;
        call.begin_stream().await;
        call.say(word).await;
        client.wait_for(word).await;
    }
    let first = Client::send(address, urgent()).await;
    eventually("the wait", || async {
        metric(address, "orchestra_requests_waiting").await == Some(1)
    })
    .await;
    call.say("six").await;
    call.finish_stream().await;
    let answer = client.answer().await;
    assert_eq!(
        answer.text(),
        ("one two three four five six".to_owned(), true)
    );
    engine.call().await.answer(200, "{}").await;
    assert_eq!(first.answer().await.status, 200);
}

/// Sends an urgent request, which waits until the stream has ended by itself.
async fn does_not_give_way(
    (address, mut engine): (SocketAddr, Engine),
    client: Client,
    mut call: Call,
) {
    let first = Client::send(address, urgent()).await;
    eventually("the wait", || async {
        metric(address, "orchestra_requests_waiting").await == Some(1)
    })
    .await;
    call.say("three").await;
    call.finish_stream().await;
    let (text, is_whole) = client.answer().await.text();
    assert!(is_whole && text.ends_with("three"), "{text}");
    engine.call().await.answer(200, "{}").await;
    assert_eq!(first.answer().await.status, 200);
    assert!(!is_paused(address).await);
}

#[tokio::test]
async fn what_cannot_be_continued_does_not_give_way() {
    for (fields, num_choices) in [
        (", \"n\": 2", 2),
        (", \"response_format\": {\"type\": \"json_object\"}", 1),
    ] {
        let (_router, address, engine, client, mut call) = begun(fields).await;
        for further in 1..num_choices {
            call.event(&delta(further, "", Some("stop"))).await;
        }
        does_not_give_way((address, engine), client, call).await;
    }
}

#[tokio::test]
async fn others_do_not_give_way() {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    for (owner, tier) in [("vllm", "default"), ("somebody", "flex")] {
        let mut engine = Engine::start_at(any, MODEL, owner).await;
        let (_router, address) = start(one_seat(), &[&engine]).await;
        let fields = format!(", \"stream\": true, \"service_tier\": \"{tier}\"");
        let mut client = Client::send(address, chat(&fields)).await;
        let mut call = engine.call().await;
        call.begin_stream().await;
        call.say("one ").await;
        client.wait_for("one ").await;
        does_not_give_way((address, engine), client, call).await;
    }
}

#[tokio::test]
async fn an_answer_that_turns_to_tools_is_not_stopped_any_more() {
    let (_router, address, mut engine, mut client, mut call) = begun("").await;
    let tool = json!({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]});
    call.event(&tool.to_string()).await;
    client.wait_for("tool_calls").await;
    let first = Client::send(address, urgent()).await;
    eventually("the wait", || async {
        metric(address, "orchestra_requests_waiting").await == Some(1)
    })
    .await;
    call.finish_stream().await;
    assert!(client.answer().await.text().1);
    engine.call().await.answer(200, "{}").await;
    assert_eq!(first.answer().await.status, 200);
    assert!(!is_paused(address).await);
}

#[tokio::test]
async fn an_answer_in_one_piece_does_not_give_way() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(one_seat(), &[&engine]).await;
    let client = Client::send(address, chat(", \"service_tier\": \"flex\"")).await;
    let call = engine.call().await;
    let first = Client::send(address, urgent()).await;
    eventually("the wait", || async {
        metric(address, "orchestra_requests_waiting").await == Some(1)
    })
    .await;
    call.answer(200, "{}").await;
    assert_eq!(client.answer().await.status, 200);
    engine.call().await.answer(200, "{}").await;
    assert_eq!(first.answer().await.status, 200);
    assert!(!is_paused(address).await);
}

/// A batch stream that was stopped for a stream that goes on.
async fn paused(request: String) -> (Router, SocketAddr, Engine, Client, Call, Client) {
    let mut engine = Engine::start().await;
    let (router, address) = start(one_seat(), &[&engine]).await;
    let mut client = Client::send(address, request).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    client.wait_for("one ").await;
    let first = Client::send(
        address,
        chat(", \"stream\": true, \"service_tier\": \"priority\""),
    )
    .await;
    let other = engine.call().await;
    call.gone().await;
    eventually("the pause", || is_paused(address)).await;
    (router, address, engine, client, other, first)
}

#[tokio::test]
async fn a_client_that_leaves_in_the_pause_leaves_the_queue() {
    let (_router, address, mut engine, client, other, first) = paused(batch("")).await;
    drop(client);
    let next = Client::send(address, batch(", \"user\": \"next\"")).await;
    eventually("the wait", || async {
        metric(address, "orchestra_requests_waiting").await == Some(1)
    })
    .await;
    other.stream(&["x"]).await;
    first.answer().await;
    // The next to start is the next to ask.
    let call = engine.call().await;
    assert_eq!(call.json()["user"], "next");
    call.stream(&["y"]).await;
    assert!(next.answer().await.text().1);
}

#[tokio::test]
async fn a_deadline_comes_in_the_pause_too() {
    let request = batch("").replacen("\r\n", "\r\nx-request-timeout-ms: 3000\r\n", 1);
    let (_router, _address, mut engine, client, other, first) = paused(request).await;
    let answer = client.answer().await;
    assert!(answer.body.contains("deadline_exceeded"), "{answer:?}");
    assert!(!answer.body.contains("[DONE]"));
    other.stream(&["x"]).await;
    assert!(first.answer().await.text().1);
    assert!(engine.is_idle());
}

#[tokio::test]
async fn shutdown_ends_a_pause() {
    let (router, _address, _engine, client, _other, first) = paused(batch("")).await;
    let stopping = time::timeout(PATIENCE, router.stop(async {}));
    let (answer, _, stopped) = tokio::join!(client.answer(), first.answer(), stopping);
    assert!(answer.body.contains("shutting_down"), "{answer:?}");
    assert!(stopped.is_ok());
}

#[tokio::test]
async fn completions_of_token_ids_give_way_where_the_engine_tells_its_tokens() {
    for tells in [true, false] {
        let mut engine = Engine::start().await;
        let (_router, address) = start(one_seat(), &[&engine]).await;
        let body = format!(
            "{{\"model\": \"{MODEL}\", \"prompt\": [5, 6], \"stream\": true, \"max_tokens\": 9, \
             \"service_tier\": \"flex\"}}"
        );
        let wrote = |text: &str, id: u32, reason: Option<&str>| {
            let mut choice = json!({"index": 0, "text": text, "finish_reason": reason});
            if tells {
                choice["token_ids"] = json!([id]);
            }
            json!({"id": "cmpl-1", "created": 1, "model": MODEL, "choices": [choice]}).to_string()
        };
        let mut client = Client::send(address, post("/v1/completions", &body)).await;
        let mut call = engine.call().await;
        call.begin_stream().await;
        call.event(&wrote("a", 7, None)).await;
        client.wait_for("\"a\"").await;
        let first = Client::send(address, urgent()).await;
        if tells {
            engine.call().await.answer(200, "{}").await;
            call.gone().await;
            call = engine.call().await;
            assert_eq!(call.json()["prompt"], json!([5, 6, 7]));
            call.begin_stream().await;
        } else {
            eventually("the wait", || async {
                metric(address, "orchestra_requests_waiting").await == Some(1)
            })
            .await;
        }
        call.event(&wrote("b", 8, Some("stop"))).await;
        call.event("[DONE]").await;
        let answer = client.answer().await;
        assert_eq!(answer.text(), ("ab".to_owned(), true), "{answer:?}");
        if !tells {
            engine.call().await.answer(200, "{}").await;
        }
        assert_eq!(first.answer().await.status, 200);
        assert_eq!(is_paused(address).await, tells);
    }
}
