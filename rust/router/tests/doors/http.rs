//! OpenAI's API over HTTP.

use serde_json::json;

use crate::support::{
    Client, MODEL, Worker, ask, config, eventually, get, head, post, start, start_with_worker,
};

fn chat(fields: &str) -> String {
    let messages = r#""messages": [{"role": "user", "content": "hello"}]"#;
    post(
        "/v1/chat/completions",
        &format!(r#"{{"model": "{MODEL}", {messages}{fields}}}"#),
    )
}

fn completion(prompt: &str, fields: &str) -> String {
    post(
        "/v1/completions",
        &format!(r#"{{"model": "{MODEL}", "prompt": {prompt}{fields}}}"#),
    )
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let client = Client::send(at.http, chat(r#", "max_tokens": 5"#)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "hi ").await;
    worker.finish(start.sequence_id, 3, "yo").await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (200, Some("application/json"))
    );
    let body = answer.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    let message = json!({"role": "assistant", "content": "hi yo", "refusal": null});
    assert_eq!(body["choices"][0]["message"], message);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 5);
    assert_eq!(body["usage"]["prompt_tokens"], start.prompt_token_ids.len());
}

#[tokio::test]
async fn a_chat_streams_as_tokens_come() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let fields = r#", "stream": true, "stream_options": {"include_usage": true}"#;
    let mut client = Client::send(at.http, chat(fields)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    let head = client.until("\"content\":\"one\"").await;
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    assert!(head.contains("\"role\":\"assistant\""), "{head}");
    worker.finish(start.sequence_id, 3, "two").await;
    let rest = client.until("data: [DONE]\n\n").await;
    let usage = "\"choices\":[],\"usage\":{\"prompt_tokens\":";
    assert!(
        rest.contains("\"content\":\"two\"") && rest.contains(usage),
        "{rest}"
    );
}

#[tokio::test]
async fn several_prompts_are_answered_in_their_order() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let fields = r#", "n": 2, "logprobs": 1, "return_token_ids": true, "seed": 1"#;
    let client = Client::send(at.http, completion("[[97], [98]]", fields)).await;
    for _ in 0..4 {
        let start = worker.start().await;
        assert_eq!(
            start
                .sampling
                .as_ref()
                .and_then(|sampling| sampling.max_tokens),
            Some(16)
        );
        let prompt = start.prompt_token_ids[0];
        let text = format!(
            "{}{}",
            char::from(prompt as u8),
            start.sampling.unwrap().seed()
        );
        worker.finish(start.sequence_id, 0, &text).await;
    }
    let body = client.answer().await.json();
    let texts: Vec<_> = (0..4)
        .map(|index| body["choices"][index]["text"].clone())
        .collect();
    assert_eq!(texts, ["a1", "a2", "b1", "b2"]);
    assert_eq!(body["choices"][3]["index"], 3);
    assert_eq!(body["choices"][3]["token_ids"], json!([98, 50]));
    assert_eq!(body["choices"][3]["prompt_token_ids"], json!([98]));
    assert_eq!(body["choices"][3]["logprobs"]["tokens"], json!(["b", "2"]));
    assert_eq!(body["usage"]["prompt_tokens"], 2);
    assert_eq!(body["usage"]["completion_tokens"], 8);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request_also_in_silence() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    // Before the first token, after it, and without a stream.
    let waiting = Client::send(at.http, chat(r#", "stream": true"#)).await;
    let start = worker.start().await;
    drop(waiting);
    assert_eq!(worker.abort().await, start.sequence_id);

    let mut reading = Client::send(at.http, chat(r#", "stream": true"#)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    reading.until("one").await;
    drop(reading);
    assert_eq!(worker.abort().await, start.sequence_id);

    let whole = Client::send(at.http, chat("")).await;
    let start = worker.start().await;
    drop(whole);
    assert_eq!(worker.abort().await, start.sequence_id);
}

#[tokio::test]
async fn a_worker_that_dies_mid_stream_leaves_an_error_and_no_done() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let mut client = Client::send(at.http, chat(r#", "stream": true"#)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    client.until("one").await;
    drop(worker);
    let rest = client.rest().await;
    let last = rest
        .lines()
        .find_map(|line| line.strip_prefix("data: {\"error\":"))
        .unwrap();
    assert!(last.contains("\"code\":\"worker_failed\""), "{rest}");
    assert!(!rest.contains("[DONE]"), "{rest}");

    // Before the first token there is a status to say it with.
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let client = Client::send(at.http, chat(r#", "stream": true"#)).await;
    worker.start().await;
    drop(worker);
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.error().0.as_str()),
        (502, "worker_failed")
    );
}

#[tokio::test]
async fn what_the_corridor_refuses_has_its_status_and_field() {
    let (_router, at, _worker) = start_with_worker(&config()).await;
    let long = format!("[{}]", vec!["97"; 5000].join(","));
    let cases = [
        (
            chat(r#", "temperature": 3"#),
            400,
            "invalid_request",
            Some("temperature"),
        ),
        (chat(r#", "n": 33"#), 400, "invalid_request", Some("n")),
        (
            chat(r#", "stop": ["a", ""]"#),
            400,
            "invalid_request",
            Some("stop"),
        ),
        (
            completion("[275]", ""),
            400,
            "invalid_request",
            Some("prompt[0]"),
        ),
        (completion(&long, ""), 400, "context_too_long", None),
        (
            post("/v1/completions", r#"{"model": "secret", "prompt": "x"}"#),
            404,
            "model_not_found",
            Some("model"),
        ),
        (
            chat(r#", "response_format": {"type": "json_object"}"#),
            501,
            "unsupported",
            Some("response_format"),
        ),
    ];
    for (request, status, code, param) in cases {
        let answer = ask(at.http, &request).await;
        assert_eq!(answer.status, status, "{answer:?}");
        let (got_code, got_param) = answer.error();
        assert_eq!(got_code, code, "{answer:?}");
        if let Some(param) = param {
            let got_param = got_param.unwrap();
            assert!(
                got_param == param || param.starts_with(&got_param),
                "{answer:?}"
            );
        }
        assert!(!answer.body.contains("secret"), "{answer:?}");
    }
    let metrics = get(at.http, "/metrics").await.body;
    let counted = "orchestra_requests_rejected_total{reason=\"invalid_request\"} 4\n";
    assert!(metrics.contains(counted), "{metrics}");
    assert!(
        metrics.contains("orchestra_requests_running 0\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let (_router, at, _worker) = start_with_worker(&config()).await;
    let list = get(at.http, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    assert!(list["data"][0]["created"].as_u64().unwrap() > 1_700_000_000);
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(get(at.http, path).await.json(), list["data"][0], "{path}");
    }
    let missing = get(at.http, "/v1/models/secret").await;
    assert_eq!(
        (missing.status, missing.error().0.as_str()),
        (404, "model_not_found")
    );
}

#[tokio::test]
async fn without_a_worker_the_router_lives_and_is_not_ready() {
    let (_router, at) = start(&config());
    assert_eq!(get(at.http, "/live").await.status, 200);
    assert_eq!(get(at.http, "/ready").await.status, 503);
    assert_eq!(get(at.http, "/health").await.status, 503);
    assert_eq!(get(at.http, "/v1/models").await.json()["data"], json!([]));
    let metrics = get(at.http, "/metrics").await;
    let media_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(metrics.header("content-type"), Some(media_type));
    assert!(
        metrics.body.contains("\norchestra_workers 0\n"),
        "{metrics:?}"
    );
    assert!(metrics.body.ends_with("# EOF\n"));
    assert!(
        metrics
            .body
            .contains("orchestra_http_responses_total{route=\"/ready\",status=\"503\"} 1")
    );
}

#[tokio::test]
async fn until_a_first_worker_has_come_no_model_is_said_not_to_exist() {
    let (_router, at) = start(&config());
    let request = post("/v1/completions", r#"{"model": "secret", "prompt": "x"}"#);
    let early = ask(at.http, &request).await;
    assert_eq!(
        (early.status, early.error().0.as_str()),
        (503, "no_workers")
    );
    assert!(early.header("retry-after-ms").is_some(), "{early:?}");
    let worker = Worker::attach(at).await;
    assert_eq!(ask(at.http, &request).await.status, 404);
    // Nor afterwards, when none is there any more.
    drop(worker);
    eventually(at.http, "/ready", 503).await;
    assert_eq!(ask(at.http, &request).await.status, 404);
}

#[tokio::test]
async fn requests_that_are_none_are_refused_as_json() {
    let (_router, at) = start(&config());
    let json = "content-type: application/json\r\n";
    let cases = [
        (head("GET", "/", ""), 404, "invalid_request"),
        (head("GET", "/v2/secret", ""), 404, "invalid_request"),
        (head("GET", "/v1/completions", ""), 405, "invalid_request"),
        (
            head("POST", "/ready", "content-length: 0\r\n"),
            405,
            "invalid_request",
        ),
        (
            head("POST", "/v1/completions", "content-length: 2\r\n") + "{}",
            415,
            "invalid_request",
        ),
        (
            head(
                "POST",
                "/v1/completions",
                "content-type: text/plain\r\ncontent-length: 2\r\n",
            ) + "{}",
            415,
            "invalid_request",
        ),
        (
            head(
                "POST",
                "/v1/completions",
                &format!("{json}content-encoding: gzip\r\ncontent-length: 2\r\n"),
            ) + "{}",
            415,
            "unsupported",
        ),
        (post("/v1/completions", "{"), 400, "invalid_request"),
        (post("/v1/completions", ""), 400, "invalid_request"),
    ];
    for (request, status, code) in cases {
        let answer = ask(at.http, &request).await;
        assert_eq!(
            (answer.status, answer.error().0.as_str()),
            (status, code),
            "{request}"
        );
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert!(!answer.body.contains("secret"));
    }
    let wrong_method = ask(at.http, head("GET", "/v1/completions", "")).await;
    assert_eq!(wrong_method.header("allow"), Some("POST"));
}

#[tokio::test]
async fn every_answer_has_the_request_s_id() {
    let (_router, at) = start(&config());
    let answer = ask(at.http, head("GET", "/live", "x-request-id: mine-1\r\n")).await;
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    let answer = ask(
        at.http,
        head("GET", "/nowhere", "x-request-id: \"odd\"\r\n"),
    )
    .await;
    assert!(
        answer.header("x-request-id").unwrap().starts_with("req-"),
        "{answer:?}"
    );
}

#[tokio::test]
async fn keys_guard_the_models_and_not_the_health() {
    let mut config = config();
    config.api_keys = vec!["sk-1".parse().unwrap()];
    let (_router, at) = start(&config);
    for headers in [
        "",
        "authorization: Bearer sk-2\r\n",
        "authorization: sk-1\r\n",
    ] {
        let answer = ask(at.http, head("GET", "/v1/models", headers)).await;
        assert_eq!(
            (answer.status, answer.error().0.as_str()),
            (401, "unauthenticated")
        );
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(answer.header("x-should-retry"), Some("false"));
    }
    let with_key = head("GET", "/v1/models", "authorization: Bearer sk-1\r\n");
    assert_eq!(ask(at.http, with_key).await.status, 200);
    assert_eq!(get(at.http, "/live").await.status, 200);
    assert_eq!(get(at.http, "/metrics").await.status, 200);
}

#[tokio::test]
async fn several_prompts_pass_through_fewer_seats_than_they_are() {
    let mut config = config();
    config.corridor.max_concurrent_requests = 1;
    let (_router, at, mut worker) = start_with_worker(&config).await;
    for fields in [r#", "echo": true"#, r#", "echo": true, "stream": true"#] {
        let client = Client::send(at.http, completion(r#"["a", "b", "c"]"#, fields)).await;
        for _ in 0..3 {
            // The next one starts when the one before has ended, although its answer is not complete yet.
            let start = worker.start().await;
            worker.write(start.sequence_id, 0, "x").await;
            worker.finish(start.sequence_id, 1, "y").await;
        }
        let answer = client.answer().await;
        assert_eq!(answer.status, 200);
        assert_eq!(
            answer.body.matches("\"finish_reason\":\"length\"").count(),
            3,
            "{answer:?}"
        );
        for prompt in ["a", "b", "c"] {
            assert!(
                answer.body.contains(&format!("\"text\":\"{prompt}")),
                "{answer:?}"
            );
        }
    }
}
