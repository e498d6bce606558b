//! The operators' door.

use crate::support::{
    Client, MODEL, ask, config, eventually, get, head, post, start, start_with_worker, within,
};

fn stream() -> String {
    let body = format!(r#"{{"model": "{MODEL}", "prompt": "x", "stream": true}}"#);
    post("/v1/completions", &body)
}

fn order(method: &str, path: &str) -> String {
    head(method, path, "content-length: 0\r\n")
}

#[tokio::test]
async fn a_worker_that_is_held_back_gets_no_requests_until_it_is_let_in_again() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let mut running = Client::send(at.http, stream()).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;

    let answer = ask(at.admin, order("POST", "/admin/workers/w0/drain")).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, r#"{"status":"held_back"}"#)
    );
    assert_eq!(get(at.http, "/ready").await.status, 503);
    // What the worker says of itself does not undo it.
    worker.report(false).await;
    worker.report(true).await;
    worker.report(false).await;
    worker.write(start.sequence_id, 3, "two").await;
    running.until("two").await;
    assert_eq!(ask(at.http, stream()).await.error().0, "no_workers");
    let listed = get(at.admin, "/admin/workers").await.json();
    let seen = &listed["workers"][0];
    assert_eq!(
        (&seen["id"], &seen["state"]),
        (&"w0".into(), &"held_back".into())
    );
    assert_eq!(seen["sequences"], 1);

    let answer = ask(at.admin, order("POST", "/admin/workers/w0/undrain")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(get(at.http, "/ready").await.status, 200);
    let _again = Client::send(at.http, stream()).await;
    worker.start().await;
}

#[tokio::test]
async fn a_worker_leaves_after_its_sequences_and_stays_held_back_when_it_comes_again() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let mut running = Client::send(at.http, stream()).await;
    let start = worker.start().await;
    let answer = ask(at.admin, order("DELETE", "/admin/workers/w0")).await;
    assert_eq!(answer.body, r#"{"status":"draining"}"#);
    worker.finish(start.sequence_id, 0, "one").await;
    running.until("data: [DONE]\n\n").await;
    worker.told_to_go().await;

    let worker = crate::support::Worker::attach_unready(at).await;
    worker.report(false).await;
    let listed = get(at.admin, "/admin/workers").await.json();
    assert_eq!(listed["workers"][0]["state"], "held_back");
    assert_eq!(get(at.http, "/ready").await.status, 503);
}

#[tokio::test]
async fn a_worker_can_be_let_go_at_once() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let running = Client::send(at.http, stream()).await;
    worker.start().await;
    let answer = ask(at.admin, order("DELETE", "/admin/workers/w0?now=true")).await;
    assert_eq!(answer.body, r#"{"status":"removed"}"#);
    worker.told_to_go().await;
    assert_eq!(running.answer().await.error().0, "worker_failed");
}

#[tokio::test]
async fn the_router_drains_and_stays() {
    let (router, at, mut worker) = start_with_worker(&config()).await;
    let mut running = Client::send(at.http, stream()).await;
    let start = worker.start().await;
    let answer = ask(at.admin, order("POST", "/admin/drain")).await;
    assert_eq!(answer.body, r#"{"status":"draining"}"#);
    assert_eq!(get(at.http, "/ready").await.status, 503);
    assert_eq!(ask(at.http, stream()).await.error().0, "shutting_down");
    worker.finish(start.sequence_id, 0, "one").await;
    running.until("data: [DONE]\n\n").await;
    assert_eq!(get(at.http, "/live").await.status, 200);
    within("stop", router.stop(std::future::pending())).await;
}

#[tokio::test]
async fn only_operators_operate() {
    let mut config = config();
    config.admin_keys = vec!["op-1".into()];
    config.api_keys = vec!["sk-1".into()];
    let (_router, at) = start(&config);
    let with = |headers: &str| head("GET", "/admin/workers", headers);
    for headers in ["", "authorization: Bearer sk-1\r\n"] {
        assert_eq!(ask(at.admin, with(headers)).await.status, 401, "{headers}");
    }
    let key = "authorization: Bearer op-1\r\n";
    assert_eq!(ask(at.admin, with(key)).await.body, r#"{"workers":[]}"#);
    let page = format!("{key}origin: http://example.org\r\n");
    assert_eq!(ask(at.admin, with(&page)).await.status, 403);
    // The clients' door has none of it.
    assert_eq!(get(at.http, "/admin/workers").await.status, 404);
    assert_eq!(
        ask(at.admin, head("GET", "/metrics", key)).await.status,
        404
    );
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let (_router, at, _worker) = start_with_worker(&config()).await;
    for (method, path, status, param) in [
        ("POST", "/admin/workers/w9/drain", 404, Some("id")),
        ("POST", "/admin/workers/w9/undrain", 404, Some("id")),
        ("DELETE", "/admin/workers/w9", 404, Some("id")),
        ("DELETE", "/admin/workers/w0?now=soon", 400, Some("now")),
        ("GET", "/admin/drain", 405, None),
        ("GET", "/admin/nothing", 404, None),
    ] {
        let answer = ask(at.admin, order(method, path)).await;
        let error = answer.error();
        assert_eq!(
            (answer.status, error.1.as_deref()),
            (status, param),
            "{method} {path}"
        );
    }
    for body in [
        "{}",
        "[]",
        r#"{"filter": 3}"#,
        r#"{"filter": "info", "x": 1}"#,
    ] {
        let answer = ask(
            at.admin,
            post("/admin/log", body).replacen("POST", "PUT", 1),
        )
        .await;
        assert_eq!(answer.error().1.as_deref(), Some("filter"), "{body}");
    }
    // This test's process has no logs of the router's.
    let wish = post("/admin/log", r#"{"filter": "debug"}"#).replacen("POST", "PUT", 1);
    assert_eq!(ask(at.admin, wish).await.status, 400);
    eventually(at.http, "/ready", 200).await;
}
