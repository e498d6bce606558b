//! Steps that are planned before the tokens of the one before them are known.

use std::{collections::VecDeque, time::Duration};

use orchestra_core::{
    HashSeed, RequestId, SamplingParams, Time, TokenId,
    step::{
        FinishReason, PENDING_TOKEN, Request, StepOutput, StepPlan, StepScheduler,
        StepSchedulerConfig, TokenUpdate,
    },
};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};

use crate::{any_ahead_config, any_deep_ops, replica::Replica, run};

fn config() -> StepSchedulerConfig {
    StepSchedulerConfig {
        block_size: 4,
        num_blocks: 40,
        max_num_seqs: 4,
        max_model_len: 64,
        max_steps_in_flight: 2,
        plans_ahead: true,
        eos_token_ids: vec![9],
        ..StepSchedulerConfig::default()
    }
}

fn scheduler(config: StepSchedulerConfig) -> StepScheduler {
    StepScheduler::new(config).expect("a valid config")
}

fn request(id: u64, num_tokens: u32, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt_token_ids: (0..num_tokens)
            .map(|index| id as u32 * 100 + index)
            .collect(),
        output_token_ids: Vec::new(),
        sampling: SamplingParams {
            max_tokens,
            ..SamplingParams::default()
        },
        hash_seed: HashSeed(0),
    }
}

fn add(scheduler: &mut StepScheduler, request: Request) {
    scheduler.add_request(request, Time::ZERO).expect("room");
}

fn plan(scheduler: &mut StepScheduler) -> Option<StepPlan> {
    scheduler.schedule(Time::ZERO)
}

/// Commits a step that drew these tokens.
fn commit(scheduler: &mut StepScheduler, plan: &StepPlan, tokens: &[TokenId]) -> Vec<TokenUpdate> {
    let output = StepOutput {
        step_id: plan.step_id,
        token_ids: tokens.to_vec(),
        logprobs: Vec::new(),
    };
    let updates = scheduler.update_from_output(&output, Time::ZERO);
    scheduler.check_integrity();
    updates.expect("an output that fits")
}

#[test]
fn the_next_step_has_everybody_and_names_no_token() {
    let mut scheduler = scheduler(config());
    add(&mut scheduler, request(0, 3, 9));
    add(&mut scheduler, request(1, 5, 9));
    let first = plan(&mut scheduler).expect("the prompts");
    let second = plan(&mut scheduler).expect("their first tokens");
    assert_eq!(second.token_ids, [PENDING_TOKEN; 2]);
    assert_eq!(second.positions, [3, 5]);
    assert_eq!(second.samples.len(), 2);
    assert_eq!(plan(&mut scheduler), None, "two are in flight");
    commit(&mut scheduler, &first, &[1, 2]);
    let third = plan(&mut scheduler).expect("one may follow");
    assert_eq!(third.token_ids, [PENDING_TOKEN; 2]);
    let updates = commit(&mut scheduler, &second, &[3, 4]);
    let tokens: Vec<_> = updates
        .iter()
        .map(|it| (it.token_id, it.output_index))
        .collect();
    assert_eq!(tokens, [(3, 1), (4, 1)]);
    commit(&mut scheduler, &third, &[5, 6]);
    let fourth = plan(&mut scheduler).expect("they go on");
    assert_eq!(fourth.token_ids, [5, 6], "nothing was in flight");
}

#[test]
fn nothing_is_drawn_beyond_max_tokens() {
    let mut scheduler = scheduler(config());
    add(&mut scheduler, request(0, 3, 2));
    let first = plan(&mut scheduler).expect("the prompt");
    let second = plan(&mut scheduler).expect("the second token");
    assert_eq!(commit(&mut scheduler, &first, &[1])[0].finish_reason, None);
    assert_eq!(plan(&mut scheduler), None, "there is no third");
    let last = &commit(&mut scheduler, &second, &[2])[0];
    assert_eq!(last.finish_reason, Some(FinishReason::Length));
    assert!(!scheduler.has_work());
}

