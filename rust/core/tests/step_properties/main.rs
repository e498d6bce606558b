//! The step scheduler against a naive model: whatever happens in whatever order, every request gets the tokens
//! that it would get alone.
//!
//! `PROPTEST_CASES=20000` runs for minutes instead of seconds.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod ahead;
mod bounds;
mod fake_model;
mod in_flight;
mod moves;
mod replica;
mod router_view;
mod shape;
mod starvation;

use fake_model::VOCAB_SIZE;
use orchestra_core::{
    BlockHash, HashSeed, RejectReason, SamplingParams, TokenId,
    hash::next_block_hash,
    step::{StepScheduler, StepSchedulerConfig},
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use replica::{NewRequest, Replica, Wish};

/// What may happen to a replica.
#[derive(Clone, Debug)]
enum Op {
    Add(NewRequest),
    /// Plans, executes and commits a step.
    Step,
    /// Plans a step and leaves it executing.
    Schedule,
    /// Runs a step that executes, and leaves it uncommitted.
    Execute,
    Commit,
    CommitWrongly,
    /// The n-th unfinished request.
    Abort(usize),
    AbortAll,
    /// A part of the KV is lost.
    ForgetAll,
    /// Adds a request of which another worker brings some blocks.
    Await(NewRequest, u32),
    /// Adds a request of which only some blocks are wanted.
    Prefill(NewRequest, u32),
    /// The n-th move arrives, but for some of its last blocks.
    Arrive(usize, usize),
    /// The n-th move fails, and may go on writing.
    FailKv(usize),
    WriteLate,
    /// The n-th move is quiet.
    Release(usize),
    /// Another worker asks for blocks.
    Hold(NewRequest, u32),
    /// Another worker offers blocks to be kept for it; they arrive, or do not.
    Keep(NewRequest, u32),
    ArriveToBeKept(usize, usize),
    FailToBeKept(usize),
}

fn any_config() -> impl Strategy<Value = StepSchedulerConfig> {
    let sizes = (1..=5_u32, 24..=72_u32, 1..=8_u32, 0..=12_u32, 0..=7_u32);
    let rules = (
        proptest::bool::weighted(0.85),
        0..=6_u32,
        0..=3_u32,
        1..=20_u32,
        prop_oneof![Just(0), 1..3000_u32],
        (prop_oneof![Just(0), 1..30_u32], 0..1200_u32),
    );
    (sizes, rules).prop_map(|(sizes, rules)| {
        let (block_size, num_kv_slots, max_num_seqs, spare_budget, max_prefill_chunk) = sizes;
        let (enable_prefix_cache, max_overtakes, max_prefix_wait_steps, ..) = rules;
        let (.., max_num_waiting, tpot_target_us, (num_host_blocks, swap_cost_permille)) = rules;
        StepSchedulerConfig {
            block_size,
            num_blocks: num_kv_slots / block_size,
            max_num_seqs,
            max_num_batched_tokens: max_num_seqs + spare_budget,
            max_model_len: 48,
            max_num_waiting,
            max_steps_in_flight: 1,
            plans_ahead: false,
            max_prefill_chunk,
            tpot_target_us,
            min_prefill_tokens: 1 + spare_budget / 4,
            enable_prefix_cache,
            max_overtakes,
            max_prefix_wait_steps,
            num_host_blocks,
            swap_cost_permille,
            eos_token_ids: vec![0],
        }
    })
}

/// The same with two or three steps in flight.
fn any_deep_config() -> impl Strategy<Value = StepSchedulerConfig> {
    (any_config(), 2..=3_u32).prop_map(|(config, max_steps_in_flight)| StepSchedulerConfig {
        max_steps_in_flight,
        ..config
    })
}

/// Steps that follow each other through one stage, planned before the tokens are known.
fn any_ahead_config() -> impl Strategy<Value = StepSchedulerConfig> {
    any_deep_config().prop_map(|config| StepSchedulerConfig {
        plans_ahead: true,
        ..config
    })
}

/// Prompts share prefixes: one of three texts, cut somewhere, then a few tokens of their own.
fn any_prompt() -> impl Strategy<Value = Vec<TokenId>> {
    (
        0..3_u32,
        0..24_usize,
        proptest::collection::vec(0..VOCAB_SIZE, 0..6),
    )
        .prop_map(|(text, cut, own)| {
            let text = (0..).map(|index| (index * index + text * 5) % VOCAB_SIZE);
            text.take(cut).chain(own).collect()
        })
}

fn any_request() -> impl Strategy<Value = NewRequest> {
    let sampling = (
        1..24_u32,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        0..VOCAB_SIZE * 3,
    );
    (
        any_prompt(),
        prop_oneof![3 => Just(0), 1 => 1..10_usize],
        sampling,
        0..2_u64,
    )
        .prop_map(|(prompt, num_replayed, sampling, seed)| {
            let (max_tokens, ignore_eos, has_penalties, has_logprobs, stop_token) = sampling;
            let sampling = SamplingParams {
                max_tokens,
                ignore_eos,
                presence_penalty: if has_penalties { 0.5 } else { 0.0 },
                logprobs: has_logprobs.then_some(1),
                stop_token_ids: vec![stop_token],
                ..SamplingParams::default()
            };
            NewRequest {
                prompt,
                num_replayed,
                sampling,
                hash_seed: HashSeed(seed),
            }
        })
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        30 => any_request().prop_map(Op::Add),
        60 => Just(Op::Step),
        20 => Just(Op::Schedule),
        20 => Just(Op::Commit),
        2 => Just(Op::CommitWrongly),
        6 => any::<usize>().prop_map(Op::Abort),
        1 => Just(Op::AbortAll),
        1 => Just(Op::ForgetAll),
        12 => (any_request(), 1..8_u32).prop_map(|(new, num)| Op::Await(new, num)),
        6 => (any_request(), 1..8_u32).prop_map(|(new, num)| Op::Prefill(new, num)),
        8 => (any::<usize>(), prop_oneof![3 => Just(0), 1 => any::<usize>()])
            .prop_map(|(index, cut)| Op::Arrive(index, cut)),
        4 => any::<usize>().prop_map(Op::FailKv),
        6 => Just(Op::WriteLate),
        10 => any::<usize>().prop_map(Op::Release),
        4 => (any_request(), 1..8_u32).prop_map(|(new, num)| Op::Hold(new, num)),
        8 => (any_request(), 1..8_u32).prop_map(|(new, num)| Op::Keep(new, num)),
        8 => (any::<usize>(), prop_oneof![3 => Just(0), 1 => any::<usize>()])
            .prop_map(|(index, cut)| Op::ArriveToBeKept(index, cut)),
        2 => any::<usize>().prop_map(Op::FailToBeKept),
    ]
}

