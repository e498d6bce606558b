//! What passes through, and how: bytes, headers, refusals.

use std::sync::atomic::Ordering;

use tokio::task::JoinSet;

use crate::support::{Client, Engine, MODEL, ask, chat, config, post, start, within};

#[tokio::test]
async fn body_and_answer_pass_byte_for_byte() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    // White space, the order of keys, numbers and unknown fields are the client's own.
    let body = format!(
        "{{ \"zeta\": 1.50,\n \"model\":\"{MODEL}\",\t\"messages\": [ {{\"content\":\"\\u00e9\\n\", \"role\": \"user\"}} ], \"a\":{{}} }}"
    );
    let client = Client::send(address, post("/v1/chat/completions", &body)).await;
    let call = engine.call().await;
    assert_eq!(call.path, "/v1/chat/completions");
    assert_eq!(call.body, body);
    assert!(
        call.head.contains("x-request-id: test-1\r\n"),
        "{}",
        call.head
    );
    assert!(!call.head.contains("authorization"), "{}", call.head);
    call.answer(200, "{ \"choices\" : [],\n\"odd\":1e3}").await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "{ \"choices\" : [],\n\"odd\":1e3}")
    );
    assert_eq!(answer.header("x-request-id"), Some("test-1"));
    assert_eq!(answer.header("content-type"), Some("application/json"));
}

#[tokio::test]
async fn a_stream_passes_event_for_event() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let mut client = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    // Each event goes out as it comes.
    client.wait_for("one ").await;
    call.write(": a comment\r\n").await;
    let odd = crate::support::chunk(": comment\n\ndata: {\"choices\":[], \"x\" :1}\r\n\r\n");
    drop(client);
    call.gone().await;

    let client = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.write(&odd).await;
    call.say("two").await;
    call.finish_stream().await;
    let answer = client.answer().await;
    assert!(
        answer
            .body
            .starts_with(": comment\n\ndata: {\"choices\":[], \"x\" :1}\r\n\r\n"),
        "{}",
        answer.body
    );
    assert!(answer.body.contains("two"));
    assert!(answer.body.ends_with("data: [DONE]\n\n"), "{}", answer.body);
    assert_eq!(
        answer.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
}

#[tokio::test]
async fn connections_are_kept_and_one_that_was_closed_costs_nothing() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let before = engine.num_connections.load(Ordering::Relaxed);
    for _ in 0..5 {
        let client = Client::send(address, chat("")).await;
        engine.call().await.answer(200, "{}").await;
        assert_eq!(client.answer().await.status, 200);
        let client = Client::send(address, chat(", \"stream\": true")).await;
        engine.call().await.stream(&["a"]).await;
        assert_eq!(client.answer().await.text(), ("a".to_owned(), true));
    }
    assert_eq!(engine.num_connections.load(Ordering::Relaxed), before + 1);

    // The engine closes in the moment of the next request: it goes out again on a fresh connection, to the same engine.
    let client = Client::send(address, chat("")).await;
    drop(engine.call().await);
    engine.call().await.answer(200, "{}").await;
    assert_eq!(client.answer().await.status, 200);
    let metrics = crate::support::get(address, "/metrics").await.body;
    assert!(
        !metrics.contains("orchestra_engine_retries_total{cause=\"broken\"} 1"),
        "{metrics}"
    );
}

