//! How an agent ends, and what it says to a caller who errs.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use orchestra_agent::{Agent, AgentConfig, AgentError};
use orchestra_core::{ErrorCode, step::StepOutput};
use orchestra_proto::v1::router_message::Message as Down;

use crate::support::{Engine, FakeRouter, PATIENCE, collect, execute, start};

/// Settings under which an end waits for what is to be sent.
fn config(address: SocketAddr) -> AgentConfig {
    AgentConfig {
        close_grace: PATIENCE,
        ..crate::support::config(address)
    }
}

#[test]
fn closing_wakes_the_engine_and_ends_the_stream() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    session.send(Down::Start(start(1, 6, 3)));
    collect(&mut session, &[1]);
    let reader = thread::spawn(move || while session.next().is_some() {});
    assert!(matches!(engine.close(), AgentError::Closed));
    reader.join().unwrap();
}

#[test]
fn what_was_committed_is_sent_before_the_stream_ends() {
    let mut router = FakeRouter::start();
    let agent = Agent::new(config(router.address)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let plan = agent.next_step(PATIENCE).unwrap().unwrap();
            agent.commit(&execute(&plan)).unwrap();
            agent.close();
        });
        let (mut session, _) = router.welcome();
        session.send(Down::Start(start(1, 6, 1)));
        assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 1);
        while session.next().is_some() {}
    });
    assert!(matches!(agent.next_step(PATIENCE), Err(AgentError::Closed)));
}

#[test]
fn closing_before_there_is_a_router_is_quick() {
    let agent = Agent::new(config("127.0.0.1:9".parse().unwrap())).unwrap();
    assert_eq!(agent.next_step(Duration::from_millis(1)).unwrap(), None);
    agent.close();
    agent.close();
    assert!(matches!(agent.next_step(PATIENCE), Err(AgentError::Closed)));
}

#[test]
fn a_failed_step_ends_every_sequence_with_its_reason() {
    let mut router = FakeRouter::start();
    let mut engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 6, 50)));
    session.send(Down::Start(start(2, 6, 50)));
    engine.wait_until_held();
    engine.agent.fail("RuntimeError: out of memory");
    engine.release();

    let collected = collect(&mut session, &[1]);
    assert_eq!(
        collected[&1].error.as_deref(),
        Some(ErrorCode::WorkerFailed.as_str())
    );
    while session.next().is_some() {}
    let error = engine.join();
    assert_eq!(error.code(), ErrorCode::Internal);
    assert_eq!(
        error.to_string(),
        "the agent has failed: RuntimeError: out of memory"
    );
}

#[test]
fn steps_are_committed_once_and_in_turn() {
    let mut router = FakeRouter::start();
    let agent = Agent::new(config(router.address)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut session, _) = router.welcome();
            session.send(Down::Start(start(1, 6, 2)));
            assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 2);
        });
        let unknown = StepOutput::default();
        assert!(matches!(
            agent.commit(&unknown),
            Err(AgentError::UnknownStep(0))
        ));

        let plan = agent.next_step(PATIENCE).unwrap().unwrap();
        let again = agent.next_step(PATIENCE);
        assert!(matches!(again, Err(AgentError::StepOutstanding(id)) if id == plan.step_id));

        let short = StepOutput {
            step_id: plan.step_id,
            ..StepOutput::default()
        };
        assert!(matches!(agent.commit(&short), Err(AgentError::Step(_))));
        agent.commit(&execute(&plan)).unwrap();
        let twice = agent.commit(&execute(&plan));
        assert!(matches!(twice, Err(AgentError::UnknownStep(id)) if id == plan.step_id));

        let plan = agent.next_step(PATIENCE).unwrap().unwrap();
        agent.commit(&execute(&plan)).unwrap();
    });
}

#[test]
fn as_many_steps_as_may_be_are_handed_out_before_a_commit() {
    let mut router = FakeRouter::start();
    let mut config = config(router.address);
    config.scheduler.max_steps_in_flight = 2;
    let agent = Agent::new(config).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut session, _) = router.welcome();
            session.send(Down::Start(start(1, 100, 2)));
            assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 2);
        });
        // The prompt is cut in two.
        let first = agent.next_step(PATIENCE).unwrap().unwrap();
        let second = agent.next_step(PATIENCE).unwrap().unwrap();
        let third = agent.next_step(PATIENCE);
        assert!(matches!(third, Err(AgentError::StepOutstanding(id)) if id == first.step_id));
        let early = agent.commit(&execute(&second));
        assert!(matches!(early, Err(AgentError::UnknownStep(id)) if id == second.step_id));

        let began = Instant::now();
        thread::sleep(Duration::from_millis(20));
        agent.commit(&execute(&first)).unwrap();
        let executed_first = agent.stats().execute_us;
        assert_eq!(agent.next_step(Duration::ZERO).unwrap(), None);
        agent.commit(&execute(&second)).unwrap();
        // Where both were in flight counts once.
        let executed = Duration::from_micros(agent.stats().execute_us - executed_first);
        assert!(executed + Duration::from_millis(20) <= began.elapsed());

        let plan = agent.next_step(PATIENCE).unwrap().unwrap();
        agent.commit(&execute(&plan)).unwrap();
    });
}

#[test]
fn wrong_settings_are_all_named() {
    let mut config = config("127.0.0.1:9".parse().unwrap());
    config.router = "https://router".to_owned();
    config.worker_id = String::new();
    config.heartbeat = Duration::ZERO;
    config.scheduler.block_size = 12;
    config.scheduler.num_blocks = 0;
    let Err(AgentError::InvalidConfig(issues)) = Agent::new(config) else {
        panic!("these settings were taken");
    };
    let keys: Vec<&str> = issues.iter().map(|issue| issue.key.as_ref()).collect();
    let expected = [
        "router",
        "worker_id",
        "scheduler.block_size",
        "heartbeat",
        "scheduler.num_blocks",
    ];
    assert_eq!(keys, expected);
}
