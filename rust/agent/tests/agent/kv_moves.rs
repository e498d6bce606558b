//! KV that moves between two workers over real transports: whatever becomes of it, the tokens are the same.

use std::sync::atomic::Ordering;

use orchestra_agent::KvTransports::{self, Shm, Tcp};
use orchestra_proto::v1::{FinishReason, KvSource, KvTarget, SequenceOutput, StartSequence};

use crate::support::{Cluster, LAYERS, abort, eventually, reference, start};

/// Tokens of a prompt that fills five blocks and begins a sixth.
const PROMPT: u32 = 22;
const BLOCKS: u32 = 5;
const TIMEOUT_MS: u32 = 10_000;

/// The same prompt under any sequence id.
fn request(sequence_id: u64, max_tokens: u32) -> StartSequence {
    StartSequence {
        sequence_id,
        ..start(7, PROMPT, max_tokens)
    }
}

fn expected(num_tokens: usize) -> Vec<u32> {
    reference(&request(0, 1).prompt_token_ids, num_tokens)
}

fn source(cluster: &Cluster, from: usize, is_pushed: bool, timeout_ms: u32) -> KvSource {
    KvSource {
        peer: Some(cluster.members[from].peer()),
        transfer_id: 42,
        num_blocks: BLOCKS,
        is_pushed,
        timeout_ms,
    }
}

fn target(cluster: &Cluster, to: usize, timeout_ms: u32) -> KvTarget {
    KvTarget {
        peer: Some(cluster.members[to].peer()),
        transfer_id: 42,
        num_blocks: BLOCKS,
        timeout_ms,
    }
}

/// Asserts the tokens of the prompt, and how many came from where.
fn check(output: &SequenceOutput, num_tokens: usize, cached: u32, fetched: u32) {
    assert_eq!(output.finish_reason(), FinishReason::Length);
    assert_eq!(output.token_ids, expected(num_tokens));
    assert_eq!(
        (output.cached_tokens, output.fetched_tokens),
        (cached, fetched)
    );
}

fn wait_until_quiet(cluster: &Cluster) {
    for member in &cluster.members {
        member.engine.wait_until_quiet();
    }
}

fn fetches(transports: [KvTransports; 2]) {
    let cluster = Cluster::start(&transports, |_| {});
    let [holder, taker] = &cluster.members[..] else {
        unreachable!()
    };
    check(&holder.run(request(1, 3)), 3, 0, 0);
    for round in 1..4 {
        let fetching = StartSequence {
            kv_source: Some(source(&cluster, 0, false, TIMEOUT_MS)),
            ..request(round, 6)
        };
        // What has come once is the taker's own.
        let fetched = if round == 1 { 20 } else { 0 };
        check(&taker.run(fetching), 6, 20, fetched);
    }
    assert_eq!(taker.engine.agent.stats().kv_blocks_fetched, 5);
    assert_eq!(taker.engine.agent.stats().kv_fetch_failures, 0);
    wait_until_quiet(&cluster);
}

#[test]
fn a_prefix_is_fetched_over_shared_memory() {
    fetches([Shm, Shm]);
}

#[test]
fn a_prefix_is_fetched_over_tcp() {
    fetches([Tcp, Tcp]);
}

#[test]
fn what_the_holder_lacks_is_computed() {
    let cluster = Cluster::start(&[Shm, Shm], |_| {});
    let [holder, taker] = &cluster.members[..] else {
        unreachable!()
    };
    // The holder has the first two blocks alone.
    let mut shorter = request(1, 1);
    shorter.prompt_token_ids.truncate(10);
    holder.run(shorter);
    let fetching = |id| StartSequence {
        kv_source: Some(source(&cluster, 0, false, TIMEOUT_MS)),
        ..request(id, 4)
    };
    check(&taker.run(fetching(1)), 4, 8, 8);
    // And of another tenant's prompt it has nothing.
    let salted = StartSequence {
        cache_salt: "other".to_owned(),
        ..fetching(2)
    };
    check(&taker.run(salted), 4, 0, 0);
    assert_eq!(taker.engine.agent.stats().kv_fetch_failures, 1);
    wait_until_quiet(&cluster);
}

