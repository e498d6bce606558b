//! A request outlives its worker.

use std::time::Duration;

use orchestra_core::{ErrorCode, step::FinishReason};
use orchestra_proto::v1;
use orchestra_router::{corridor::TokenStream, request::GenerateInput, state::CorridorLimits};
use tonic::Code;

use crate::support::{TestRouter, Worker, bytes, collect, eventually, limits, next, text, tokens};

/// A request on one of two workers: its stream, the worker that runs it, the start it got, and the other worker.
async fn on_one_of_two(
    router: &TestRouter,
    request: GenerateInput,
) -> (TokenStream, Worker, v1::StartSequence, Worker) {
    let (mut a, mut b) = (router.attach("a").await, router.attach("b").await);
    let stream = router.generate(request).await.unwrap();
    tokio::select! {
        start = a.start() => (stream, a, start, b),
        start = b.start() => (stream, b, start, a),
    }
}

#[tokio::test]
async fn a_lost_worker_s_request_continues_on_another_where_it_was() {
    let router = TestRouter::start(limits()).await;
    let (mut stream, dying, first, mut other) = on_one_of_two(&router, text("prompt")).await;
    let mut output = tokens(first.sequence_id, 0, &bytes("one"));
    output.cached_tokens = 5;
    dying.output(output).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "one");
    // This may or may not arrive before the loss; in both cases the answer is the same.
    dying.tokens(first.sequence_id, 3, &bytes(" t")).await;
    drop(dying);

    let (answer, ()) = tokio::join!(collect(stream, 1), async {
        let second = other.start().await;
        assert_eq!(second.prompt_token_ids, first.prompt_token_ids);
        assert_eq!(
            second.sampling, first.sampling,
            "the same seed, the same everything"
        );
        let at = second.output_token_ids.len();
        assert!(at == 3 || at == 5, "{at}");
        assert_eq!(second.output_token_ids, bytes("one t")[..at]);
        other
            .tokens(second.sequence_id, at as u32, &bytes("one two")[at..])
            .await;
        other
            .finish(second.sequence_id, 7, &bytes("."), v1::FinishReason::Length)
            .await;
    });
    let answer = &answer.unwrap()[0];
    assert_eq!(answer.text, " two.");
    assert_eq!(answer.completion_tokens, 8, "those of both workers");
    assert_eq!(answer.cached_tokens, 5, "what the first worker had");
    assert_eq!(
        router.metric("orchestra_requests_finished_total{reason=\"length\"}"),
        Some(1)
    );
}

#[tokio::test]
async fn text_state_survives_a_replay() {
    let router = TestRouter::start(limits()).await;
    let request = GenerateInput {
        stop: vec!["STOP".to_owned()],
        ..text("x")
    };
    let (mut stream, dying, first, mut other) = on_one_of_two(&router, request).await;
    // Half a character, then half a stop string.
    dying.tokens(first.sequence_id, 0, &[0xE4, 0xB8]).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "");
    drop(dying);
    let (answer, ()) = tokio::join!(collect(stream, 1), async {
        let second = other.start().await;
        other.tokens(second.sequence_id, 2, &[0xAD]).await;
        other.tokens(second.sequence_id, 3, &bytes("STOP")).await;
    });
    let answer = &answer.unwrap()[0];
    assert_eq!(
        (answer.text.as_str(), answer.stop_string.as_deref()),
        ("中", Some("STOP"))
    );
}

#[tokio::test]
async fn the_only_worker_may_come_back() {
    let (router, mut worker) = TestRouter::with_worker(limits()).await;
    let mut stream = router.generate(text("x")).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("ab")).await;
    next(&mut stream).await.unwrap();
    drop(worker);
    eventually("the loss", || router.num_workers("tiny") == 0).await;
    assert!(!router.state.is_ready());

    let (answer, worker) = tokio::join!(collect(stream, 1), async {
        let mut worker = router.attach("w0").await;
        let again = worker.start().await;
        assert_eq!(again.output_token_ids, bytes("ab"));
        worker
            .finish(again.sequence_id, 2, &bytes("c"), v1::FinishReason::Length)
            .await;
        worker
    });
    assert_eq!(answer.unwrap()[0].text, "c");
    assert!(!worker.was_asked_for_files, "the router has them");
}

