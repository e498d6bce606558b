//! Batch requests give way to interactive ones and go on later.

use orchestra_core::scheduler::AdmissionClass;
use orchestra_proto::v1;
use orchestra_router::{corridor::TokenStream, request::GenerateInput, state::CorridorLimits};

use tokio::task::JoinSet;

use crate::{
    queue::{end_with, of_class, small_worker},
    support::{TestRouter, Worker, bytes, collect, eventually, limits, next, within},
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
    ] {
        let (router, mut worker) = small_worker(2).await;
        let mut full = Vec::new();
        for _ in 0..2 {
            full.push(router.generate(running.clone()).await.unwrap());
        }
        worker.start().await;
        worker.start().await;
        let mut urgent = Box::pin(router.generate(urgent()));
        assert!(futures_util::poll!(urgent.as_mut()).is_pending());
        assert_eq!(router.metric("orchestra_requests_preempted_total"), Some(0));
    }
}

/// Starts in the order of what they go on from.
fn by_output(mut starts: [v1::StartSequence; 2]) -> [v1::StartSequence; 2] {
    starts.sort_by_key(|start| start.output_token_ids.clone());
    starts
}

#[tokio::test]
async fn all_choices_give_way_together_and_each_goes_on_where_it_was() {
    let (router, mut worker) = small_worker(2).await;
    let two = GenerateInput { n: 2, ..batch() };
    let mut stream = router.generate(two).await.unwrap();
    let [a, b] = [worker.start().await, worker.start().await];
    worker.tokens(a.sequence_id, 0, &bytes("a1")).await;
    worker.tokens(b.sequence_id, 0, &bytes("b")).await;
    next(&mut stream).await.unwrap();
    next(&mut stream).await.unwrap();
    let mut reading = JoinSet::new();
    reading.spawn(async move { collect(stream, 2).await.unwrap() });
    let first = router.generate(urgent()).await.unwrap();
    let mut stopped = [worker.abort().await, worker.abort().await];
    stopped.sort_unstable();
    assert_eq!(stopped, [a.sequence_id, b.sequence_id]);
    let start = worker.start().await;
    eventually("the pause", || {
        router.metric("orchestra_requests_preempted_total") == Some(1)
    })
    .await;
    end_with(&worker, &start, "done").await;
    assert_eq!(collect(first, 1).await.unwrap()[0].text, "done");
    let resumed = by_output([worker.start().await, worker.start().await]);
    let outputs = resumed.each_ref().map(|start| &start.output_token_ids[..]);
    assert_eq!(outputs, [&bytes("a1")[..], &bytes("b")]);
    let seeds = |start: &v1::StartSequence| start.sampling.as_ref().unwrap().seed;
    assert_eq!(resumed.each_ref().map(seeds), [&a, &b].map(seeds));
    let reason = v1::FinishReason::Length;
    worker
        .finish(resumed[0].sequence_id, 2, &bytes("."), reason)
        .await;
    worker
        .finish(resumed[1].sequence_id, 1, &bytes("2"), reason)
        .await;
    let answers = within("the end", reading.join_next())
        .await
        .unwrap()
        .unwrap();
    let texts: Vec<_> = answers.iter().map(|answer| &*answer.text).collect();
    assert_eq!(texts, [".", "2"]);
    assert_eq!(router.metric("orchestra_requests_resumed_total"), Some(1));
    eventually("the end", || {
        router.metric("orchestra_requests_running") == Some(0)
    })
    .await;
}

#[tokio::test]
async fn a_choice_that_has_ended_stays_ended() {
    let (router, mut worker) = small_worker(2).await;
    let two = GenerateInput { n: 2, ..batch() };
    let stream = router.generate(two).await.unwrap();
    let mut reading = JoinSet::new();
    reading.spawn(async move { collect(stream, 2).await.unwrap() });
    let [a, b] = [worker.start().await, worker.start().await];
    let reason = v1::FinishReason::Length;
    worker
        .finish(a.sequence_id, 0, &bytes("whole"), reason)
        .await;
    worker.tokens(b.sequence_id, 0, &bytes("b")).await;
    eventually("the tokens", || {
        router.metric("orchestra_generation_tokens_total") == Some(6)
    })
    .await;
    // The first takes the room of the choice that has ended.
    let _easy = router.generate(urgent()).await.unwrap();
    worker.start().await;
    let first = router.generate(urgent()).await.unwrap();
    assert_eq!(worker.abort().await, b.sequence_id);
    let start = worker.start().await;
    drop(first);
    assert_eq!(worker.abort().await, start.sequence_id);
    let resumed = worker.start().await;
    assert_eq!(resumed.output_token_ids, bytes("b"));
    worker
        .finish(resumed.sequence_id, 1, &bytes("2"), reason)
        .await;
    let answers = within("the end", reading.join_next())
        .await
        .unwrap()
        .unwrap();
    let texts: Vec<_> = answers.iter().map(|answer| &*answer.text).collect();
    assert_eq!(texts, ["whole", "b2"]);
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
