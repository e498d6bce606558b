//! What is left of a request that ran on engines: its line in the access log, its decision, its place in a trace.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::support::{Client, Engine, MODEL, chat, config, eventually, get, start};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn traced(request: &str) -> String {
    request.replacen("\r\n", &format!("\r\ntraceparent: {PARENT}\r\n"), 1)
}

/// The line of the chat; the list of models was asked for, too.
fn chat_line(path: &Path) -> Option<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let chat = text.lines().find(|line| line.contains("/v1/chat"))?;
    serde_json::from_str(chat).ok()
}

#[tokio::test]
async fn a_retried_request_leaves_one_line_that_says_so() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("engines-access.log");
    // Of an earlier run; usually there is none.
    let _ = fs::remove_file(&path);
    let mut config = config();
    config.observe.access_log = Some(path.display().to_string());
    let (mut first, mut second) = (Engine::start().await, Engine::start().await);
    let urls = [first.url(), second.url()];
    let (router, address) = start(config, &[&first, &second]).await;
    let admin = router.addresses().admin;
    let client = Client::send(address, chat(", \"stream\": true")).await;
    let (call, other, failed) = tokio::select! {
        call = first.call() => (call, &mut second, 0),
        call = second.call() => (call, &mut first, 1),
    };
    call.reset();
    other.call().await.stream(&["one ", "two"]).await;
    assert_eq!(client.answer().await.text(), ("one two".to_owned(), true));

    let line = || chat_line(&path);
    eventually("line of the access log", || async { line().is_some() }).await;
    let line = line().unwrap();
    let worker = format!("{} {MODEL}", urls[1 - failed]);
    for (key, value) in [
        ("model", json!(MODEL)),
        ("status", json!(200)),
        ("finish_reason", json!("stop")),
        ("completion_tokens", json!(2)),
        ("worker", json!(worker)),
        ("retries", json!(1)),
        ("replays", json!(0)),
    ] {
        assert_eq!(line[key], value, "{key}: {line}");
    }
    let seen = get(admin, "/admin/decisions/test-1").await.json();
    let workers: Vec<_> = (0..2).map(|at| &seen["decisions"][at]["worker"]).collect();
    assert_eq!(*workers[0], format!("{} {MODEL}", urls[failed]));
    assert_eq!(*workers[1], worker);
}

#[tokio::test]
async fn an_answer_in_one_piece_is_counted_by_its_usage() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("engines-unary.log");
    // Of an earlier run; usually there is none.
    let _ = fs::remove_file(&path);
    let mut config = config();
    config.observe.access_log = Some(path.display().to_string());
    let mut engine = Engine::start().await;
    let (_router, address) = start(config, &[&engine]).await;
    let client = Client::send(address, chat("")).await;
    let usage = r#"{"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}"#;
    let answer = format!(r#"{{"choices": [], "usage": {usage}}}"#);
    engine.call().await.answer(200, &answer).await;
    assert_eq!(client.answer().await.body, answer);
    let line = || chat_line(&path);
    eventually("line of the access log", || async { line().is_some() }).await;
    let line = line().unwrap();
    let seen = ["prompt_tokens", "cached_tokens", "completion_tokens"].map(|key| line[key].clone());
    assert_eq!(seen, [json!(9), json!(8), json!(4)], "{line}");
    let metrics = get(address, "/metrics").await.body;
    for line in ["prompt_tokens_total 9", "generation_tokens_total 4"] {
        assert!(
            metrics.contains(&format!("orchestra_{line}\n")),
            "{line}: {metrics}"
        );
    }
}

#[tokio::test]
async fn an_engine_s_work_belongs_to_the_caller_s_trace_or_to_our_span_in_it() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let client = Client::send(address, traced(&chat(""))).await;
    let call = engine.call().await;
    assert!(
        call.head.contains(&format!("traceparent: {PARENT}\r\n")),
        "{}",
        call.head
    );
    call.answer(200, "{}").await;
    client.answer().await;

    let mut config = config();
    config.observe.otlp_endpoint = Some(engine.url());
    let mut engine = Engine::start().await;
    let (_router, address) = start(config, &[&engine]).await;
    let client = Client::send(address, traced(&chat(""))).await;
    let call = engine.call().await;
    let line = call
        .head
        .lines()
        .find_map(|line| line.strip_prefix("traceparent: "));
    let traceparent = line.unwrap();
    assert_eq!(traceparent[..36], PARENT[..36]);
    assert_ne!(traceparent, PARENT);
    call.answer(200, "{}").await;
    client.answer().await;
}
