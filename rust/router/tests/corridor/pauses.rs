//! Batch requests give way to interactive ones and go on later.

use orchestra_core::scheduler::AdmissionClass;
use orchestra_proto::v1;
use orchestra_router::{corridor::TokenStream, request::GenerateInput, state::CorridorLimits};

use tokio::task::JoinSet;

use crate::{
    queue::{end_with, of_class, small_worker},
    support::{TestRouter, Worker, bytes, collect, eventually, limits, next},
};

fn batch() -> GenerateInput {
    of_class("batch", AdmissionClass::Batch)
}

fn urgent() -> GenerateInput {
    of_class("urgent", AdmissionClass::Interactive)
}

/// Reads the stream beside what follows, as a client does: a request that nobody reads cannot go on.
fn read(stream: TokenStream) -> JoinSet<String> {
    let mut reading = JoinSet::new();
    reading.spawn(async move { collect(stream, 1).await.unwrap().remove(0).text });
    reading
}

async fn text_of(mut reading: JoinSet<String>) -> String {
    reading.join_next().await.unwrap().unwrap()
}

/// A batch request that has got as far as "one", and its worker.
async fn running_batch(router: &TestRouter, worker: &mut Worker) -> (TokenStream, u64) {
    let mut stream = router.generate(batch()).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("one")).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "one");
    (stream, start.sequence_id)
}

#[tokio::test]
async fn a_batch_request_gives_way_and_goes_on_where_it_was() {
    let (router, mut worker) = small_worker(1).await;
    let (stream, sequence) = running_batch(&router, &mut worker).await;
    let answer = read(stream);
    let first = router.generate(urgent()).await.unwrap();
    // The worker hears of the end before it hears of the other one.
    assert_eq!(worker.abort().await, sequence);
    let start = worker.start().await;
    assert_eq!(start.prompt_token_ids[1..], bytes("urgent"));
    // What was on its way from the worker when it was stopped comes again from where it goes on.
    worker.tokens(sequence, 3, &bytes(" late")).await;
    eventually("the pause", || {
        router.metric("orchestra_requests_waiting") == Some(0)
            && router.metric("orchestra_requests_preempted_total") == Some(1)
    })
    .await;
    assert_eq!(router.metric("orchestra_requests_running"), Some(1));
    end_with(&worker, &start, "done").await;
    assert_eq!(collect(first, 1).await.unwrap()[0].text, "done");
    let resumed = worker.start().await;
    assert_eq!(resumed.prompt_token_ids[1..], bytes("batch"));
    assert_eq!(resumed.output_token_ids, bytes("one"));
    let reason = v1::FinishReason::Length;
    worker
        .finish(resumed.sequence_id, 3, &bytes(" two"), reason)
        .await;
    assert_eq!(text_of(answer).await, " two");
    assert_eq!(router.metric("orchestra_requests_resumed_total"), Some(1));
    eventually("the end", || {
        router.metric("orchestra_requests_running") == Some(0)
    })
    .await;
}

#[tokio::test]
async fn a_seat_is_given_up_too() {
    let one = CorridorLimits {
        max_concurrent_requests: 1,
        ..limits()
    };
    let (router, mut worker) = TestRouter::with_worker(one).await;
    let (stream, sequence) = running_batch(&router, &mut worker).await;
    let answer = read(stream);
    let urgent = router.generate(urgent()).await.unwrap();
    assert_eq!(worker.abort().await, sequence);
    let start = worker.start().await;
    drop(urgent);
    assert_eq!(worker.abort().await, start.sequence_id);
    let resumed = worker.start().await;
    assert_eq!(resumed.output_token_ids, bytes("one"));
    let reason = v1::FinishReason::Length;
    worker
        .finish(resumed.sequence_id, 3, &bytes("."), reason)
        .await;
    assert_eq!(text_of(answer).await, ".");
}

#[tokio::test]
async fn nobody_gives_way_for_ever() {
    let (router, mut worker) = small_worker(1).await;
    let (stream, mut sequence) = running_batch(&router, &mut worker).await;
    let answer = read(stream);
    for _ in 0..3 {
        let urgent = router.generate(urgent()).await.unwrap();
        assert_eq!(worker.abort().await, sequence);
        let start = worker.start().await;
        drop(urgent);
        assert_eq!(worker.abort().await, start.sequence_id);
        sequence = worker.start().await.sequence_id;
    }
    let mut urgent = Box::pin(router.generate(urgent()));
    assert!(futures_util::poll!(urgent.as_mut()).is_pending());
    let reason = v1::FinishReason::Length;
    worker.finish(sequence, 3, &bytes("."), reason).await;
    assert_eq!(text_of(answer).await, ".");
    let _urgent = urgent.await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("urgent"));
}

#[tokio::test]
async fn others_do_not_give_way() {
    for running in [
        of_class("x", AdmissionClass::Standard),
        of_class("x", AdmissionClass::Interactive),
        GenerateInput { n: 2, ..batch() },
    ] {
        let (router, mut worker) = small_worker(2).await;
        let mut full = Vec::new();
        for _ in 0..2 / running.n {
            full.push(router.generate(running.clone()).await.unwrap());
        }
        worker.start().await;
        worker.start().await;
        let mut urgent = Box::pin(router.generate(urgent()));
        assert!(futures_util::poll!(urgent.as_mut()).is_pending());
        assert_eq!(router.metric("orchestra_requests_preempted_total"), Some(0));
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_the_pause_leaves_the_queue() {
    let (router, mut worker) = small_worker(1).await;
    let (stream, sequence) = running_batch(&router, &mut worker).await;
    let mut reading = read(stream);
    let urgent = router.generate(urgent()).await.unwrap();
    assert_eq!(worker.abort().await, sequence);
    let start = worker.start().await;
    eventually("the pause", || {
        router.metric("orchestra_requests_preempted_total") == Some(1)
    })
    .await;
    reading.shutdown().await;
    drop(urgent);
    assert_eq!(worker.abort().await, start.sequence_id);
    // The next to start is the next to ask.
    let _next = router
        .generate(of_class("next", AdmissionClass::Batch))
        .await
        .unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("next"));
}

#[tokio::test]
async fn a_paused_request_whose_worker_goes_waits_for_another() {
    let (router, mut worker) = small_worker(1).await;
    let (stream, sequence) = running_batch(&router, &mut worker).await;
    let answer = read(stream);
    let _urgent = router.generate(urgent()).await.unwrap();
    assert_eq!(worker.abort().await, sequence);
    worker.start().await;
    drop(worker);
    eventually("the loss", || !router.state.is_ready()).await;
    let mut other = router.attach("w1").await;
    let resumed = loop {
        let start = other.start().await;
        if start.prompt_token_ids[1..] == bytes("batch") {
            break start;
        }
    };
    assert_eq!(resumed.output_token_ids, bytes("one"));
    let reason = v1::FinishReason::Length;
    other
        .finish(resumed.sequence_id, 3, &bytes("!"), reason)
        .await;
    assert_eq!(text_of(answer).await, "!");
}
