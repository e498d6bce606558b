//! Waiting for a worker with room.

use std::time::Duration;

use orchestra_core::{ErrorCode, scheduler::AdmissionClass, step::FinishReason};
use orchestra_proto::v1;
use orchestra_router::{
    caller::Caller,
    request::{GenerateInput, SamplingPatch},
    state::CorridorLimits,
};

use crate::support::{TestRouter, Worker, bytes, collect, hello, limits, text, within};

/// A worker that runs so many sequences at a time.
pub(crate) async fn small_worker(max_num_seqs: u32) -> (TestRouter, Worker) {
    let router = TestRouter::start(limits()).await;
    let hello = v1::WorkerHello {
        max_num_seqs,
        ..hello("w0")
    };
    let worker = router.attach_as(hello).await;
    (router, worker)
}

/// Lets a sequence that the worker runs end with this text.
pub(crate) async fn end_with(worker: &Worker, start: &v1::StartSequence, text: &str) {
    let id = start.sequence_id;
    let reason = v1::FinishReason::Length;
    worker.finish(id, 0, &bytes(text), reason).await;
}

#[tokio::test]
async fn a_request_waits_for_a_worker_with_room() {
    let (router, mut worker) = small_worker(1).await;
    let first = router.generate(text("1")).await.unwrap();
    let second = router.generate(text("2"));
    tokio::pin!(second);
    assert!(futures_util::poll!(second.as_mut()).is_pending());
    let start = worker.start().await;
    end_with(&worker, &start, "one").await;
    assert_eq!(collect(first, 1).await.unwrap()[0].text, "one");
    // Nobody reported anything: that the room is free is known from the end of what held it.
    let second = second.await.unwrap();
    let start = worker.start().await;
    assert_eq!(start.prompt_token_ids[1..], bytes("2"));
    end_with(&worker, &start, "two").await;
    let answer = &collect(second, 1).await.unwrap()[0];
    assert_eq!(answer.finish, Some(FinishReason::Length));
}

#[tokio::test]
async fn what_was_granted_to_one_who_left_goes_to_the_next() {
    let (router, mut worker) = small_worker(1).await;
    let running = router.generate(text("1")).await.unwrap();
    worker.start().await;
    let mut leaving = Box::pin(router.generate(text("2")));
    let staying = router.generate(text("3"));
    tokio::pin!(staying);
    assert!(futures_util::poll!(leaving.as_mut()).is_pending());
    assert!(futures_util::poll!(staying.as_mut()).is_pending());
    // The room is its from here on, and it has not looked.
    drop(running);
    worker.abort().await;
    drop(leaving);
    let _staying = staying.await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("3"));
}

#[tokio::test]
async fn a_worker_that_comes_serves_those_who_wait() {
    let (router, mut full) = small_worker(1).await;
    let _running = router.generate(text("1")).await.unwrap();
    full.start().await;
    let waiting = router.generate(text("2"));
    tokio::pin!(waiting);
    assert!(futures_util::poll!(waiting.as_mut()).is_pending());
    let mut other = router.attach("w1").await;
    let _served = waiting.await.unwrap();
    assert_eq!(other.start().await.prompt_token_ids[1..], bytes("2"));
}

#[tokio::test]
async fn all_choices_of_a_request_start_or_none() {
    let (router, mut worker) = small_worker(2).await;
    let four = GenerateInput {
        n: 4,
        ..text("four")
    };
    let running = router.generate(four.clone()).await.unwrap();
    for _ in 0..4 {
        worker.start().await;
    }
    // The next ones wait without holding anything of each other.
    let (mut second, mut third) = (
        Box::pin(router.generate(four.clone())),
        Box::pin(router.generate(four)),
    );
    assert!(futures_util::poll!(second.as_mut()).is_pending());
    assert!(futures_util::poll!(third.as_mut()).is_pending());
    drop(running);
    let second = within("the second", second).await.unwrap();
    drop(second);
    within("the third", third).await.unwrap();
}

/// Clients mostly give no `max_tokens`, which then is all that the context has left.
#[tokio::test]
async fn as_many_run_at_once_as_the_worker_takes_whatever_might_come_of_them() {
    let (router, mut worker) = small_worker(256).await;
    let open = || GenerateInput {
        sampling: SamplingPatch::default(),
        ..text("hello")
    };
    let mut running = Vec::new();
    for _ in 0..64 {
        running.push(router.generate(open()).await.unwrap());
        worker.start().await;
    }
    assert_eq!(router.metric("orchestra_requests_running"), Some(64));
}

