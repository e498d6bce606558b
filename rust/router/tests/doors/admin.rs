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
    assert_eq!(
        ask(at.admin, with(key)).await.body,
        r#"{"workers":[],"engines":[]}"#
    );
    let page = format!("{key}origin: http://example.org\r\n");
    assert_eq!(ask(at.admin, with(&page)).await.status, 403);
    // The clients' door has none of it.
    assert_eq!(get(at.http, "/admin/workers").await.status, 404);
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

/// An address where nothing listens.
async fn nowhere() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn engines_are_added_drained_and_removed() {
    let (_router, at) = start(&config());
    let url = nowhere().await;
    let id = url.replace(':', "%3A").replace('/', "%2F");
    let body = format!(r#"{{"url": "{url}", "api_key": "sk-engine", "max_num_seqs": 7}}"#);
    let add = || ask(at.admin, post("/admin/workers", &body));
    assert_eq!(add().await.body, r#"{"status":"added"}"#);
    let again = add().await;
    assert_eq!(
        (again.status, again.error().1.as_deref()),
        (409, Some("url"))
    );

    let listed = get(at.admin, "/admin/workers").await;
    assert!(!listed.body.contains("sk-engine"), "{}", listed.body);
    let engine = &listed.json()["engines"][0];
    assert_eq!(engine["config"]["max_num_seqs"], 7);
    assert_eq!(
        (&engine["is_up"], &engine["is_draining"]),
        (&false.into(), &false.into())
    );
    let drained = ask(
        at.admin,
        order("POST", &format!("/admin/workers/{id}/drain")),
    )
    .await;
    assert_eq!(drained.status, 200);
    let listed = get(at.admin, "/admin/workers").await.json();
    assert_eq!(listed["engines"][0]["is_draining"], true);

    let removed = ask(at.admin, order("DELETE", &format!("/admin/workers/{id}"))).await;
    assert_eq!(removed.body, r#"{"status":"draining"}"#);
    let gone = async {
        while !get(at.admin, "/admin/workers")
            .await
            .body
            .contains(r#""engines":[]"#)
        {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    within("end of the engine", gone).await;
    let again = ask(
        at.admin,
        order("DELETE", &format!("/admin/workers/{id}?now=true")),
    )
    .await;
    assert_eq!(again.status, 404);

    for (body, param) in [
        (r#"{"url": "https://a:1"}"#, "url"),
        (
            r#"{"url": "http://a:1", "max_num_seqs": "x"}"#,
            "max_num_seqs",
        ),
        (
            r#"{"url": "http://a:1", "max_num_seqs": 0}"#,
            "engine.max_num_seqs",
        ),
        ("[]", "engine"),
    ] {
        let answer = ask(at.admin, post("/admin/workers", body)).await;
        assert_eq!(
            (answer.status, answer.error().1.as_deref()),
            (400, Some(param)),
            "{body}"
        );
    }
}

#[tokio::test]
async fn the_page_needs_no_key_and_what_it_shows_does() {
    let mut guarded = config();
    guarded.admin_keys = vec!["sesame".into()];
    let (_router, at) = start(&guarded);
    let page = get(at.admin, "/").await;
    assert_eq!(page.status, 200);
    let policy = page.header("content-security-policy");
    assert!(policy.is_some_and(|policy| policy.starts_with("default-src 'none'; ")));
    let linked: Vec<_> = page
        .body
        .split('"')
        .filter(|part| part.starts_with("/dashboard/"))
        .collect();
    assert_eq!(linked.len(), 3);
    for path in linked {
        assert_eq!(get(at.admin, path).await.status, 200, "{path}");
    }
    for path in ["/metrics", "/admin/workers"] {
        assert_eq!(get(at.admin, path).await.status, 401, "{path}");
        let with_key = head("GET", path, "authorization: Bearer sesame\r\n");
        assert_eq!(ask(at.admin, with_key).await.status, 200, "{path}");
    }
    assert_eq!(get(at.http, "/dashboard/page.js").await.status, 404);
}