#[test]
fn what_was_planned_for_somebody_who_has_ended_is_dropped() {
    let mut scheduler = scheduler(config());
    add(&mut scheduler, request(0, 3, 9));
    add(&mut scheduler, request(1, 3, 9));
    let first = plan(&mut scheduler).expect("the prompts");
    let second = plan(&mut scheduler).expect("planned ahead");
    let updates = commit(&mut scheduler, &first, &[9, 1]);
    assert_eq!(updates[0].finish_reason, Some(FinishReason::Stop));
    assert_eq!(second.samples.len(), 2, "one of them in vain");
    // Its slot and its blocks are somebody else's in the plan behind that.
    add(&mut scheduler, request(2, 3, 9));
    let third = plan(&mut scheduler).expect("the newcomer");
    assert_eq!(third.starts.len(), 1);
    assert_eq!(third.starts[0].slot, second.slots[0]);
    let updates = commit(&mut scheduler, &second, &[7, 2]);
    let whose: Vec<_> = updates
        .iter()
        .map(|it| (it.request_id, it.token_id))
        .collect();
    assert_eq!(whose, [(RequestId(1), 2)]);
    let whose = commit(&mut scheduler, &third, &[3, 4]);
    assert_eq!(whose.len(), 2);
    assert_eq!(whose.iter().map(|it| it.output_index).sum::<u32>(), 2);
}

#[test]
fn who_lacks_a_block_gets_one_when_those_behind_are_no_longer_in_flight() {
    let mut scheduler = scheduler(StepSchedulerConfig {
        num_blocks: 5,
        ..config()
    });
    // Both draw six tokens. The junior takes the last block with its first, the senior needs one two tokens later.
    for (id, num_tokens) in [(0, 6), (1, 8)] {
        add(&mut scheduler, request(id, num_tokens, 6));
    }
    let (mut steps, mut sizes) = (VecDeque::new(), Vec::new());
    while scheduler.stats().preemptions == 0 {
        assert!(sizes.len() < 12, "the senior waits: {sizes:?}");
        while let Some(next) = plan(&mut scheduler) {
            sizes.push(next.slots.len());
            steps.push_back(next);
        }
        let oldest = steps.pop_front().expect("something is in flight");
        commit(&mut scheduler, &oldest, &vec![1; oldest.samples.len()]);
    }
    // At the fourth step the junior is held back, so that it can give way one commit later: the senior goes on alone.
    assert_eq!(sizes, [2, 2, 2, 1, 1]);
}

#[test]
fn a_step_behind_another_counts_from_that_ones_commit() {
    let mut scheduler = scheduler(config());
    add(&mut scheduler, request(0, 3, 9));
    let steps = [(); 2].map(|()| plan(&mut scheduler).expect("two steps"));
    for (step, now) in steps.iter().zip([5_000, 7_000]) {
        let output = StepOutput {
            step_id: step.step_id,
            token_ids: vec![1],
            logprobs: Vec::new(),
        };
        let committed = scheduler.update_from_output(&output, Time(now));
        committed.expect("an output that fits");
    }
    assert_eq!(scheduler.stats().step_time, Duration::from_millis(2));
}

/// The property says little where the random runs know every token in time.
#[test]
fn the_random_runs_plan_ahead() {
    let mut runner = TestRunner::deterministic();
    let (mut pending, mut preemptions, mut hits) = (0, 0, 0);
    for _ in 0..64 {
        let config = any_ahead_config().new_tree(&mut runner).expect("a config");
        let config = config.current();
        let ops = any_deep_ops().new_tree(&mut runner).expect("operations");
        let scheduler = StepScheduler::new(config.clone()).expect("a valid config");
        let replica = run(Replica::new(scheduler, config), ops.current());
        let stats = replica.scheduler.stats();
        pending += replica.num_pending_rows;
        preemptions += stats.preemptions;
        hits += u64::from(stats.prefix_hit_tokens > 0);
    }
    assert!(pending > 1000, "{pending} rows before their token");
    assert!(preemptions > 80, "{preemptions} preemptions");
    assert!(hits > 30, "prefix hits in {hits} runs");
}