fn any_ops() -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(any_op(), 1..300)
}

/// More that is planned ahead, and some that runs long before its commit.
fn any_deep_ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        12 => any_op(),
        3 => Just(Op::Schedule),
        1 => Just(Op::Execute),
    ];
    proptest::collection::vec(op, 1..300)
}

/// Does all operations, lets the rest finish, and gives the replica.
fn run(mut replica: Replica, ops: Vec<Op>) -> Replica {
    for op in ops {
        match op {
            Op::Add(request) => {
                let is_empty = request.prompt.is_empty();
                let result = replica.add(request);
                assert_eq!(is_empty, result == Err(RejectReason::EmptyPrompt));
            }
            Op::Step => {
                replica.schedule();
                replica.commit();
            }
            Op::Schedule => {
                replica.schedule();
            }
            Op::Execute => replica.execute(),
            Op::Commit => replica.commit(),
            Op::CommitWrongly => replica.commit_wrongly(),
            Op::Abort(index) => replica.abort(index),
            Op::AbortAll => replica.abort_all(),
            Op::ForgetAll => replica.forget_all(),
            Op::Await(request, num_blocks) => {
                let _ = replica.add_with(request, Wish::Await(num_blocks));
            }
            Op::Prefill(request, num_blocks) => {
                let _ = replica.add_with(request, Wish::Prefill(num_blocks));
            }
            Op::Arrive(index, cut) => replica.arrive(index, cut),
            Op::FailKv(index) => replica.fail_kv(index),
            Op::WriteLate => replica.write_late(),
            Op::Release(index) => replica.release(index),
            Op::Hold(request, num_blocks) => replica.hold_prefix(request, num_blocks),
            Op::Keep(request, max_blocks) => replica.keep_for(request, max_blocks),
            Op::ArriveToBeKept(index, cut) => replica.arrive_to_be_kept(index, cut),
            Op::FailToBeKept(index) => replica.fail_to_be_kept(index),
        }
        replica.scheduler.check_integrity();
    }
    replica.run_to_end();
    replica
}

