//! How many requests run and wait, how long, and how the router stops.

use std::time::Duration;

use orchestra_core::{ErrorCode, step::FinishReason};
use orchestra_proto::v1;
use orchestra_router::{request::GenerateInput, state::CorridorLimits};
use tonic::Code;

use crate::support::{TestRouter, bytes, collect, eventually, limits, next, text, within};

fn one_at_a_time(max_queued_requests: usize) -> CorridorLimits {
    CorridorLimits {
        max_concurrent_requests: 1,
        max_queued_requests,
        ..limits()
    }
}

#[tokio::test]
async fn a_full_queue_refuses_and_the_rest_is_served_in_order() {
    let (router, mut worker) = TestRouter::with_worker(one_at_a_time(2)).await;
    let first = router.generate(text("1")).await.unwrap();
    let second = router.generate(text("2"));
    let third = router.generate(text("3"));
    tokio::pin!(second, third);
    // Polled once each, in this order, they are in the queue.
    assert!(futures_util::poll!(second.as_mut()).is_pending());
    assert!(futures_util::poll!(third.as_mut()).is_pending());
    assert_eq!(router.metric("orchestra_requests_waiting"), Some(2));
    let error = router.generate(text("4")).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::QueueFull);
    assert!(error.retry_after_ms.is_some());
    assert_eq!(
        error.message,
        "there are 2 waiting requests, the limit is 2"
    );

    worker.start().await;
    drop(first);
    worker.abort().await;
    let second = second.await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("2"));
    assert!(futures_util::poll!(third.as_mut()).is_pending());
    drop(second);
    worker.abort().await;
    let _third = third.await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("3"));
    assert_eq!(router.metric("orchestra_requests_waiting"), Some(0));
}

#[tokio::test]
async fn a_caller_that_leaves_leaves_the_queue_at_once() {
    let (router, _worker) = TestRouter::with_worker(one_at_a_time(1)).await;
    let running = router.generate(text("1")).await.unwrap();
    {
        let leaving = router.generate(text("2"));
        tokio::pin!(leaving);
        assert!(futures_util::poll!(leaving.as_mut()).is_pending());
        assert_eq!(
            router.generate(text("3")).await.err().unwrap().code,
            ErrorCode::QueueFull
        );
    }
    let staying = router.generate(text("4"));
    tokio::pin!(staying);
    assert!(futures_util::poll!(staying.as_mut()).is_pending());
    drop(running);
    staying.await.unwrap();
}

#[tokio::test]
async fn the_deadline_holds_in_the_queue_and_in_the_stream() {
    let (router, mut worker) = TestRouter::with_worker(one_at_a_time(1)).await;
    let hurried = || GenerateInput {
        timeout: Some(Duration::from_millis(50)),
        ..text("x")
    };
    let running = router.generate(text("1")).await.unwrap();
    worker.start().await;
    let error = router.generate(hurried()).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
    drop(running);
    worker.abort().await;

    let mut stream = router.generate(hurried()).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("a")).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "a");
    assert_eq!(
        next(&mut stream).await.unwrap_err().code,
        ErrorCode::DeadlineExceeded
    );
    assert_eq!(worker.abort().await, start.sequence_id);
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_nothing_past_its_deadline() {
    let (router, mut worker) = TestRouter::with_worker(one_at_a_time(1)).await;
    let hurried = GenerateInput {
        timeout: Some(Duration::from_millis(50)),
        ..text("1")
    };
    let mut unread = router.generate(hurried).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("a")).await;
    assert_eq!(worker.abort().await, start.sequence_id);
    // Its seat is free, though its stream is still there.
    let _second = router.generate(text("2")).await.unwrap();
    worker.start().await;
    let running = || router.metric("orchestra_requests_running");
    eventually("the first one's end", || running() == Some(1)).await;
    // What came in time is read late.
    assert_eq!(next(&mut unread).await.unwrap().text, "a");
    let error = next(&mut unread).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn a_client_cannot_ask_for_more_time_than_the_router_gives() {
    let limits = CorridorLimits {
        request_timeout: Duration::from_millis(50),
        ..limits()
    };
    let (router, _worker) = TestRouter::with_worker(limits).await;
    let patient = GenerateInput {
        timeout: Some(Duration::from_secs(3600)),
        ..text("x")
    };
    // On a slow machine the time may be over before the stream begins.
    let outcome = match router.generate(patient).await {
        Ok(mut stream) => next(&mut stream).await,
        Err(error) => Err(error),
    };
    assert_eq!(outcome.unwrap_err().code, ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn draining_refuses_the_new_and_finishes_the_old() {
    let (router, mut worker) = TestRouter::with_worker(one_at_a_time(1)).await;
    let running = router.generate(text("1")).await.unwrap();
    let queued = router.generate(text("2"));
    tokio::pin!(queued);
    assert!(futures_util::poll!(queued.as_mut()).is_pending());
    assert!(router.state.is_ready());
    router.state.begin_drain();
    assert!(!router.state.is_ready());
    assert_eq!(
        router.generate(text("3")).await.err().unwrap().code,
        ErrorCode::ShuttingDown
    );

    let drained = router.state.drained();
    tokio::pin!(drained);
    assert!(futures_util::poll!(drained.as_mut()).is_pending());
    let start = worker.start().await;
    worker
        .finish(
            start.sequence_id,
            0,
            &bytes("one"),
            v1::FinishReason::Length,
        )
        .await;
    assert_eq!(collect(running, 1).await.unwrap()[0].text, "one");
    let queued = queued.await.unwrap();
    let start = worker.start().await;
    assert!(futures_util::poll!(drained.as_mut()).is_pending());
    worker
        .finish(
            start.sequence_id,
            0,
            &bytes("two"),
            v1::FinishReason::Length,
        )
        .await;
    let answer = &collect(queued, 1).await.unwrap()[0];
    assert_eq!(
        (answer.text.as_str(), answer.finish),
        ("two", Some(FinishReason::Length))
    );
    within("drain", drained).await;
}

#[tokio::test]
async fn shutting_down_ends_streams_and_sessions() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut stream = router.generate(text("1")).await.unwrap();
    worker.start().await;
    within("shutdown", router.state.shut_down()).await;
    assert_eq!(
        next(&mut stream).await.unwrap_err().code,
        ErrorCode::ShuttingDown
    );
    assert_eq!(worker.closed().await.code(), Code::Unavailable);
    let refused = router
        .dial(crate::support::hello("late"), crate::support::model_files())
        .await;
    assert_eq!(refused.err().unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_draining_worker_gets_nothing_new() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    worker.drain(&router).await;
    assert_eq!(
        router.generate(text("x")).await.err().unwrap().code,
        ErrorCode::NoWorkers
    );
    worker.report(v1::LoadReport::default()).await;
    eventually("the return", || router.state.is_ready()).await;
    router.generate(text("x")).await.unwrap();
}