#[test]
fn whoever_cannot_be_reached_costs_a_refusal_or_the_timeout() {
    let cluster = Cluster::start(&[Shm, Shm, Tcp], |_| {});
    let taker = &cluster.members[1];
    cluster.members[0].run(request(1, 1));
    let mut id = 0;
    let mut fails = |source: KvSource, salt: &str| {
        id += 1;
        let fetching = StartSequence {
            kv_source: Some(source),
            cache_salt: salt.to_owned(),
            ..request(id, 2)
        };
        check(&taker.run(fetching), 2, 0, 0);
        let failures = taker.engine.agent.stats().kv_fetch_failures;
        assert_eq!(failures, id, "{salt}");
    };
    let changed = |change: fn(&mut KvSource)| {
        let mut source = source(&cluster, 0, false, TIMEOUT_MS);
        change(&mut source);
        source
    };
    fails(
        source(&cluster, 2, false, TIMEOUT_MS),
        "no transport in common",
    );
    let other_host = changed(|it| it.peer.as_mut().unwrap().host.push('x'));
    fails(other_host, "another host");
    let unknown = changed(|it| it.peer.as_mut().unwrap().worker_id.push('x'));
    fails(unknown, "a worker that the router does not know");
    cluster.is_deaf.store(true, Ordering::SeqCst);
    fails(source(&cluster, 0, false, 200), "no answer");
    cluster.is_deaf.store(false, Ordering::SeqCst);
    let stale = changed(|it| it.peer.as_mut().unwrap().epoch ^= 1);
    fails(stale, "another start of the worker");
    wait_until_quiet(&cluster);
}

fn pushes(transports: KvTransports, max_num_batched_tokens: u32) {
    let cluster = Cluster::start(&[transports, transports], |config| {
        config.scheduler.max_num_batched_tokens = max_num_batched_tokens;
    });
    let [prefill, decode] = &cluster.members[..] else {
        unreachable!()
    };
    for round in 1..3 {
        let taking = StartSequence {
            kv_source: Some(source(&cluster, 0, true, TIMEOUT_MS)),
            ..request(round, 6)
        };
        let giving = StartSequence {
            kv_target: Some(target(&cluster, 1, TIMEOUT_MS)),
            ..request(round, 6)
        };
        decode.start(taking);
        let given = prefill.run(giving);
        assert_eq!(given.finish_reason(), FinishReason::Prefilled);
        assert_eq!(given.token_ids, []);
        let fetched = if round == 1 { 20 } else { 0 };
        check(&decode.finish(round), 6, 20, fetched);
        wait_until_quiet(&cluster);
    }
    assert_eq!(prefill.engine.agent.stats().kv_blocks_pushed, 5);
    assert_eq!(decode.engine.agent.stats().kv_fetch_failures, 0);
    // What was computed for another stays in the prefix cache of who computed it.
    check(&prefill.run(request(9, 2)), 2, 20, 0);
}

#[test]
fn blocks_are_pushed_over_shared_memory_while_they_are_computed() {
    pushes(KvTransports::Auto, 64);
}

#[test]
fn blocks_of_many_steps_are_pushed_over_tcp() {
    pushes(Tcp, 9);
}

#[test]
fn a_layer_is_there_before_the_next_is_computed() {
    let cluster = Cluster::start(&[Shm, Shm], |_| {});
    let [prefill, decode] = &cluster.members[..] else {
        unreachable!()
    };
    prefill.engine.allow(0);
    decode.start(StartSequence {
        kv_source: Some(source(&cluster, 0, true, TIMEOUT_MS)),
        ..request(1, 2)
    });
    prefill.start(StartSequence {
        kv_target: Some(target(&cluster, 1, TIMEOUT_MS)),
        ..request(1, 2)
    });
    // The step stands still behind its first layer.
    eventually("the first layer is there", || {
        decode.engine.has_first_block(0)
    });
    assert!(!decode.engine.has_first_block(1));
    assert_eq!(decode.engine.agent.stats().num_waiting, 1);
    prefill.engine.allow(LAYERS);
    assert_eq!(prefill.finish(1).finish_reason(), FinishReason::Prefilled);
    check(&decode.finish(1), 2, 20, 20);
    wait_until_quiet(&cluster);
}

#[test]
fn whoever_computes_may_be_aborted_and_the_taker_computes() {
    // The prompt takes three steps, and the abort comes in the first.
    let cluster = Cluster::start(&[Shm, Shm], |config| {
        config.scheduler.max_num_batched_tokens = 9;
    });
    let [prefill, decode] = &cluster.members[..] else {
        unreachable!()
    };
    prefill.engine.allow(0);
    decode.start(StartSequence {
        kv_source: Some(source(&cluster, 0, true, TIMEOUT_MS)),
        ..request(1, 3)
    });
    prefill.start(StartSequence {
        kv_target: Some(target(&cluster, 1, TIMEOUT_MS)),
        ..request(1, 3)
    });
    eventually("the prompt is being computed", || {
        prefill.engine.agent.stats().steps == 1
    });
    prefill.send(abort(1));
    eventually("the abort has come", || {
        prefill.engine.agent.stats().commands_waiting == 1
    });
    prefill.engine.allow(u32::MAX);
    check(&decode.finish(1), 3, 0, 0);
    assert_eq!(decode.engine.agent.stats().kv_fetch_failures, 1);
    wait_until_quiet(&cluster);
}