#[tokio::test]
async fn each_choice_is_replayed_on_its_own() {
    let router = TestRouter::start(limits()).await;
    let (mut a, mut b) = (router.attach("a").await, router.attach("b").await);
    let stream = router
        .generate(GenerateInput { n: 2, ..text("x") })
        .await
        .unwrap();
    // Equal workers get one choice each.
    let (on_a, on_b) = (a.start().await, b.start().await);
    a.tokens(on_a.sequence_id, 0, &bytes("a")).await;
    drop(a);
    let (answers, ()) = tokio::join!(collect(stream, 2), async {
        let moved = b.start().await;
        assert_eq!(moved.sampling, on_a.sampling);
        let at = moved.output_token_ids.len();
        b.finish(
            moved.sequence_id,
            at as u32,
            &bytes("aA")[at..],
            v1::FinishReason::Length,
        )
        .await;
        b.finish(on_b.sequence_id, 0, &bytes("bB"), v1::FinishReason::Length)
            .await;
    });
    let mut texts: Vec<_> = answers
        .unwrap()
        .into_iter()
        .map(|answer| answer.text)
        .collect();
    texts.sort_unstable();
    assert_eq!(texts, ["aA", "bB"]);
}

#[tokio::test]
async fn with_all_workers_gone_the_request_fails_after_its_wait() {
    let limits = CorridorLimits {
        replay_wait: Duration::from_millis(100),
        ..limits()
    };
    let (router, mut worker) = TestRouter::with_worker(limits).await;
    let mut stream = router.generate(text("x")).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("a")).await;
    next(&mut stream).await.unwrap();
    drop(worker);
    let error = next(&mut stream).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::WorkerFailed);
    assert!(
        collect(stream, 0).await.unwrap().is_empty(),
        "an error is the last item"
    );
    assert_eq!(
        router.metric("orchestra_requests_finished_total{reason=\"error\"}"),
        Some(1)
    );

    // The model is known and away, which is another thing than unknown.
    let error = router.generate(text("x")).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::NoWorkers);
    assert!(error.retry_after_ms.is_some());
    assert!(router.state.list_models().is_empty());
}

#[tokio::test]
async fn replays_are_bounded() {
    let limits = CorridorLimits {
        max_replays: 1,
        ..limits()
    };
    let router = TestRouter::start(limits).await;
    let (mut a, mut b) = (router.attach("a").await, router.attach("b").await);
    let _c = router.attach("c").await;
    let stream = router
        .generate(text("kills whoever runs it"))
        .await
        .unwrap();
    let (result, ()) = tokio::join!(collect(stream, 1), async {
        // Whichever of the three it is on: two losses are one too many.
        a.start().await;
        drop(a);
        b.start().await;
        drop(b);
    });
    assert_eq!(result.unwrap_err().code, ErrorCode::WorkerFailed);
}

#[tokio::test]
async fn a_refused_sequence_goes_to_another_worker() {
    let router = TestRouter::start(limits()).await;
    let (stream, full, start, mut other) = on_one_of_two(&router, text("x")).await;
    full.fail(
        start.sequence_id,
        "queue_full",
        "the queue holds 3 requests, its limit is 3",
    )
    .await;
    let (answer, ()) = tokio::join!(collect(stream, 1), async {
        let start = other.start().await;
        other
            .finish(start.sequence_id, 0, &bytes("ok"), v1::FinishReason::Length)
            .await;
    });
    assert_eq!(answer.unwrap()[0].text, "ok");
}

#[tokio::test]
async fn what_every_worker_refuses_is_refused_at_once() {
    let cases = [
        ("queue_full", ErrorCode::QueueFull),
        ("no_workers", ErrorCode::NoWorkers),
        ("preempted_out", ErrorCode::PreemptedOut),
        ("internal", ErrorCode::WorkerFailed),
    ];
    for (sent, expected) in cases {
        let (router, mut worker) = TestRouter::with_worker(limits()).await;
        let mut stream = router.generate(text("x")).await.unwrap();
        let start = worker.start().await;
        worker.fail(start.sequence_id, sent, "why").await;
        let error = next(&mut stream).await.unwrap_err();
        assert_eq!(error.code, expected, "{sent}");
        assert_eq!(
            error.retry_after_ms.is_some(),
            error.code.retryable(),
            "{sent}"
        );
    }
}

#[tokio::test]
async fn a_request_waits_where_its_worker_failed_and_is_about_to_leave() {
    for code in ["worker_failed", "shutting_down", "a code of tomorrow"] {
        let (router, mut failing) = TestRouter::with_worker(limits()).await;
        let mut stream = router.generate(text("x")).await.unwrap();
        let start = failing.start().await;
        failing.tokens(start.sequence_id, 0, &bytes("a")).await;
        next(&mut stream).await.unwrap();
        failing
            .fail(start.sequence_id, code, "the step failed")
            .await;
        // A report after the failure: once it shows, the failure has been taken in.
        failing
            .report(v1::LoadReport {
                num_waiting: 3,
                ..v1::LoadReport::default()
            })
            .await;
        let shown = "orchestra_worker_requests_waiting{worker=\"w0\"}";
        eventually("the report", || router.metric(shown) == Some(3)).await;
        assert!(
            futures_util::poll!(std::pin::pin!(next(&mut stream))).is_pending(),
            "{code}"
        );
        let (answer, _worker) = tokio::join!(collect(stream, 1), async {
            let mut worker = router.attach("w1").await;
            let again = worker.start().await;
            assert_eq!(again.output_token_ids, bytes("a"), "{code}");
            worker
                .finish(again.sequence_id, 1, &bytes("b"), v1::FinishReason::Length)
                .await;
            worker
        });
        assert_eq!(answer.unwrap()[0].text, "b", "{code}");
    }
}