#[tokio::test]
async fn a_worker_s_kv_is_not_promised_twice() {
    let router = TestRouter::start(limits()).await;
    let hello = v1::WorkerHello {
        num_blocks: 10,
        ..hello("w0")
    };
    let mut worker = router.attach_as(hello).await;
    let large = || GenerateInput {
        sampling: SamplingPatch {
            max_tokens: Some(64),
            ..SamplingPatch::default()
        },
        ..text("hello")
    };
    let first = router.generate(large()).await.unwrap();
    let _second = router.generate(large()).await.unwrap();
    let third = router.generate(large());
    tokio::pin!(third);
    assert!(futures_util::poll!(third.as_mut()).is_pending());
    worker.start().await;
    worker.start().await;
    drop(first);
    within("room", third).await.unwrap();
    let impossible = GenerateInput {
        sampling: SamplingPatch {
            max_tokens: Some(161),
            ..SamplingPatch::default()
        },
        ..text("hello")
    };
    let error = router.generate(impossible).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::ContextTooLong);
}

pub(crate) fn of_class(prompt: &str, class: AdmissionClass) -> GenerateInput {
    GenerateInput {
        caller: Caller {
            asked_class: Some(class),
            ..Caller::default()
        },
        ..text(prompt)
    }
}

#[tokio::test]
async fn the_urgent_go_first() {
    let (router, mut worker) = small_worker(1).await;
    let running = router.generate(text("1")).await.unwrap();
    worker.start().await;
    let mut batch = Box::pin(router.generate(of_class("batch", AdmissionClass::Batch)));
    let mut urgent = Box::pin(router.generate(of_class("urgent", AdmissionClass::Interactive)));
    assert!(futures_util::poll!(batch.as_mut()).is_pending());
    assert!(futures_util::poll!(urgent.as_mut()).is_pending());
    drop(running);
    worker.abort().await;
    let urgent = urgent.await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("urgent"));
    assert!(futures_util::poll!(batch.as_mut()).is_pending());
    drop(urgent);
    worker.abort().await;
    let _batch = batch.await.unwrap();
    assert_eq!(worker.start().await.prompt_token_ids[1..], bytes("batch"));
    let admitted = |class: &str| {
        let name = format!("orchestra_requests_admitted_total{{class=\"{class}\"}}");
        router.metric(&name)
    };
    let counts = ["interactive", "standard", "batch"].map(admitted);
    assert_eq!(counts, [Some(1), Some(1), Some(1)]);
}

#[tokio::test]
async fn a_full_queue_gives_way_to_the_urgent() {
    let bounds = CorridorLimits {
        max_concurrent_requests: 1,
        max_queued_requests: 2,
        ..limits()
    };
    let (router, mut worker) = TestRouter::with_worker(bounds).await;
    let _running = router.generate(text("1")).await.unwrap();
    worker.start().await;
    let waiting = |class| Box::pin(router.generate(of_class("x", class)));
    let mut batch = [AdmissionClass::Batch; 2].map(waiting);
    for request in &mut batch {
        assert!(futures_util::poll!(request.as_mut()).is_pending());
    }
    let mut standard = waiting(AdmissionClass::Standard);
    assert!(futures_util::poll!(standard.as_mut()).is_pending());
    // The newest of the lowest class has gone for it, and says when to come again.
    let [older, newer] = batch;
    let error = newer.await.err().unwrap();
    assert_eq!(error.code, ErrorCode::QueueFull);
    assert_eq!(error.retry_after_ms, Some(1000));
    assert_eq!(
        router.metric("orchestra_requests_displaced_total{class=\"batch\"}"),
        Some(1)
    );
    // Nobody of a lower class waits for this one to take the place of.
    let error = waiting(AdmissionClass::Batch).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::QueueFull);
    drop(older);
    let mut again = waiting(AdmissionClass::Batch);
    assert!(futures_util::poll!(again.as_mut()).is_pending());
}

#[tokio::test]
async fn a_first_token_that_is_wanted_soon_is_not_waited_for_in_vain() {
    let (router, mut worker) = small_worker(1).await;
    let _running = router.generate(text("1")).await.unwrap();
    worker.start().await;
    let mut hurried = text("2");
    hurried.caller.ttft_timeout = Some(Duration::from_millis(50));
    let error = router.generate(hurried).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
    assert_eq!(router.metric("orchestra_requests_waiting"), Some(0));
}
