//! Sequences from start to end.

use orchestra_proto::v1::{FinishReason, router_message::Message as Down};

use crate::support::{
    Engine, FakeRouter, abort, collect, config, drawn_token, eventually, outputs_of, start,
};

#[test]
fn sequences_of_mixed_lengths_each_get_their_tokens() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    let ids: Vec<u64> = (1..=12).collect();
    for &id in &ids {
        session.send(Down::Start(start(id, 3 + 7 * id as u32, 2 + id as u32)));
    }
    for (id, collected) in collect(&mut session, &ids) {
        let (prompt, max_tokens) = (3 + 7 * id as u32, 2 + id as u32);
        let expected: Vec<u32> = (prompt..prompt + max_tokens).map(drawn_token).collect();
        assert_eq!(collected.token_ids, expected, "sequence {id}");
        assert_eq!(collected.finish, FinishReason::Length);
        assert_eq!(collected.first_index, 0);
    }
    eventually("idle", || engine.agent.is_idle());
    let stats = engine.agent.stats();
    assert_eq!((stats.kv_blocks_used, stats.refusals), (0, 0));
    assert!(stats.schedule_us > 0);
    engine.close();
}

#[test]
fn stop_tokens_end_a_sequence_and_logprobs_come_where_asked_for() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    let mut stopping = start(1, 10, 20);
    let sampling = stopping.sampling.as_mut().unwrap();
    sampling.stop_token_ids = vec![drawn_token(12)];
    sampling.logprobs = Some(2);
    session.send(Down::Start(stopping));
    session.send(Down::Start(start(2, 10, 4)));

    let collected = collect(&mut session, &[1, 2]);
    assert_eq!(collected[&1].token_ids, [10, 11, 12].map(drawn_token));
    assert_eq!(collected[&1].finish, FinishReason::Stop);
    assert_eq!(collected[&1].num_top, [2, 2, 2]);
    assert_eq!(collected[&2].num_top, []);
    engine.close();
}

#[test]
fn a_replayed_sequence_goes_on_where_it_was() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    let mut replayed = start(1, 10, 5);
    replayed.output_token_ids = vec![7, 8, 9];
    session.send(Down::Start(replayed));
    let collected = collect(&mut session, &[1]);
    assert_eq!(collected[&1].first_index, 3);
    assert_eq!(collected[&1].token_ids, [13, 14].map(drawn_token));
    engine.close();
}

#[test]
fn equal_prompts_share_their_prefix() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    session.send(Down::Start(start(1, 18, 2)));
    assert_eq!(collect(&mut session, &[1])[&1].cached_tokens, 0);

    let mut again = start(1, 18, 2);
    again.sequence_id = 2;
    let mut other_tenant = again.clone();
    other_tenant.sequence_id = 3;
    other_tenant.cache_salt = "other".to_owned();
    session.send(Down::Start(again));
    session.send(Down::Start(other_tenant));
    let collected = collect(&mut session, &[2, 3]);
    assert_eq!(collected[&2].cached_tokens, 16, "four full blocks");
    assert_eq!(collected[&3].cached_tokens, 0, "salts keep apart");
    engine.close();
}

#[test]
fn an_abort_in_the_middle_of_a_step_ends_one_sequence_only() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 6, 100)));
    engine.wait_until_held();
    session.send(Down::Start(start(2, 6, 10)));
    session.send(abort(1));
    engine.wait_for_commands(2);
    engine.release();

    let collected = collect(&mut session, &[2]);
    assert_eq!(collected[&2].token_ids.len(), 10);
    assert_eq!(
        collected[&1].token_ids.len(),
        1,
        "of the step that was executing"
    );
    eventually("idle", || engine.agent.is_idle());
    assert_eq!(engine.agent.stats().kv_blocks_used, 0);
    engine.close();
}

#[test]
fn an_abort_of_a_sequence_that_ended_or_waits_is_fine() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    session.send(abort(77));
    session.send(Down::Start(start(1, 6, 2)));
    collect(&mut session, &[1]);
    session.send(abort(1));

    // The id is free again once the sequence has ended.
    engine.hold();
    session.send(Down::Start(start(1, 6, 2)));
    engine.wait_until_held();
    session.send(Down::Start(start(2, 6, 2)));
    session.send(abort(2));
    session.send(Down::Start(start(3, 6, 2)));
    engine.wait_for_commands(3);
    engine.release();
    let collected = collect(&mut session, &[1, 3]);
    assert!(!collected.contains_key(&2), "aborted before it ran");
    assert_eq!(collected[&1].token_ids.len(), 2);
    engine.close();
}

#[test]
fn outputs_of_one_step_travel_together() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    engine.hold();
    session.send(Down::Start(start(1, 6, 1)));
    engine.wait_until_held();
    for id in 2..=5 {
        session.send(Down::Start(start(id, 6, 1)));
    }
    engine.wait_for_commands(4);
    engine.release();
    let num_outputs = [(); 2].map(|()| session.wait_for(outputs_of).len());
    assert_eq!(num_outputs, [1, 4]);
    engine.close();
}
