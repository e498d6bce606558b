//! Many requests over workers that come and go: every token arrives once, in order, whoever drew it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use orchestra_core::{TokenId, step::FinishReason};
use orchestra_proto::v1::{self, WorkerRole, router_message::Message as Down};
use orchestra_router::state::CorridorLimits;
use tokio::task::JoinSet;

use crate::{
    moves::kv_hello,
    support::{TestRouter, Worker, collect, eventually, hello, limits, text, tokens},
};

const REQUESTS: u32 = 60;
const TOKENS: u32 = 40;
const WORKERS: u64 = 3;

/// The token at `index` of the sequence drawn with `seed`: what a model does, a function of seed and position.
fn token(seed: u64, index: u32) -> TokenId {
    97 + ((seed * 31 + u64::from(index) * 7) % 26) as TokenId
}

struct Sequence {
    id: u64,
    /// It only computes a prompt for another worker.
    is_helper: bool,
    seed: u64,
    index: u32,
    max_tokens: u32,
}

/// Runs a worker for `steps` messages, then breaks it off in the middle of whatever it does.
async fn run_for(worker: &mut Worker, steps: u32) {
    let mut running: Vec<Sequence> = Vec::new();
    for step in 0..steps {
        // Take in what is there; wait only where there is nothing to do.
        tokio::select! {
            biased;
            message = worker.next() => match message {
                Ok(Down::Start(start)) => running.push(Sequence {
                    id: start.sequence_id,
                    is_helper: start.kv_target.is_some(),
                    seed: start.sampling.as_ref().unwrap().seed(),
                    index: start.output_token_ids.len() as u32,
                    max_tokens: start.sampling.as_ref().unwrap().max_tokens(),
                }),
                Ok(Down::Abort(abort)) => running.retain(|sequence| sequence.id != abort.sequence_id),
                Ok(Down::Welcome(_) | Down::FromPeer(_) | Down::Keeper(_)) => {}
                Err(status) => panic!("the router let go: {status}"),
            },
            () = std::future::ready(()), if !running.is_empty() => {}
        }
        for sequence in &mut running {
            if sequence.is_helper {
                end_help(worker, sequence, step).await;
                continue;
            }
            let count = (1 + step % 3).min(sequence.max_tokens - sequence.index);
            let new: Vec<_> = (0..count)
                .map(|i| token(sequence.seed, sequence.index + i))
                .collect();
            let mut output = tokens(sequence.id, sequence.index, &new);
            sequence.index += count;
            if sequence.index == sequence.max_tokens {
                output.set_finish_reason(v1::FinishReason::Length);
            }
            worker.output(output).await;
        }
        running.retain(|sequence| sequence.index < sequence.max_tokens);
    }
}

/// Now and then it fails, or takes another step.
async fn end_help(worker: &Worker, sequence: &mut Sequence, step: u32) {
    match step % 5 {
        0 => worker.fail(sequence.id, "queue_full", "busy").await,
        1 => return,
        _ => {
            let reason = v1::FinishReason::Prefilled;
            worker.finish(sequence.id, 0, &[], reason).await;
        }
    }
    sequence.index = sequence.max_tokens;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_token_is_lost_repeated_or_out_of_order() {
    run(|number| hello(&format!("w{number}")), "x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_where_workers_compute_prompts_for_each_other() {
    let roles = [WorkerRole::Prefill, WorkerRole::Decode, WorkerRole::Decode];
    let hello = move |number: u64| kv_hello(&format!("w{number}"), roles[number as usize]);
    let router = run(hello, &"long".repeat(100)).await;
    let outcomes = ["moved", "computed", "abandoned"];
    let labels =
        |outcome: &str| format!("orchestra_kv_moves_total{{kind=\"split\",outcome=\"{outcome}\"}}");
    let counts = outcomes.map(|outcome| router.metric(&labels(outcome)).unwrap());
    assert!(counts.iter().sum::<i64>() > 0, "nothing was split");
}

/// A client's request, and every token that it has to give.
async fn ask(router: Arc<TestRouter>, prompt: String, request: u32) {
    let mut input = text(&prompt);
    input.n = 1 + request % 2;
    input.sampling.seed = Some(u64::from(request) * 100);
    input.sampling.max_tokens = Some(TOKENS);
    // At this moment there may be no worker at all; a client would try again.
    let stream = loop {
        match router.generate(input.clone()).await {
            Ok(stream) => break stream,
            Err(error) => assert!(error.code.retryable(), "{error}"),
        }
        tokio::task::yield_now().await;
    };
    let answers = collect(stream, input.n as usize).await.unwrap();
    for (choice, answer) in (0..).zip(answers) {
        let seed = u64::from(request) * 100 + choice;
        let expected: Vec<_> = (0..TOKENS).map(|index| token(seed, index)).collect();
        assert_eq!(answer.token_ids, expected);
        assert_eq!(answer.completion_tokens, TOKENS);
        let text: String = expected.iter().map(|&id| char::from(id as u8)).collect();
        assert_eq!(
            (answer.text, answer.finish),
            (text, Some(FinishReason::Length))
        );
    }
}

/// Workers of these kinds come and go under requests for the prompt.
async fn run(
    hello: impl Fn(u64) -> v1::WorkerHello + Copy + Send + 'static,
    prompt: &str,
) -> Arc<TestRouter> {
    let limits = CorridorLimits {
        max_replays: 10_000,
        ..limits()
    };
    let router = Arc::new(TestRouter::start(limits).await);
    let is_over = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let (router, is_over) = (Arc::clone(&router), Arc::clone(&is_over));
        workers.spawn(async move {
            let mut lives: u32 = 0;
            while !is_over.load(Ordering::Relaxed) {
                let mut worker = router
                    .dial(hello(number), crate::support::model_files())
                    .await
                    .unwrap();
                // The first lives are short; the last one is long enough to finish everything.
                let steps = 3 + lives * 5 + number as u32;
                tokio::select! {
                    () = run_for(&mut worker, steps) => {}
                    () = eventually("the end", || is_over.load(Ordering::Relaxed)) => {}
                }
                lives += 1;
            }
            lives
        });
    }
    eventually("a worker", || router.state.is_ready()).await;

    let mut clients = JoinSet::new();
    for request in 0..REQUESTS {
        clients.spawn(ask(Arc::clone(&router), prompt.to_owned(), request));
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    is_over.store(true, Ordering::Relaxed);
    let mut lives = 0;
    while let Some(worker) = workers.join_next().await {
        lives += worker.unwrap();
    }
    assert!(
        lives > 2 * WORKERS as u32,
        "only {lives} lives: nothing was broken off"
    );
    assert_eq!(router.metric("orchestra_requests_running"), Some(0));
    router
}
