//! Workers come, go, hang, and say what they hold.

use std::time::Duration;

use orchestra_core::{block_hashes, hash::SeedParts};
use orchestra_proto::v1::{self, worker_message::Message as Up};
use orchestra_router::state::CorridorLimits;
use tonic::Code;

use crate::{
    fixtures::BOS,
    support::{
        MODEL, TestRouter, bytes, collect, eventually, hello, limits, model_files, next, text,
    },
};

/// The hashes of a prompt's full blocks, as the workers of these tests would have them.
fn hashes(prompt: &str) -> Vec<u64> {
    let seed = SeedParts {
        model: MODEL,
        weights_epoch: 7,
        ..SeedParts::default()
    }
    .seed();
    let token_ids = [vec![BOS], bytes(prompt)].concat();
    block_hashes(seed, &token_ids, 16)
        .into_iter()
        .map(|hash| hash.0)
        .collect()
}

#[tokio::test]
async fn a_request_goes_to_the_worker_that_holds_its_prefix() {
    let prompt = "0123456789".repeat(20);
    let router = TestRouter::start(limits()).await;
    let _other = router.attach("a").await;
    let mut by_event = router.attach("b").await;
    by_event.kv_stored(hashes(&prompt)).await;
    // A report after the event: once it shows, the event has been taken in.
    by_event
        .report(v1::LoadReport {
            num_waiting: 3,
            ..v1::LoadReport::default()
        })
        .await;
    let shown = "orchestra_worker_requests_waiting{worker=\"b\"}";
    eventually("the report", || router.metric(shown) == Some(3)).await;
    let _stream = router.generate(text(&prompt)).await.unwrap();
    by_event.start().await;

    // With its first message a worker says what it holds already.
    let longer = format!("{prompt}{prompt}");
    let held = v1::WorkerHello {
        block_hashes: hashes(&longer),
        ..hello("c")
    };
    let mut by_hello = router.attach_as(held).await;
    let _stream = router.generate(text(&longer)).await.unwrap();
    by_hello.start().await;
}

#[tokio::test]
async fn a_gap_in_the_kv_events_ends_the_stream() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    worker.kv_stored(vec![1]).await;
    worker.skip_kv_events(1);
    worker.kv_stored(vec![2]).await;
    let status = worker.closed().await;
    assert_eq!(status.code(), Code::DataLoss);
    assert_eq!(
        status.message(),
        "KV events number 3 came where number 2 was due"
    );
    eventually("the loss", || router.num_workers(MODEL) == 0).await;
}

#[tokio::test]
async fn more_cached_blocks_than_there_are_end_the_stream() {
    let (_router, mut worker) = TestRouter::with_worker(limits()).await;
    worker.kv_stored((0..1001).collect()).await;
    assert_eq!(worker.closed().await.code(), Code::DataLoss);
}

#[tokio::test]
async fn a_worker_that_dials_again_replaces_its_old_stream() {
    let (router, mut old) = TestRouter::with_worker(limits()).await;
    let mut stream = router.generate(text("x")).await.unwrap();
    let first = old.start().await;
    old.tokens(first.sequence_id, 0, &bytes("a")).await;
    next(&mut stream).await.unwrap();

    // The old stream is half-open: the router has not heard that it is dead.
    let mut new = router.dial(hello("w0"), model_files()).await.unwrap();
    assert!(!new.was_asked_for_files);
    assert_eq!(old.closed().await.code(), Code::Aborted);
    assert_eq!(router.num_workers(MODEL), 1);
    let (answer, ()) = tokio::join!(collect(stream, 1), async {
        let second = new.start().await;
        assert_eq!(second.output_token_ids, bytes("a"));
        new.finish(second.sequence_id, 1, &bytes("b"), v1::FinishReason::Length)
            .await;
    });
    assert_eq!(answer.unwrap()[0].text, "b");
    // What the old stream still sends reaches nobody.
    old.tokens(first.sequence_id, 1, &bytes("z")).await;
    assert_eq!(router.metric("orchestra_workers"), Some(1));
}

#[tokio::test]
async fn a_silent_worker_is_lost() {
    let limits = CorridorLimits {
        heartbeat_timeout: Duration::from_millis(100),
        ..limits()
    };
    let (router, mut worker) = TestRouter::with_worker(limits).await;
    let mut stream = router.generate(text("x")).await.unwrap();
    worker.start().await;
    let status = worker.closed().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        status.message().contains("heartbeat"),
        "{}",
        status.message()
    );
    assert_eq!(router.num_workers(MODEL), 0);
    let (chunk, _worker) = tokio::join!(next(&mut stream), async {
        let mut worker = router.attach("w1").await;
        let start = worker.start().await;
        worker.tokens(start.sequence_id, 0, &bytes("a")).await;
        worker
    });
    assert_eq!(chunk.unwrap().text, "a");
}

