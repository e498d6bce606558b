//! How a router stops.

use std::{future::pending, time::Duration};

use orchestra_router::{Router, RunError, config::Span};
use tokio::net::TcpStream;

use crate::support::{
    Client, MODEL, ask, config, eventually, post, start, start_with_worker, within,
};

fn stream() -> String {
    let body = format!(r#"{{"model": "{MODEL}", "prompt": "x", "stream": true}}"#);
    post("/v1/completions", &body)
}

#[tokio::test]
async fn running_requests_finish_and_new_ones_are_refused() {
    let (router, at, mut worker) = start_with_worker(&config()).await;
    let mut running = Client::send(at.http, stream()).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;

    let stopping = tokio::spawn(router.stop(pending()));
    eventually(at.http, "/ready", 503).await;
    let refused = ask(at.http, stream()).await;
    assert_eq!(
        (refused.status, refused.error().0.as_str()),
        (503, "shutting_down")
    );
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(!stopping.is_finished());

    worker.finish(start.sequence_id, 3, "two").await;
    running.until("data: [DONE]\n\n").await;
    within("stop", stopping).await.unwrap();
    for address in [at.http, at.grpc, at.workers, at.admin] {
        assert!(
            TcpStream::connect(address).await.is_err(),
            "{address} still accepts"
        );
    }
}

#[tokio::test]
async fn what_does_not_finish_in_time_ends_with_an_error() {
    let mut config = config();
    config.listen.drain_timeout = Span(Duration::from_millis(50));
    let (router, at, mut worker) = start_with_worker(&config).await;
    let mut running = Client::send(at.http, stream()).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;
    let stopping = tokio::spawn(router.stop(pending()));
    running.until("\"code\":\"shutting_down\"").await;
    within("stop", stopping).await.unwrap();
}

#[tokio::test]
async fn a_second_signal_does_not_wait() {
    let (router, at, mut worker) = start_with_worker(&config()).await;
    let _running = Client::send(at.http, stream()).await;
    worker.start().await;
    within("stop", router.stop(async {})).await;
}

#[tokio::test]
async fn a_router_that_cannot_start_says_why_and_leaves_nothing_open() {
    let (_router, at) = start(&config());
    let mut taken = config();
    taken.listen.workers = at.workers;
    let error = Router::start(&taken).err().unwrap();
    assert!(
        matches!(error, RunError::Bind { address, .. } if address == at.workers),
        "{error}"
    );

    let mut wrong = config();
    wrong.listen.max_connections = 0;
    wrong.listen.body_timeout = Span(Duration::ZERO);
    let RunError::Config(issues) = Router::start(&wrong).err().unwrap() else {
        panic!("started")
    };
    assert_eq!(issues.len(), 2);
}
