//! What is left of a request: its line in the access log, its decision, the warning that it was slow.

use std::{fs, path::Path, time::Duration};

use orchestra_proto::v1::{
    GenerateRequest, generate_request::Prompt, inference_client::InferenceClient,
};
use orchestra_router::{config::Span, tenants::TenantConfig};
use serde_json::{Value, json};
use tokio::time;

use crate::support::{
    Client, MODEL, ask, config, get, head, post, start, start_with_worker, within,
};

const PARENT: &str = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";

fn completion(headers: &str, stream: bool) -> String {
    completion_of(MODEL, headers, stream)
}

fn completion_of(model: &str, headers: &str, stream: bool) -> String {
    let prompt = "do not write me down";
    let body = json!({"model": model, "prompt": prompt, "stream": stream}).to_string();
    post("/v1/completions", &body).replacen("\r\n", &format!("\r\n{headers}"), 1)
}

/// A place for a log of this test's own.
fn fresh(name: &str) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    // Of an earlier run; usually there is none.
    let _ = fs::remove_file(&path);
    path.display().to_string()
}

/// The lines of the log once it has this many.
async fn lines(path: &str, count: usize) -> Vec<Value> {
    let reading = async {
        loop {
            let text = fs::read_to_string(path).unwrap_or_default();
            if text.lines().count() >= count {
                assert!(
                    !text.contains("write me down") && !text.contains("sk-"),
                    "{text}"
                );
                let line = |line| serde_json::from_str(line).unwrap();
                return text.lines().map(line).collect();
            }
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("line of the access log", reading).await
}

#[tokio::test]
async fn each_request_leaves_one_line_at_its_end() {
    let mut config = config();
    let path = fresh("access.log");
    config.observe.access_log = Some(path.clone());
    config.tenants = vec![TenantConfig {
        name: "ours".to_owned(),
        api_keys: vec!["sk-1".into()],
        ..TenantConfig::default()
    }];
    let (_router, at, mut worker) = start_with_worker(&config).await;
    let headers = format!(
        "authorization: Bearer sk-1\r\nx-request-id: r1\r\nx-orchestra-class: batch\r\n{PARENT}"
    );
    let mut running = Client::send(at.http, completion(&headers, true)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "", "it has not ended");
    worker.finish(start.sequence_id, 3, "two").await;
    running.until("data: [DONE]\n\n").await;

    let line = lines(&path, 1).await.remove(0);
    for (key, value) in [
        ("request_id", json!("r1")),
        ("trace_id", json!("4bf92f3577b34da6a3ce929d0e0e4736")),
        ("door", json!("http")),
        ("route", json!("/v1/completions")),
        ("tenant", json!("ours")),
        ("class", json!("batch")),
        ("model", json!(MODEL)),
        ("status", json!(200)),
        ("error", Value::Null),
        ("finish_reason", json!("length")),
        ("prompt_tokens", json!(start.prompt_token_ids.len())),
        ("completion_tokens", json!(6)),
        ("worker", json!("w0")),
        ("replays", json!(0)),
    ] {
        assert_eq!(line[key], value, "{key}: {line}");
    }
    let time = |key: &str| line[key].as_f64().unwrap();
    assert!(time("queue_ms") <= time("ttft_ms") && time("ttft_ms") <= time("total_ms"));
}

#[tokio::test]
async fn refused_and_abandoned_requests_leave_theirs() {
    let mut config = config();
    let path = fresh("refused-access.log");
    config.observe.access_log = Some(path.clone());
    config.api_keys = vec!["sk-1".into()];
    let (router, at, mut worker) = start_with_worker(&config).await;
    // One without a key, one for no model, one whose client leaves, and one that gives no line.
    let refused = ask(at.http, post("/v1/chat/completions", "{}")).await;
    assert_eq!(refused.status, 401);
    get(at.http, "/live").await;
    let headers = "authorization: Bearer sk-1\r\n";
    let wrong = completion_of("org/none", headers, false);
    assert_eq!(ask(at.http, wrong).await.status, 404);
    let mut leaving = Client::send(at.http, completion(headers, true)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    leaving.until("one").await;
    drop(leaving);
    worker.abort().await;
    let lines = lines(&path, 3).await;
    let seen = |index: usize, keys: [&str; 3]| keys.map(|key| lines[index][key].clone());
    let keys = ["route", "status", "error"];
    let expected = [
        json!("/v1/chat/completions"),
        json!(401),
        json!("unauthenticated"),
    ];
    assert_eq!(seen(0, keys), expected);
    let expected = [
        json!("/v1/completions"),
        json!(404),
        json!("model_not_found"),
    ];
    assert_eq!(seen(1, keys), expected);
    let keys = ["status", "finish_reason", "completion_tokens"];
    assert_eq!(seen(2, keys), [json!(200), json!("abort"), json!(3)]);
    within("stop", router.stop(std::future::pending())).await;
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
}

#[tokio::test]
async fn a_request_over_grpc_leaves_a_line_too() {
    let mut config = config();
    let path = fresh("grpc-access.log");
    config.observe.access_log = Some(path.clone());
    let (_router, at, mut worker) = start_with_worker(&config).await;
    let endpoint = format!("http://{}", at.grpc);
    let mut client = InferenceClient::connect(endpoint).await.unwrap();
    let ask = |model: &str| {
        let mut request = tonic::Request::new(GenerateRequest {
            model: model.to_owned(),
            prompt: Some(Prompt::Text("x".to_owned())),
            ..GenerateRequest::default()
        });
        let (_, traceparent) = PARENT.trim_end().split_once(": ").unwrap();
        let metadata = request.metadata_mut();
        metadata.insert("traceparent", traceparent.parse().unwrap());
        request
    };
    client.generate(ask("org/none")).await.unwrap_err();
    let mut stream = client.generate(ask(MODEL)).await.unwrap().into_inner();
    let start = worker.start().await;
    worker.finish(start.sequence_id, 0, "one").await;
    while within("piece", stream.message()).await.unwrap().is_some() {}
    let lines = lines(&path, 2).await;
    let keys = [
        "door",
        "route",
        "trace_id",
        "status",
        "error",
        "finish_reason",
    ];
    let seen = |index: usize| keys.map(|key| lines[index][key].clone());
    let trace_id = json!("4bf92f3577b34da6a3ce929d0e0e4736");
    let (door, route) = (json!("grpc"), json!("orchestra.v1.Inference/Generate"));
    // NOT_FOUND, then OK.
    let refused = [json!(5), json!("model_not_found"), Value::Null];
    let served = [json!(0), Value::Null, json!("length")];
    for (index, [status, error, finish]) in [refused, served].into_iter().enumerate() {
        let of_door = [door.clone(), route.clone(), trace_id.clone()];
        let [door, route, trace_id] = of_door;
        assert_eq!(seen(index), [door, route, trace_id, status, error, finish]);
    }
}

#[tokio::test]
async fn a_decision_can_be_asked_for_while_the_request_runs_and_after() {
    let mut config = config();
    config.observe.decisions = 1;
    let (_router, at, mut worker) = start_with_worker(&config).await;
    let headers = "x-request-id: r1\r\nx-orchestra-explain: 1\r\n";
    let mut running = Client::send(at.http, completion(headers, true)).await;
    let start = worker.start().await;
    let asked = get(at.admin, "/admin/decisions/r1").await;
    assert!(!asked.body.contains("write me down"), "{}", asked.body);
    let seen = asked.json();
    assert_eq!(seen["is_finished"], false);
    assert_eq!(seen["prompt_tokens"], start.prompt_token_ids.len());
    let decision = &seen["decisions"][0];
    assert_eq!(decision["worker"], "w0");
    assert_eq!(decision["predicted_cached_tokens"], 0);
    assert!(decision.get("reported_cached_tokens").is_none());
    let candidate = &decision["explanation"]["candidates"][0];
    assert_eq!(candidate["worker"], "w0");
    assert_eq!(candidate["has_room"], true);
    assert_eq!(candidate["batch"], 0);
    assert_eq!(candidate["kv_blocks_free"], 1000);

    worker.finish(start.sequence_id, 0, "one").await;
    running.until("data: [DONE]\n\n").await;
    drop(running);
    let done = within("end", async {
        loop {
            let seen = get(at.admin, "/admin/decisions/r1").await.json();
            if seen["is_finished"] == true {
                return seen;
            }
        }
    });
    assert_eq!(done.await["decisions"][0]["reported_cached_tokens"], 0);

    // The ring has room for one, and this one asks for no explanation.
    let mut second = Client::send(at.http, completion("x-request-id: r2\r\n", true)).await;
    let start = worker.start().await;
    let seen = get(at.admin, "/admin/decisions/r2").await.json();
    assert!(seen["decisions"][0].get("explanation").is_none());
    assert_eq!(get(at.admin, "/admin/decisions/r1").await.status, 404);
    worker.finish(start.sequence_id, 0, "one").await;
    second.until("data: [DONE]\n\n").await;
    assert_eq!(
        ask(at.admin, head("GET", "/admin/decisions/r3", ""))
            .await
            .status,
        404
    );
}

#[tokio::test]
async fn slow_requests_are_counted() {
    let mut config = config();
    config.observe.slow_ttft = Some(Span(Duration::ZERO));
    config.observe.slow_total = Some(Span(Duration::from_secs(3600)));
    let (_router, at, mut worker) = start_with_worker(&config).await;
    let running = Client::send(at.http, completion("", false)).await;
    let start = worker.start().await;
    worker.finish(start.sequence_id, 0, "one").await;
    assert_eq!(running.answer().await.status, 200);
    let metrics = get(at.http, "/metrics").await.body;
    assert!(
        metrics.contains("orchestra_slow_requests_total{limit=\"ttft\"} 1\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("orchestra_slow_requests_total{limit=\"total\"} 0\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn an_access_log_that_cannot_be_opened_stops_the_start() {
    let mut config = config();
    config.observe.access_log = Some("/nowhere/access.log".to_owned());
    assert!(orchestra_router::Router::start(&config).is_err());
    config.observe.access_log = None;
    start(&config);
}
