//! Several steps planned before the first is committed: how the work is divided among them, and what waits.

use orchestra_core::{
    HashSeed, SamplingParams, Time,
    step::{StepError, StepOutput, StepPlan, StepScheduler, StepSchedulerConfig},
};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};

use crate::{
    any_deep_config, any_deep_ops,
    replica::{NewRequest, Replica},
    run,
};

fn config(max_steps_in_flight: u32) -> StepSchedulerConfig {
    StepSchedulerConfig {
        num_blocks: 400,
        max_num_seqs: 16,
        max_model_len: 1024,
        max_steps_in_flight,
        ..StepSchedulerConfig::default()
    }
}

fn replica_with(config: StepSchedulerConfig) -> Replica {
    let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
    Replica::new(scheduler, config)
}

fn replica(max_steps_in_flight: u32) -> Replica {
    replica_with(config(max_steps_in_flight))
}

/// A prompt that shares nothing with those of other numbers.
fn request(number: u32, num_tokens: u32) -> NewRequest {
    NewRequest {
        prompt: (0..num_tokens).map(|index| number * 1000 + index).collect(),
        num_replayed: 0,
        sampling: SamplingParams {
            max_tokens: 20,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        hash_seed: HashSeed(0),
    }
}

/// Sequences, and tokens, of the step that is planned next.
fn plan(replica: &mut Replica) -> Option<(usize, usize)> {
    let planned = |plan: &StepPlan| (plan.context_lens.len(), plan.token_ids.len());
    let before = replica.num_steps;
    replica.schedule();
    (replica.num_steps > before).then(|| planned(replica.newest().expect("a plan")))
}

#[test]
fn sequences_that_decode_take_turns_in_groups_of_like_size() {
    for depth in [2, 3] {
        let mut replica = replica(depth);
        for number in 0..7 {
            replica.add(request(number, 4)).expect("room");
        }
        replica.schedule();
        replica.commit();
        for _ in 1..depth {
            replica.schedule();
        }
        let groups = [(); 6].map(|()| {
            let group = plan(&mut replica);
            replica.commit();
            group.expect("somebody is not in flight").0
        });
        assert!(
            groups
                .iter()
                .all(|&size| size <= 7_usize.div_ceil(depth as usize))
        );
        let turn: usize = groups[..depth as usize].iter().sum();
        assert_eq!(turn, 7, "{depth} in flight: {groups:?}");
        replica.run_to_end();
    }
}

#[test]
fn a_prompt_goes_through_the_stages_in_equal_chunks() {
    for (depth, chunks) in [(1, vec![600]), (2, vec![300, 300]), (3, vec![200; 3])] {
        let mut replica = replica(depth);
        replica.add(request(0, 600)).expect("room");
        for chunk in chunks {
            assert_eq!(plan(&mut replica), Some((1, chunk)), "{depth} in flight");
        }
        // The last chunk draws, and nothing is known of the token.
        assert_eq!(plan(&mut replica), None);
        replica.run_to_end();
    }
}

#[test]
fn short_prompts_are_not_cut_to_pieces() {
    let mut replica = replica(3);
    replica.add(request(0, 100)).expect("room");
    assert_eq!(plan(&mut replica), Some((1, 64)));
    assert_eq!(plan(&mut replica), Some((1, 36)));
    replica.run_to_end();
}

#[test]
fn who_shares_a_prefix_in_flight_waits_for_it() {
    let mut replica = replica(2);
    let first = replica.add(request(0, 320)).expect("room");
    plan(&mut replica);
    let second = replica.add(request(0, 320)).expect("room");
    plan(&mut replica);
    assert_eq!(replica.scheduler.stats().num_running, 1);
    replica.run_to_end();
    assert_eq!(replica.num_cached_tokens(first), Some(0));
    // All but the block of the last token, from which the next one is drawn.
    assert_eq!(replica.num_cached_tokens(second), Some(304));
}

#[test]
fn who_is_in_flight_is_preempted_after_the_commit_and_not_before() {
    let mut replica = replica_with(StepSchedulerConfig {
        block_size: 4,
        num_blocks: 5,
        ..config(2)
    });
    // Both draw six tokens. The junior takes the last block with its first decode, the senior needs one two tokens later.
    for (number, num_tokens) in [(0, 6), (1, 8)] {
        let mut new = request(number, num_tokens);
        new.sampling.max_tokens = 6;
        replica.add(new).expect("room");
    }
    assert_eq!(plan(&mut replica), Some((2, 14)));
    replica.commit();
    assert_eq!(plan(&mut replica), Some((1, 1)));
    for _ in 0..3 {
        assert_eq!(plan(&mut replica), Some((1, 1)));
        replica.commit();
    }
    assert_eq!(plan(&mut replica), None, "the junior is in flight");
    assert_eq!(replica.scheduler.stats().preemptions, 0);
    replica.commit();
    assert_eq!(plan(&mut replica), Some((1, 1)));
    assert_eq!(replica.scheduler.stats().preemptions, 1);
    replica.run_to_end();
}

#[test]
fn a_later_step_is_not_committed_before_an_earlier_one() {
    let mut replica = replica(2);
    for number in 0..2 {
        replica.add(request(number, 100)).expect("room");
    }
    assert!(plan(&mut replica).is_some() && plan(&mut replica).is_some());
    let output = StepOutput {
        step_id: 2,
        ..StepOutput::default()
    };
    let (expected, got) = (1, 2);
    assert_eq!(
        replica.scheduler.update_from_output(&output, Time::ZERO),
        Err(StepError::WrongStep { expected, got })
    );
    replica.run_to_end();
}

/// The property says little where the random runs have one step in flight.
#[test]
fn the_random_runs_have_several_steps_in_flight() {
    let mut runner = TestRunner::deterministic();
    let (mut deep, mut chunks, mut preemptions, mut hits) = (0, 0, 0, 0);
    for _ in 0..64 {
        let config = any_deep_config().new_tree(&mut runner).expect("a config");
        let config = config.current();
        let ops = any_deep_ops().new_tree(&mut runner).expect("operations");
        let depth = config.max_steps_in_flight as usize;
        let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
        let replica = run(Replica::new(scheduler, config), ops.current());
        let stats = replica.scheduler.stats();
        deep += usize::from(replica.num_in_flight_max == depth);
        chunks += replica.num_chunks_in_flight;
        preemptions += stats.preemptions;
        hits += u64::from(stats.prefix_hit_tokens > 0);
    }
    assert!(deep > 40, "{deep} runs with as many steps as may be");
    assert!(chunks > 200, "{chunks} chunks behind others");
    assert!(preemptions > 80, "{preemptions} preemptions");
    assert!(hits > 30, "prefix hits in {hits} runs");
}