#[tokio::test]
async fn a_worker_that_makes_no_step_is_lost() {
    let limits = CorridorLimits {
        heartbeat_timeout: Duration::from_secs(1),
        hang_timeout: Duration::from_millis(600),
        ..limits()
    };
    let (_router, mut worker) = TestRouter::with_worker(limits).await;
    let stuck = v1::LoadReport {
        num_running: 1,
        steps: 9,
        ..v1::LoadReport::default()
    };
    let status = loop {
        worker.report(stuck).await;
        tokio::select! {
            status = worker.closed() => break status,
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("step"), "{}", status.message());
}

#[tokio::test]
async fn preemptions_are_counted_from_the_first_report_on() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let counted = || router.metric("orchestra_preemptions_total");
    for (preemptions, total) in [(5, 5), (5, 5), (7, 7)] {
        worker
            .report(v1::LoadReport {
                preemptions,
                ..v1::LoadReport::default()
            })
            .await;
        eventually("the count", || counted() == Some(total)).await;
    }
    // Back with a running count: what it had before is counted already.
    drop(worker);
    eventually("the loss", || router.num_workers(MODEL) == 0).await;
    let mut again = router.dial(hello("w0"), model_files()).await.unwrap();
    for preemptions in [7, 8] {
        again
            .report(v1::LoadReport {
                preemptions,
                ..v1::LoadReport::default()
            })
            .await;
    }
    eventually("the count", || counted() == Some(8)).await;
}

#[tokio::test]
async fn a_bad_hello_is_answered_with_what_is_wrong() {
    let router = TestRouter::start(limits()).await;
    let bad = v1::WorkerHello {
        block_size: 12,
        ..hello("w0")
    };
    let status = router.dial_refused(bad, model_files()).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("block_size"),
        "{}",
        status.message()
    );

    let not_json = v1::ModelFiles {
        tokenizer_json: b"{".to_vec(),
        ..model_files()
    };
    let status = router.dial_refused(hello("w0"), not_json).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("tokenizer.json"),
        "{}",
        status.message()
    );
    assert!(router.state.list_models().is_empty());

    let mut worker = router.attach("w0").await;
    worker.send(Up::Hello(hello("w0"))).await;
    assert_eq!(worker.closed().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn workers_of_one_model_agree_on_its_files() {
    let router = TestRouter::start(limits()).await;
    let first = router.attach("a").await;
    let other_files = || v1::WorkerHello {
        model_files_digest: "other".to_owned(),
        ..hello("b")
    };
    let status = router.dial_refused(other_files(), model_files()).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("model_files_digest"),
        "{}",
        status.message()
    );
    let other_vocabulary = v1::WorkerHello {
        vocab_size: 9,
        ..hello("b")
    };
    let status = router.dial_refused(other_vocabulary, model_files()).await;
    assert!(
        status.message().contains("vocab_size"),
        "{}",
        status.message()
    );
    // Once the others have left, the new files are the model's.
    drop(first);
    eventually("the loss", || router.num_workers(MODEL) == 0).await;
    let second = router.attach_as(other_files()).await;
    assert!(second.was_asked_for_files);
}

#[tokio::test]
async fn models_are_listed_with_what_their_workers_allow() {
    let router = TestRouter::start(limits()).await;
    assert!(!router.state.is_ready());
    let _a = router.attach("a").await;
    let small = v1::WorkerHello {
        num_blocks: 4,
        ..hello("b")
    };
    let b = router.attach_as(small.clone()).await;
    let _c = router
        .attach_as(v1::WorkerHello {
            model: "another".to_owned(),
            worker_id: "c".to_owned(),
            ..small
        })
        .await;
    let listed = || {
        let models = router.state.list_models().into_iter();
        models
            .map(|model| (model.id, model.max_model_len, model.num_workers))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        listed(),
        [("another".to_owned(), 64, 1), (MODEL.to_owned(), 4096, 2)]
    );
    assert!(router.state.is_ready());
    drop(b);
    eventually("the loss", || router.num_workers(MODEL) == 1).await;
}
