//! Failures before the first byte has gone to the client: another engine's turn.

use std::time::Duration;

use orchestra_router::config::Span;
use tokio::task::JoinSet;

use crate::support::{Answer, Call, Client, Engine, ask, chat, config, start};

/// What an engine does instead of answering.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Reset,
    Fin,
    HalfHead,
    Status(u16),
    GarbageJson,
    Cut,
    GarbageEvent,
    ErrorEvent,
    FinAfterHead,
}

const UNARY: [Fault; 8] = [
    Fault::Reset,
    Fault::Fin,
    Fault::HalfHead,
    Fault::Status(500),
    Fault::Status(503),
    Fault::Status(429),
    Fault::GarbageJson,
    Fault::Cut,
];
const STREAMING: [Fault; 9] = [
    Fault::Reset,
    Fault::Fin,
    Fault::HalfHead,
    Fault::Status(500),
    Fault::Status(503),
    Fault::Status(429),
    Fault::GarbageEvent,
    Fault::ErrorEvent,
    Fault::FinAfterHead,
];

impl Fault {
    async fn strike(self, mut call: Call) {
        match self {
            Self::Reset => call.reset(),
            Self::Fin => drop(call),
            Self::HalfHead => call.write("HTTP/1.1 200").await,
            Self::Status(status) => {
                let theirs = "{\"error\": {\"message\": \"theirs\"}}";
                call.answer(status, theirs).await;
            }
            Self::GarbageJson => call.answer(200, "{\"choices\": [").await,
            Self::Cut => {
                call.write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"a\"")
                    .await;
            }
            Self::GarbageEvent => {
                call.begin_stream().await;
                call.event("{\"choices\": [{").await;
            }
            Self::ErrorEvent => {
                call.begin_stream().await;
                call.event("{\"error\": {\"message\": \"out of memory\"}}")
                    .await;
                call.event("[DONE]").await;
            }
            Self::FinAfterHead => call.begin_stream().await,
        }
    }
}

/// Asks, lets one of two engines fail, and the other answer.
async fn with_one_failure(fault: Fault, is_stream: bool) -> (Answer, bool) {
    let (mut a, mut b) = (Engine::start().await, Engine::start().await);
    let (_router, address) = start(config(), &[&a, &b]).await;
    let fields = if is_stream { ", \"stream\": true" } else { "" };
    let client = Client::send(address, chat(fields)).await;
    let (first, second) = tokio::select! {
        call = a.call() => (call, &mut b),
        call = b.call() => (call, &mut a),
    };
    fault.strike(first).await;
    let call = second.call().await;
    let is_same = call.json()["messages"][0]["content"] == "hi";
    if is_stream {
        call.stream(&["good"]).await;
    } else {
        call.answer(200, "{\"good\": 1}").await;
    }
    (client.answer().await, is_same)
}

#[tokio::test]
async fn one_engine_that_fails_is_not_seen_by_the_client() {
    for fault in UNARY {
        let (answer, is_same) = with_one_failure(fault, false).await;
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (200, "{\"good\": 1}"),
            "{fault:?}"
        );
        assert!(is_same);
    }
    for fault in STREAMING {
        let (answer, is_same) = with_one_failure(fault, true).await;
        assert_eq!(
            answer.text(),
            ("good".to_owned(), true),
            "{fault:?}: {answer:?}"
        );
        assert!(is_same);
    }
}

#[tokio::test]
async fn a_hang_before_the_answer_is_another_engine_s_turn() {
    for is_stream in [false, true] {
        let (mut a, mut b) = (Engine::start().await, Engine::start().await);
        let mut config = config();
        config.engines.engine_ttft_timeout.0 = Duration::from_millis(300);
        config.engines.engine_answer_timeout.0 = Duration::from_millis(300);
        let (_router, address) = start(config, &[&a, &b]).await;
        let fields = if is_stream { ", \"stream\": true" } else { "" };
        let client = Client::send(address, chat(fields)).await;
        let (mut first, second) = tokio::select! {
            call = a.call() => (call, &mut b),
            call = b.call() => (call, &mut a),
        };
        if is_stream {
            first.begin_stream().await;
        }
        let call = second.call().await;
        // The one that hangs is told.
        first.gone().await;
        if is_stream {
            call.stream(&["good"]).await;
        } else {
            call.answer(200, "{}").await;
        }
        assert_eq!(client.answer().await.status, 200);
    }
}

#[tokio::test]
async fn where_all_fail_the_last_one_s_own_words_pass() {
    for status in [500, 503, 429] {
        let (mut a, mut b) = (Engine::start().await, Engine::start().await);
        let (_router, address) = start(config(), &[&a, &b]).await;
        for fields in ["", ", \"stream\": true"] {
            let client = Client::send(address, chat(fields)).await;
            for _ in 0..2 {
                let call = tokio::select! {
                    call = a.call() => call,
                    call = b.call() => call,
                };
                call.answer(status, "{\"error\": {\"message\": \"theirs\"}}")
                    .await;
            }
            let answer = client.answer().await;
            assert_eq!(answer.status, status);
            assert_eq!(answer.json()["error"]["message"], "theirs");
            assert_eq!(
                answer.header("retry-after").is_some(),
                status != 500,
                "{answer:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_engine_s_address_reaches_no_client() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let client = Client::send(address, chat("")).await;
    let words = format!("{{\"error\": \"from {}\"}}", engine.url());
    engine.call().await.answer(500, &words).await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.code()),
        (500, "worker_failed".to_owned())
    );
    assert!(!answer.body.contains("127.0.0.1"), "{answer:?}");
}

#[tokio::test]
async fn attempts_are_bounded() {
    let mut engines = Vec::new();
    for _ in 0..5 {
        engines.push(Engine::start().await);
    }
    let all: Vec<_> = engines.iter().collect();
    let (_router, address) = start(config(), &all).await;
    let mut client = JoinSet::new();
    client.spawn(async move { ask(address, chat("")).await });
    let mut num_calls = 0;
    let answer = loop {
        if let Some(answer) = client.try_join_next() {
            break answer.unwrap();
        }
        for engine in &mut engines {
            let call = tokio::time::timeout(Duration::from_millis(5), engine.call()).await;
            if let Ok(call) = call {
                num_calls += 1;
                call.answer(500, "{}").await;
            }
        }
    };
    assert_eq!((num_calls, answer.status), (3, 500));
}

/// Nothing of the answer has come, so a client of a hung engine need not wait as long as an answer may take.
async fn a_hung_engine_is_left(fields: &str) {
    let (mut a, mut b) = (Engine::start().await, Engine::start().await);
    let mut config = config();
    config.engines.engine_stall_timeout = Span(Duration::from_secs(1));
    let (_router, address) = start(config, &[&a, &b]).await;
    let client = Client::send(address, chat(fields)).await;
    let (call, hung, other) = tokio::select! {
        call = a.call() => (call, &a, &mut b),
        call = b.call() => (call, &b, &mut a),
    };
    hung.hang();
    let second = other.call().await;
    if fields.is_empty() {
        second.answer(200, "{}").await;
    } else {
        second.stream(&["a"]).await;
    }
    assert_eq!(client.answer().await.status, 200);
    call.gone().await;
}

#[tokio::test]
async fn a_hung_engine_is_left_before_a_whole_answer() {
    a_hung_engine_is_left("").await;
}

#[tokio::test]
async fn a_hung_engine_is_left_before_the_first_event() {
    a_hung_engine_is_left(", \"stream\": true").await;
}
