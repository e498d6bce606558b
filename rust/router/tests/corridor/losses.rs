//! Requests that come while a model's only worker is away wait for it, where it is likely to come back.

use std::time::Duration;

use futures_util::FutureExt as _;
use orchestra_core::ErrorCode;
use orchestra_proto::v1;
use orchestra_router::state::CorridorLimits;

use crate::{
    queue::{end_with, small_worker},
    support::{TestRouter, bytes, collect, eventually, hello, limits, text, within},
};

const SHORT: Duration = Duration::from_millis(100);

/// A router that lost its only worker.
async fn without_its_worker(limits: CorridorLimits) -> TestRouter {
    let (router, worker) = TestRouter::with_worker(limits).await;
    drop(worker);
    eventually("the loss", || !router.state.is_ready()).await;
    router
}

#[tokio::test]
async fn requests_wait_for_a_lost_worker_and_go_on_in_their_order() {
    let router = without_its_worker(limits()).await;
    let (mut first, mut second) = (
        router.generate(text("1")).boxed_local(),
        router.generate(text("2")).boxed_local(),
    );
    assert!((&mut first).now_or_never().is_none());
    assert!((&mut second).now_or_never().is_none());
    assert_eq!(router.metric("orchestra_requests_waiting"), Some(2));
    // A worker of another model is none of theirs.
    let _other = router
        .attach_as(v1::WorkerHello {
            model: "other".to_owned(),
            ..hello("other")
        })
        .await;
    assert!((&mut first).now_or_never().is_none());
    let mut back = router.attach("w0").await;
    let mut streams = Vec::new();
    for (request, prompt) in [(first, "1"), (second, "2")] {
        streams.push(within("worker", request).await.unwrap());
        let prompted = back.start().await.prompt_token_ids;
        assert!(prompted.ends_with(&bytes(prompt)), "{prompted:?}");
    }
    assert_eq!(router.metric("orchestra_requests_waiting"), Some(0));
}

#[tokio::test]
async fn who_waited_for_room_waits_for_the_worker_and_then_for_room() {
    let (router, mut full) = small_worker(1).await;
    let running = router.generate(text("1")).await.unwrap();
    full.start().await;
    let mut queued = router.generate(text("2")).boxed_local();
    assert!((&mut queued).now_or_never().is_none());
    drop(full);
    eventually("the loss", || !router.state.is_ready()).await;
    assert!((&mut queued).now_or_never().is_none());
    let back = v1::WorkerHello {
        max_num_seqs: 1,
        ..hello("w0")
    };
    let (mut back, answer) = tokio::join!(
        async {
            let mut back = router.attach_as(back).await;
            // The other one is not looked at before this has ended.
            let start = back.start().await;
            assert!(start.prompt_token_ids.ends_with(&bytes("1")));
            end_with(&back, &start, "one").await;
            back
        },
        collect(running, 1)
    );
    assert_eq!(answer.unwrap()[0].text, "one");
    let _second = within("room", queued).await.unwrap();
    assert!(back.start().await.prompt_token_ids.ends_with(&bytes("2")));
}

#[tokio::test]
async fn the_wait_ends_a_while_after_the_loss() {
    let limits = CorridorLimits {
        replay_wait: SHORT,
        ..limits()
    };
    let router = without_its_worker(limits).await;
    let error = within("answer", router.generate(text("x"))).await.err();
    assert_eq!(error.unwrap().code, ErrorCode::NoWorkers);
    // That while has passed for this one.
    let error = router.generate(text("x")).now_or_never().unwrap().err();
    assert_eq!(error.unwrap().code, ErrorCode::NoWorkers);
}

#[tokio::test]
async fn the_wait_ends_with_the_request_s_time() {
    let limits = CorridorLimits {
        request_timeout: SHORT,
        ..limits()
    };
    let router = without_its_worker(limits).await;
    let error = within("answer", router.generate(text("x"))).await.err();
    assert_eq!(error.unwrap().code, ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn the_wait_ends_with_the_router() {
    let router = without_its_worker(limits()).await;
    let (answer, ()) = tokio::join!(router.generate(text("x")), async {
        eventually("the wait", || {
            router.metric("orchestra_requests_waiting") == Some(1)
        })
        .await;
        within("shutdown", router.state.shut_down()).await;
    });
    assert_eq!(answer.err().unwrap().code, ErrorCode::NoWorkers);
}

#[tokio::test]
async fn so_many_wait_for_a_lost_worker_as_may_wait_at_all() {
    let limits = CorridorLimits {
        max_queued_requests: 1,
        ..limits()
    };
    let router = without_its_worker(limits).await;
    let mut waiting = router.generate(text("1")).boxed_local();
    assert!((&mut waiting).now_or_never().is_none());
    let refused = router.generate(text("2")).now_or_never().unwrap().err();
    let refused = refused.unwrap();
    assert_eq!(refused.code, ErrorCode::NoWorkers);
    assert!(refused.retry_after_ms.is_some());
    // Who leaves makes room.
    drop(waiting);
    assert!(router.generate(text("3")).now_or_never().is_none());
}

#[tokio::test]
async fn nobody_waits_for_a_worker_that_said_goodbye() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    worker.drain(&router).await;
    drop(worker);
    eventually("the end", || router.state.list_models().is_empty()).await;
    let error = router.generate(text("x")).now_or_never().unwrap().err();
    assert_eq!(error.unwrap().code, ErrorCode::NoWorkers);
}
