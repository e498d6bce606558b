//! Sequences that are not started, and why.

use orchestra_core::ErrorCode;
use orchestra_proto::v1::{
    FinishReason, LogitBias, StartSequence, router_message::Message as Down,
    worker_message::Message as Up,
};

use crate::support::{Engine, FakeRouter, VOCAB_SIZE, collect, config, eventually, start};

/// Sends one sequence that must be refused; returns code and message.
fn refusal_of(change: impl FnOnce(&mut StartSequence)) -> (String, String) {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    let mut refused = start(1, 10, 5);
    change(&mut refused);
    session.send(Down::Start(refused));
    let mut outputs = session.wait_for(crate::support::outputs_of);
    let output = outputs.pop().unwrap();
    assert_eq!((outputs.len(), output.sequence_id), (0, 1));
    assert_eq!(output.finish_reason(), FinishReason::Error);
    let error = output.error.unwrap();

    // It changed nothing: the next sequence runs.
    session.send(Down::Start(start(1, 10, 5)));
    assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 5);
    assert_eq!(engine.agent.stats().refusals, 1);
    engine.close();
    (error.code, error.message)
}

#[track_caller]
fn assert_refused(code: ErrorCode, message_has: &str, change: impl FnOnce(&mut StartSequence)) {
    let (found, message) = refusal_of(change);
    assert_eq!(found, code.as_str(), "{message}");
    assert!(
        message.contains(message_has),
        "{message:?} does not say {message_has:?}"
    );
}

#[test]
fn another_weights_epoch_is_the_workers_fault() {
    assert_refused(ErrorCode::WorkerFailed, "weights epoch 4", |it| {
        it.weights_epoch = 4;
    });
}

#[test]
fn missing_sampling_is_named() {
    assert_refused(ErrorCode::InvalidRequest, "sampling.max_tokens", |it| {
        it.sampling = None;
    });
    assert_refused(ErrorCode::InvalidRequest, "sampling.seed", |it| {
        it.sampling.as_mut().unwrap().seed = None;
    });
}

#[test]
fn sampling_out_of_range_is_named() {
    assert_refused(ErrorCode::InvalidRequest, "top_p", |it| {
        it.sampling.as_mut().unwrap().top_p = Some(f32::NAN);
    });
}

#[test]
fn tokens_outside_the_vocabulary_never_reach_the_model() {
    let says = "outside the vocabulary of 1000";
    assert_refused(ErrorCode::InvalidRequest, says, |it| {
        it.prompt_token_ids[3] = VOCAB_SIZE;
    });
    assert_refused(ErrorCode::InvalidRequest, says, |it| {
        it.output_token_ids = vec![u32::MAX];
    });
    assert_refused(ErrorCode::InvalidRequest, says, |it| {
        let bias = LogitBias {
            token_id: VOCAB_SIZE,
            bias: 1.0,
        };
        it.sampling.as_mut().unwrap().logit_bias = vec![bias];
    });
}

#[test]
fn an_empty_prompt_and_a_long_one_are_refused() {
    assert_refused(ErrorCode::InvalidRequest, "prompt", |it| {
        it.prompt_token_ids.clear();
    });
    assert_refused(ErrorCode::ContextTooLong, "128", |it| {
        it.prompt_token_ids = vec![1; 125];
    });
}

#[test]
fn a_full_queue_refuses_and_the_rest_runs() {
    let mut router = FakeRouter::start();
    let mut config = config(router.address);
    config.scheduler.max_num_waiting = 2;
    let engine = Engine::start(config);
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 10, 2)));
    engine.wait_until_held();
    for id in 2..=5 {
        session.send(Down::Start(start(id, 10, 2)));
    }
    engine.wait_for_commands(4);
    engine.release();
    for (id, collected) in collect(&mut session, &[1, 2, 3, 4, 5]) {
        // One runs, two may wait, the others are too many.
        let code = (id > 3).then_some(ErrorCode::QueueFull.as_str());
        assert_eq!(collected.error.as_deref(), code, "sequence {id}");
        assert_eq!(collected.token_ids.len(), if id > 3 { 0 } else { 2 });
    }
    engine.close();
}

#[test]
fn an_id_that_is_in_use_ends_both() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 10, 100)));
    engine.wait_until_held();
    session.send(Down::Start(start(1, 10, 100)));
    engine.wait_for_commands(1);
    engine.release();
    let collected = collect(&mut session, &[1]);
    assert_eq!(
        collected[&1].error.as_deref(),
        Some(ErrorCode::Internal.as_str())
    );
    eventually("idle", || engine.agent.is_idle());
    engine.close();
}

#[test]
fn a_draining_worker_finishes_what_runs_and_takes_nothing_new() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 10, 5)));
    engine.wait_until_held();
    engine.agent.drain();
    session.wait_for(|message| match message {
        Up::Load(load) => load.is_draining.then_some(()),
        _ => None,
    });
    session.send(Down::Start(start(2, 10, 5)));
    engine.wait_for_commands(1);
    engine.release();

    let collected = collect(&mut session, &[1, 2]);
    assert_eq!(collected[&1].token_ids.len(), 5);
    assert_eq!(
        collected[&2].error.as_deref(),
        Some(ErrorCode::ShuttingDown.as_str())
    );
    eventually("idle", || engine.agent.is_idle());
    engine.close();
}
