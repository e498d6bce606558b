//! Who may ask for how much, over real sockets.

use orchestra_router::{RouterConfig, tenants::TenantConfig};

use crate::support::{Client, ask, config, get, start_with_worker, within};

const CHAT: &str = "/v1/chat/completions";

/// A request of whoever has the key, with further headers.
fn chat(key: &str, headers: &str, fields: &str) -> String {
    let body = format!(
        r#"{{"model": "org/tiny", "messages": [{{"role": "user", "content": "hi"}}]{fields}}}"#
    );
    let length = body.len();
    format!(
        "POST {CHAT} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
}

fn with_tenants() -> RouterConfig {
    RouterConfig {
        tenants: vec![
            TenantConfig {
                name: "small".to_owned(),
                api_keys: vec!["sk-small".into()],
                max_concurrent_requests: Some(1),
                ..TenantConfig::default()
            },
            TenantConfig {
                name: "other".to_owned(),
                api_keys: vec!["sk-other".into()],
                ..TenantConfig::default()
            },
        ],
        ..config()
    }
}

#[tokio::test]
async fn a_tenant_at_its_limit_is_told_which_and_when_to_come_again() {
    let (_router, addresses, mut worker) = start_with_worker(&with_tenants()).await;
    let stream = r#", "stream": true"#;
    let running = Client::send(addresses.http, chat("sk-small", "", stream)).await;
    worker.start().await;
    let refused = ask(addresses.http, chat("sk-small", "", "")).await;
    assert_eq!(
        (refused.status, refused.error().0.as_str()),
        (429, "queue_full")
    );
    let message = refused.json()["error"]["message"].to_string();
    assert!(message.contains("max_concurrent_requests"), "{message}");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.header("retry-after-ms"), Some("1000"));
    // The limit is its own, and its place is free again once it has left.
    let _other = Client::send(addresses.http, chat("sk-other", "", stream)).await;
    worker.start().await;
    drop(running);
    worker.abort().await;
    let _again = Client::send(addresses.http, chat("sk-small", "", stream)).await;
    worker.start().await;
    let stranger = ask(addresses.http, chat("sk-none", "", "")).await;
    assert_eq!(stranger.status, 401);
}

#[tokio::test]
async fn a_head_that_cannot_be_used_names_what_is_wrong() {
    let (_router, addresses, _worker) = start_with_worker(&config()).await;
    for (header, fields, param) in [
        ("x-orchestra-class: urgent\r\n", "", "x-orchestra-class"),
        ("x-request-timeout-ms: soon\r\n", "", "x-request-timeout-ms"),
        ("", r#", "service_tier": "gold""#, "service_tier"),
    ] {
        let answer = ask(addresses.http, chat("", header, fields)).await;
        let refused = ("invalid_request".to_owned(), Some(param.to_owned()));
        assert_eq!((answer.status, answer.error()), (400, refused));
    }
}

#[tokio::test]
async fn a_client_s_own_patience_ends_its_request() {
    let (_router, addresses, _worker) = start_with_worker(&config()).await;
    let hurried = chat("", "x-request-timeout-ms: 50\r\n", "");
    let answer = ask(addresses.http, hurried).await;
    let refused = (answer.status, answer.error().0);
    assert_eq!(refused, (504, "deadline_exceeded".to_owned()));
}

/// The one that waits is told nothing and holds nothing: its place in the queue is free as soon as its socket closes.
#[tokio::test]
async fn a_client_that_leaves_leaves_the_queue_too() {
    let mut config = config();
    config.corridor.max_concurrent_requests = 1;
    config.corridor.max_queued_requests = 1;
    let (_router, addresses, mut worker) = start_with_worker(&config).await;
    let running = Client::send(addresses.http, chat("", "", "")).await;
    worker.start().await;
    let waits_for = async |count: usize| {
        let line = format!("orchestra_requests_waiting {count}\n");
        let shown = async { while !get(addresses.http, "/metrics").await.body.contains(&line) {} };
        within("the queue's length", shown).await;
    };
    let leaving = Client::send(addresses.http, chat("", "", "")).await;
    waits_for(1).await;
    let refused = ask(addresses.http, chat("", "", "")).await;
    assert_eq!(refused.status, 429);
    drop(leaving);
    waits_for(0).await;
    let staying = Client::send(addresses.http, chat("", "", r#", "user": "staying""#)).await;
    waits_for(1).await;
    drop(running);
    worker.abort().await;
    // The worker hears of this one and never of the one that left.
    let start = worker.start().await;
    worker.finish(start.sequence_id, 0, "done").await;
    assert_eq!(staying.answer().await.status, 200);
}
