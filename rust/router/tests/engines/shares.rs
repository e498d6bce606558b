//! What tenants are charged for answers of engines decides whose request is next.

use std::net::SocketAddr;

use orchestra_router::{Router, RouterConfig, tenants::TenantConfig};
use serde_json::json;

use crate::support::{Call, Client, Engine, MODEL, config, delta, eventually, get, num_up, post};

/// One request at a time, and three tenants whose key is `sk-` and their name.
fn one_seat() -> RouterConfig {
    let tenant = |name: &str| TenantConfig {
        name: name.to_owned(),
        api_keys: vec![format!("sk-{name}").as_str().into()],
        ..TenantConfig::default()
    };
    let mut config = config();
    config.corridor.max_concurrent_requests = 1;
    config.tenants = ["first", "much", "little"].map(tenant).to_vec();
    config
}

/// Sends a chat of a tenant's and waits until so many wait.
async fn send(address: SocketAddr, tenant: &str, stream: bool, waiting: u32) -> Client {
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 500, "user": tenant, "stream": stream});
    let request = post("/v1/chat/completions", &body.to_string());
    let head = format!("\r\nauthorization: Bearer sk-{tenant}\r\n\r\n");
    let client = Client::send(address, request.replacen("\r\n\r\n", &head, 1)).await;
    eventually("its place in the queue", || async move {
        let metrics = get(address, "/metrics").await.body;
        metrics.contains(&format!("\norchestra_requests_waiting {waiting}\n"))
    })
    .await;
    client
}

/// Answers with so many tokens, in one piece or as a stream.
async fn answer(mut call: Call, num_tokens: u32) {
    let usage = json!({"prompt_tokens": 9, "completion_tokens": num_tokens});
    if call.json()["stream"] == true {
        call.begin_stream().await;
        call.event(&delta(0, "a", Some("stop"))).await;
        call.event(&json!({"choices": [], "usage": usage}).to_string())
            .await;
        call.finish_stream().await;
    } else {
        let body = json!({"choices": [{"index": 0, "message": {"content": "a"}}], "usage": usage});
        call.answer(200, &body.to_string()).await;
    }
}

/// Two tenants that wait all the while: whoever got fewer tokens is next, though the other asked first.
async fn who_got_less_is_next(stream: bool) {
    let mut engine = Engine::start().await;
    let mut config = one_seat();
    config.engines.urls = vec![engine.url().parse().unwrap()];
    let router = Router::start(&config).unwrap();
    let address = router.addresses().http;
    eventually("the engine", || async { num_up(&router) == 1 }).await;
    let mut clients = vec![send(address, "first", stream, 0).await];
    let mut call = engine.call().await;
    // Each answered request leaves another of its tenant's in the queue.
    for (tenant, waiting) in [("much", 1), ("little", 2), ("much", 3), ("little", 4)] {
        clients.push(send(address, tenant, stream, waiting).await);
    }
    let mut order = Vec::new();
    for num_tokens in [1, 400, 2] {
        answer(call, num_tokens).await;
        call = engine.call().await;
        order.push(call.json()["user"].as_str().unwrap().to_owned());
    }
    assert_eq!(order, ["much", "little", "little"]);
}

#[tokio::test]
async fn tokens_of_a_whole_answer_are_charged() {
    who_got_less_is_next(false).await;
}

#[tokio::test]
async fn tokens_of_a_stream_are_charged() {
    who_got_less_is_next(true).await;
}