#[test]
fn whoever_takes_may_be_aborted_and_nothing_is_lost() {
    let cluster = Cluster::start(&[Shm, Shm], |_| {});
    let [prefill, decode] = &cluster.members[..] else {
        unreachable!()
    };
    prefill.engine.allow(0);
    decode.start(StartSequence {
        kv_source: Some(source(&cluster, 0, true, 60_000)),
        ..request(1, 3)
    });
    prefill.start(StartSequence {
        kv_target: Some(target(&cluster, 1, 60_000)),
        ..request(1, 3)
    });
    eventually("the prompt is being computed", || {
        prefill.engine.agent.stats().steps == 1
    });
    decode.send(abort(1));
    // Its blocks come back while the one who computes stands still.
    decode.engine.wait_until_quiet();
    prefill.engine.allow(u32::MAX);
    assert_eq!(prefill.finish(1).finish_reason(), FinishReason::Prefilled);
    wait_until_quiet(&cluster);
    check(&decode.run(request(2, 3)), 3, 0, 0);
}

#[test]
fn whoever_offers_blocks_for_a_push_that_is_over_is_told_at_once() {
    let cluster = Cluster::start(&[Shm, Shm], |_| {});
    let [prefill, decode] = &cluster.members[..] else {
        unreachable!()
    };
    // The one who computes gives up before the taker has begun.
    prefill.engine.allow(0);
    prefill.start(StartSequence {
        kv_target: Some(target(&cluster, 1, 1)),
        ..request(1, 3)
    });
    eventually("the prompt is being computed", || {
        prefill.engine.agent.stats().steps == 1
    });
    prefill.engine.allow(u32::MAX);
    assert_eq!(prefill.finish(1).finish_reason(), FinishReason::Prefilled);
    prefill.engine.wait_until_quiet();
    decode.start(StartSequence {
        kv_source: Some(source(&cluster, 0, true, 60_000)),
        ..request(1, 3)
    });
    check(&decode.finish(1), 3, 0, 0);
    wait_until_quiet(&cluster);
}

#[test]
fn who_writes_too_late_is_cut_off_and_its_blocks_come_back() {
    let cluster = Cluster::start(&[Shm, Shm], |_| {});
    let [prefill, decode] = &cluster.members[..] else {
        unreachable!()
    };
    prefill.engine.allow(0);
    decode.start(StartSequence {
        kv_source: Some(source(&cluster, 0, true, 300)),
        ..request(1, 3)
    });
    prefill.start(StartSequence {
        kv_target: Some(target(&cluster, 1, TIMEOUT_MS)),
        ..request(1, 3)
    });
    // The one who computes stands still for longer than the taker waits.
    check(&decode.finish(1), 3, 0, 0);
    assert_eq!(decode.engine.agent.stats().kv_fetch_failures, 1);
    decode.engine.wait_until_quiet();
    prefill.engine.allow(u32::MAX);
    assert_eq!(prefill.finish(1).finish_reason(), FinishReason::Prefilled);
    wait_until_quiet(&cluster);
}

#[test]
fn a_worker_without_a_pool_computes_and_refuses_to_compute_for_others() {
    use crate::support::{Engine, FakeRouter, collect, config};
    let cluster = Cluster::start(&[Shm], |_| {});
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, hello) = router.welcome();
    assert_eq!(hello.kv_transfer, None);
    let send = |start| orchestra_proto::v1::router_message::Message::Start(start);
    session.send(send(StartSequence {
        kv_source: Some(source(&cluster, 0, false, TIMEOUT_MS)),
        ..request(1, 2)
    }));
    session.send(send(StartSequence {
        kv_target: Some(target(&cluster, 0, TIMEOUT_MS)),
        ..request(2, 2)
    }));
    let ended = collect(&mut session, &[1, 2]);
    assert_eq!(ended[&1].token_ids.len(), 2);
    assert_eq!(ended[&2].error.as_deref(), Some("unsupported"));
    engine.close();
}