/// The fields of a body besides its model, and the field that its refusal names.
const WRONG_CHATS: [(&str, &str); 6] = [
    (r#""x": 1"#, "messages"),
    (r#""messages": []"#, "messages"),
    (r#""messages": "x""#, "messages"),
    (r#""messages": [1]"#, "messages[0]"),
    (r#""messages": [{"content": "x"}]"#, "messages[0].role"),
    (r#""messages": [{"role": 3}]"#, "messages[0].role"),
];
/// The same beside messages that are right.
const WRONG_FIELDS: [(&str, &str); 7] = [
    (r#""temperature": 99"#, "temperature"),
    (r#""top_p": 0"#, "top_p"),
    (r#""n": 1000000"#, "n"),
    (r#""max_tokens": 0"#, "max_tokens"),
    (r#""stream": "yes""#, "stream"),
    (r#""stream_options": {}"#, "stream_options"),
    (r#""x": "\ud800""#, ""),
];
const WRONG_COMPLETIONS: [(&str, &str); 4] = [
    (r#""prompt": """#, "prompt"),
    (r#""prompt": []"#, "prompt"),
    (r#""prompt": 1"#, "prompt"),
    (r#""prompt": [-1]"#, "prompt"),
];

#[tokio::test]
async fn what_is_wrong_is_refused_before_an_engine_sees_it() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let chat = "/v1/chat/completions";
    let of_model = |fields: &str| format!("{{\"model\": \"{MODEL}\", {fields}}}");
    let messages = r#""messages": [{"role": "user", "content": "x"}]"#;
    let deep = format!(
        "{messages}, \"x\": {}1{}",
        "[".repeat(1000),
        "]".repeat(1000)
    );
    let unknown = format!("{{\"model\": \"other\", {messages}}}");
    let mut cases = vec![
        (chat, unknown, 404, "model"),
        (chat, format!("{{{messages}}}"), 400, "model"),
        (chat, of_model(&deep), 400, ""),
        (chat, "{\"model\": ".to_owned(), 400, ""),
    ];
    for (fields, param) in WRONG_CHATS {
        cases.push((chat, of_model(fields), 400, param));
    }
    for (field, param) in WRONG_FIELDS {
        cases.push((chat, of_model(&format!("{messages}, {field}")), 400, param));
    }
    for (fields, param) in WRONG_COMPLETIONS {
        cases.push(("/v1/completions", of_model(fields), 400, param));
    }
    for (path, body, status, param) in cases {
        let answer = ask(address, post(path, &body)).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        let named = answer.json()["error"]["param"].clone();
        assert_eq!(named.as_str().unwrap_or_default(), param, "{body}");
        assert!(engine.is_idle(), "{body}");
    }
}

#[tokio::test]
async fn refusals_of_an_engine_pass_and_are_not_held_against_it() {
    let mut engine = Engine::start().await;
    let (router, address) = start(config(), &[&engine]).await;
    for _ in 0..30 {
        for fields in ["", ", \"stream\": true"] {
            let client = Client::send(address, chat(fields)).await;
            engine
                .call()
                .await
                .answer(400, "{\"error\": {\"message\": \"no\"}}")
                .await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.status, answer.body.as_str()),
                (400, "{\"error\": {\"message\": \"no\"}}")
            );
        }
    }
    assert_eq!(crate::support::num_up(&router), 1);
}

#[tokio::test]
async fn a_client_that_leaves_is_told_to_the_engine() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    // Before the head of the answer, streaming and not; in mid-stream; and in a stream that is silent.
    for fields in ["", ", \"stream\": true"] {
        let client = Client::send(address, chat(fields)).await;
        let call = engine.call().await;
        drop(client);
        call.gone().await;
    }
    let mut client = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    call.say("a").await;
    client.wait_for("\"a\"").await;
    drop(client);
    call.gone().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_let_go() {
    let mut engine = Engine::start().await;
    let mut config = config();
    config.listen.idle_timeout.0 = std::time::Duration::from_millis(300);
    let (_router, address) = start(config, &[&engine]).await;
    let _stuck = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    let text = "x".repeat(64 << 10);
    // Until every buffer on the way is full, and on until the router has hung up.
    let writing = async { while call.try_say(&text).await.is_ok() {} };
    within("end of the stream", writing).await;
}

#[tokio::test]
async fn a_slow_reader_holds_up_its_engine_and_nobody_else() {
    let mut engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    let mut slow = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = engine.call().await;
    call.begin_stream().await;
    let text = "x".repeat(64 << 10);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut num_written = 0;
        while num_written < 1024 {
            let one = call.say(&text);
            if tokio::time::timeout(std::time::Duration::from_secs(1), one)
                .await
                .is_err()
            {
                break;
            }
            num_written += 1;
        }
        num_written
    });
    slow.wait_for("xxx").await;
    let num_written = within("back-pressure", tasks.join_next())
        .await
        .unwrap()
        .unwrap();
    assert!(num_written < 1024, "64 MiB went somewhere");
    let client = Client::send(address, chat("")).await;
    engine.call().await.answer(200, "{}").await;
    assert_eq!(client.answer().await.status, 200);
}
