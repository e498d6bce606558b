//! Streams that break or stand still.

use std::{iter, net::SocketAddr, thread, time::Duration};

use orchestra_agent::{Agent, AgentConfig, AgentError};
use orchestra_proto::v1::{FinishReason, router_message::Message as Down};

use crate::support::{
    Engine, FakeRouter, PATIENCE, collect, config, eventually, execute, outputs_of, start,
};

#[test]
fn a_router_that_dies_and_returns_finds_a_clean_worker() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    session.send(Down::Start(start(1, 20, 2)));
    collect(&mut session, &[1]);
    engine.hold();
    session.send(Down::Start(start(2, 20, 100)));
    engine.wait_until_held();
    session.send(Down::Start(start(3, 20, 100)));
    session.send(Down::Start(start(4, 20, 100)));
    engine.wait_for_commands(2);
    engine.step();

    // The stream breaks in the middle of a step: what that step draws must not reach the next router.
    let address = router.die();
    eventually("the loss is noticed", || !engine.agent.is_attached());
    let mut router = FakeRouter::start_at(address);
    engine.release();

    let (mut session, hello) = router.welcome();
    assert!(
        hello.block_hashes.len() >= 5,
        "the cache is kept, and told again"
    );
    // The same id as an aborted one: only the new sequence may answer.
    session.send(Down::Start(start(2, 20, 5)));
    let collected = collect(&mut session, &[2]);
    assert_eq!(
        collected.len(),
        1,
        "outputs of an old stream: {collected:?}"
    );
    assert_eq!(collected[&2].token_ids.len(), 5);
    assert_eq!(
        collected[&2].cached_tokens, 16,
        "the replay finds its blocks"
    );

    let stats = engine.agent.stats();
    assert_eq!((stats.attachments, stats.aborted_by_detach), (2, 3));
    assert_eq!(stats.outbound_stalls, 0);
    eventually("idle", || engine.agent.is_idle());
    engine.close();
}

#[test]
fn a_router_that_lets_go_of_the_stream_loses_the_sequences() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 6, 120)));
    engine.wait_until_held();
    drop(session);
    eventually("the loss is noticed", || !engine.agent.is_attached());
    engine.release();
    let (_session, _) = router.welcome();
    eventually("aborted", || engine.agent.is_idle());
    assert_eq!(engine.agent.stats().aborted_by_detach, 1);
    engine.close();
}

/// Settings under which sequences produce more than may wait at the router (64 KiB) and here (256 messages).
fn for_long_sequences(address: SocketAddr) -> AgentConfig {
    let mut config = config(address);
    config.scheduler.max_model_len = 2048;
    config.scheduler.num_blocks = 4096;
    config
}

#[test]
fn a_router_that_reads_too_slowly_is_dropped() {
    let mut router = FakeRouter::start();
    let mut config = for_long_sequences(router.address);
    config.outbound_stall_limit = Duration::from_millis(100);
    let engine = Engine::start(config);
    let (mut session, _) = router.welcome();
    for id in 1..=8 {
        session.send(Down::Start(start(id, 6, 2000)));
    }
    // The session is held and not read.
    eventually("the stall is noticed", || {
        engine.agent.stats().outbound_stalls == 1
    });
    assert_eq!(engine.agent.stats().aborted_by_detach, 8);

    let (mut next, _) = router.welcome();
    next.send(Down::Start(start(1, 6, 3)));
    assert_eq!(collect(&mut next, &[1])[&1].token_ids.len(), 3);
    engine.close();
}

#[test]
fn a_router_that_is_slow_for_a_while_loses_nothing() {
    let mut router = FakeRouter::start();
    let mut config = for_long_sequences(router.address);
    config.outbound_stall_limit = PATIENCE;
    let engine = Engine::start(config);
    let (mut session, _) = router.welcome();
    let ids = [1, 2, 3, 4, 5, 6, 7, 8];
    for id in ids {
        session.send(Down::Start(start(id, 6, 2000)));
    }
    eventually("the queue of 256 fills up", || {
        engine.agent.stats().outbound_waiting > 250
    });
    let steps = engine.agent.stats().steps;
    assert!(steps < 2000, "the router's slowness was not felt");

    for collected in collect(&mut session, &ids).values() {
        assert_eq!(collected.token_ids.len(), 2000);
    }
    assert_eq!(engine.agent.stats().outbound_stalls, 0);
    engine.close();
}

#[test]
fn a_worker_whose_engine_is_busy_loses_no_command() {
    // More commands than the queue between network and step loop holds.
    let mut router = FakeRouter::start();
    let mut config = config(router.address);
    config.scheduler.max_num_waiting = 8192;
    let engine = Engine::start(config);
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 6, 1)));
    engine.wait_until_held();
    let ids: Vec<u64> = (1..=3000).collect();
    thread::scope(|scope| {
        let down = session.sender();
        scope.spawn(move || (2..=3000).for_each(|id| down.send(Down::Start(start(id, 6, 1)))));
        engine.wait_for_commands(1024);
        engine.release();
        assert_eq!(collect(&mut session, &ids).len(), 3000);
    });
    engine.close();
}

#[test]
fn an_engine_that_lost_its_kv_starts_over_under_a_new_stream() {
    let mut router = FakeRouter::start();
    let agent = Agent::new(config(router.address)).unwrap();
    let given_up = thread::scope(|scope| {
        let attaching = scope.spawn(|| agent.next_step(PATIENCE));
        let (mut session, hello) = router.welcome();
        assert_eq!(hello.block_hashes, []);
        session.send(Down::Start(start(1, 20, 100)));
        let first = attaching.join().unwrap().unwrap().unwrap();
        agent.commit(&execute(&first)).unwrap();
        // It begins to decode, its prompt is cached, and then the engine fails in the middle of a step.
        let second = agent.next_step(PATIENCE).unwrap().unwrap();
        agent.start_over().unwrap();
        let outputs = iter::from_fn(|| session.try_next()).filter_map(outputs_of);
        let outputs: Vec<_> = outputs.flatten().collect();
        assert_eq!(outputs.len(), 1, "one token, then the stream's end");
        assert_eq!(outputs[0].finish_reason(), FinishReason::Unspecified);
        assert!(matches!(
            agent.commit(&execute(&second)),
            Err(AgentError::UnknownStep(_))
        ));
        let stats = agent.stats();
        assert_eq!((stats.aborted_by_detach, stats.kv_blocks_used), (1, 0));
        second
    });
    // The agent dials meanwhile, and says nothing before the engine asks for work.
    let (mut session, hello, replay) = thread::scope(|scope| {
        let attaching = scope.spawn(|| agent.next_step(PATIENCE));
        let (mut session, hello) = router.welcome();
        session.send(Down::Start(start(1, 20, 3)));
        (session, hello, attaching.join().unwrap().unwrap().unwrap())
    });
    assert_eq!(hello.block_hashes, [], "the cache is forgotten");
    assert_eq!(replay.token_ids.len(), 20, "all of the prompt is computed");
    assert!(
        replay.step_id > given_up.step_id,
        "steps are never numbered twice"
    );
    agent.commit(&execute(&replay)).unwrap();
    for _ in 0..2 {
        let plan = agent.next_step(PATIENCE).unwrap().unwrap();
        agent.commit(&execute(&plan)).unwrap();
    }
    assert_eq!(collect(&mut session, &[1])[&1].token_ids.len(), 3);
    assert_eq!(agent.stats().attachments, 2);
    agent.close();
    assert!(matches!(agent.start_over(), Err(AgentError::Closed)));
}