#[tokio::test]
async fn an_error_that_no_worker_can_help_is_not_replayed() {
    let router = TestRouter::start(limits()).await;
    let (mut stream, worker, start, _other) = on_one_of_two(&router, text("x")).await;
    worker
        .fail(
            start.sequence_id,
            "invalid_request",
            "sampling.seed is not set",
        )
        .await;
    let error = next(&mut stream).await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::InvalidRequest, "sampling.seed is not set")
    );
}

#[tokio::test]
async fn a_worker_that_breaks_the_protocol_is_dropped_and_its_requests_go_on() {
    // After one good token: index, tokens and how many log-probabilities come next, and what is wrong with it.
    let violations: [(u32, &[u32], usize, &str); 6] = [
        (2, &[97], 1, "its tokens have a gap or a repeat"),
        (0, &[97], 1, "its tokens have a gap or a repeat"),
        (
            1,
            &[],
            0,
            "it sent an output with neither tokens nor an end",
        ),
        (1, &[1_000_000], 1, "it sent a token outside the vocabulary"),
        (
            1,
            &[97; 100],
            100,
            "it sent more tokens than were asked for",
        ),
        (1, &[97], 0, "its log-probabilities do not match its tokens"),
    ];
    let output = |sequence_id, first_index, token_ids: &[u32], num_logprobs| v1::SequenceOutput {
        logprobs: vec![v1::TokenLogprobs::default(); num_logprobs],
        ..tokens(sequence_id, first_index, token_ids)
    };
    for (first_index, token_ids, num_logprobs, what) in violations {
        let router = TestRouter::start(limits()).await;
        let mut request = text("x");
        request.sampling.logprobs = Some(0);
        let (mut stream, mut bad, first, mut good) = on_one_of_two(&router, request).await;
        bad.output(output(first.sequence_id, 0, &[97], 1)).await;
        next(&mut stream).await.unwrap();
        bad.output(output(
            first.sequence_id,
            first_index,
            token_ids,
            num_logprobs,
        ))
        .await;
        let status = bad.closed().await;
        assert_eq!(
            (status.code(), status.message()),
            (Code::InvalidArgument, what)
        );
        let (answer, ()) = tokio::join!(collect(stream, 1), async {
            let second = good.start().await;
            assert_eq!(second.output_token_ids, [97], "{what}");
            let mut end = output(second.sequence_id, 1, &[98], 1);
            end.set_finish_reason(v1::FinishReason::Length);
            good.output(end).await;
        });
        let finish = answer.unwrap()[0].finish;
        assert_eq!(finish, Some(FinishReason::Length), "{what}");
    }
}

#[tokio::test]
async fn a_request_that_has_begun_asks_a_busy_worker_again() {
    let impatient = CorridorLimits {
        max_replays: 0,
        ..limits()
    };
    let (router, mut worker) = TestRouter::with_worker(impatient).await;
    let mut stream = router.generate(text("prompt")).await.unwrap();
    let mut start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("one")).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "one");
    let (answer, ()) = tokio::join!(collect(stream, 1), async {
        // More often than it could be replayed: nothing was computed for it in between.
        for _ in 0..3 {
            worker.fail(start.sequence_id, "queue_full", "busy").await;
            start = worker.start().await;
            assert_eq!(start.output_token_ids, bytes("one"));
        }
        let reason = v1::FinishReason::Length;
        worker
            .finish(start.sequence_id, 3, &bytes("!"), reason)
            .await;
    });
    assert_eq!(answer.unwrap()[0].text, "!");
}

#[tokio::test]
async fn a_worker_that_stays_busy_ends_the_wait() {
    let impatient = CorridorLimits {
        replay_wait: Duration::from_millis(300),
        ..limits()
    };
    let (router, mut worker) = TestRouter::with_worker(impatient).await;
    let mut stream = router.generate(text("prompt")).await.unwrap();
    let start = worker.start().await;
    worker.tokens(start.sequence_id, 0, &bytes("one")).await;
    assert_eq!(next(&mut stream).await.unwrap().text, "one");
    worker.fail(start.sequence_id, "queue_full", "busy").await;
    let mut num_asked = 0;
    let error = loop {
        tokio::select! {
            chunk = next(&mut stream) => break chunk.unwrap_err(),
            start = worker.start() => {
                num_asked += 1;
                worker.fail(start.sequence_id, "queue_full", "busy").await;
            }
        }
    };
    assert_eq!(error.code, ErrorCode::QueueFull);
    assert!(num_asked > 0);
}