/// Sixteen hashes for all blocks: nearly every look-up is a collision.
fn colliding_hash(parent: u64, token_ids: &[TokenId]) -> BlockHash {
    BlockHash(next_block_hash(parent, token_ids).0 % 16)
}

proptest! {
    // 128 cases of 100 steps on average, unless PROPTEST_CASES (256) is set.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 2))]

    #[test]
    fn every_request_gets_the_tokens_it_would_get_alone(config in any_config(), ops in any_ops()) {
        let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
        run(Replica::new(scheduler, config), ops);
    }

    #[test]
    fn steps_in_flight_change_no_token(config in any_deep_config(), ops in any_deep_ops()) {
        let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
        run(Replica::new(scheduler, config), ops);
    }

    #[test]
    fn planning_ahead_changes_no_token(config in any_ahead_config(), ops in any_deep_ops()) {
        let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
        run(Replica::new(scheduler, config), ops);
    }

    #[test]
    fn colliding_hashes_cost_hits_and_never_tokens(config in any_config(), ops in any_ops()) {
        let scheduler =
            StepScheduler::with_hash(config.clone(), colliding_hash).expect("a valid config");
        run(Replica::new(scheduler, config), ops);
    }
}

/// The properties above say little if the random runs stay on the easy paths.
#[test]
fn the_random_runs_reach_the_rare_paths() {
    let mut runner = TestRunner::deterministic();
    let (mut steps, mut preemptions, mut swaps, mut hits) = (0, 0, 0, 0);
    let (mut fetched, mut filled, mut held, mut kept) = (0, 0, 0, 0);
    let (mut copied, mut forgotten) = (0, 0);
    for _ in 0..64 {
        let config = any_config()
            .new_tree(&mut runner)
            .expect("a config")
            .current();
        let ops = any_ops()
            .new_tree(&mut runner)
            .expect("operations")
            .current();
        let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
        let replica = run(Replica::new(scheduler, config), ops);
        let stats = replica.scheduler.stats();
        fetched += replica.moves.num_fetched_tokens;
        filled += replica.moves.num_filled_blocks;
        held += replica.moves.num_held_blocks;
        forgotten += replica.num_forgotten_steps;
        steps += stats.steps;
        preemptions += stats.preemptions;
        swaps += stats.swaps;
        kept += stats.blocks_kept_for_others;
        copied += stats.host_hit_tokens;
        hits += u64::from(stats.prefix_hit_tokens > 0);
    }
    assert!(steps > 5000, "{steps} steps");
    assert!(preemptions > 80, "{preemptions} preemptions");
    assert!(swaps > 20, "{swaps} of them with swaps");
    assert!(hits > 30, "prefix hits in {hits} runs");
    assert!(copied > 200, "{copied} tokens copied back from host memory");
    assert!(kept > 50, "{kept} blocks kept for others");
    assert!(fetched > 300, "{fetched} tokens fetched");
    assert!(filled > 100, "{filled} blocks filled for others");
    assert!(held > 50, "{held} blocks held for others");
    assert!(forgotten > 5, "{forgotten} steps given up");
}
