//! The limits of what moves, and the corners that random runs seldom reach.

use super::*;
use crate::{
    sampling::SamplingParams,
    step::{StepOutput, StepSchedulerConfig},
};

fn scheduler(num_blocks: u32) -> StepScheduler {
    StepScheduler::new(StepSchedulerConfig {
        block_size: 4,
        num_blocks,
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        ..StepSchedulerConfig::default()
    })
    .unwrap()
}

fn request(id: u64) -> Request {
    Request {
        id: RequestId(id),
        prompt_token_ids: (0..18).map(|token| token + 100 * id as u32).collect(),
        output_token_ids: Vec::new(),
        sampling: SamplingParams {
            max_tokens: 8,
            ..SamplingParams::default()
        },
        hash_seed: HashSeed(1),
    }
}

#[test]
fn nothing_is_awaited_while_a_step_may_write_to_blocks_of_an_aborted_request() {
    let mut scheduler = scheduler(16);
    scheduler.add_request(request(1), Time(0)).unwrap();
    scheduler.schedule(Time(1)).unwrap();
    assert!(scheduler.abort(RequestId(1)));
    let awaited = scheduler.add_awaiting(request(2), 4, Time(9), Time(1));
    assert_eq!(awaited, Ok(None));
    assert_eq!(
        scheduler.stats().num_waiting,
        1,
        "it is queued all the same"
    );
    scheduler.check_integrity();
}

#[test]
fn what_comes_and_what_is_read_leaves_half_of_the_pool() {
    let mut scheduler = scheduler(14);
    let mut wait = |id| {
        scheduler
            .add_awaiting(request(id), 4, Time(9), Time(0))
            .unwrap()
    };
    let first = wait(1).unwrap();
    assert_eq!((first.first_block, first.blocks.len()), (0, 4));
    assert_eq!(wait(2), None, "seven of fourteen, four are taken");
    assert!(scheduler.kv_failed(first.hold));
    let still = scheduler.add_awaiting(request(3), 4, Time(9), Time(0));
    assert_eq!(still, Ok(None), "withheld blocks count");
    assert!(scheduler.release_hold(first.hold));
    let again = scheduler.add_awaiting(request(4), 4, Time(9), Time(0));
    let again = again.unwrap().unwrap();
    assert!(scheduler.kv_arrived(again.hold, 4));
    let prompt = request(4).prompt_token_ids;
    let held = scheduler.hold_prefix(HashSeed(1), &prompt, 9).unwrap();
    assert_eq!(held.blocks, again.blocks);
    assert_eq!(scheduler.hold_prefix(HashSeed(1), &prompt, 9), None);
    assert_eq!(scheduler.hold_prefix(HashSeed(2), &prompt, 9), None);
    scheduler.check_integrity();
}

#[test]
fn a_request_stops_to_await_at_its_deadline() {
    let mut scheduler = scheduler(16);
    let awaited = scheduler.add_awaiting(request(1), 4, Time(9), Time(0));
    let hold = awaited.unwrap().unwrap().hold;
    assert_eq!(scheduler.next_deadline(), Some(Time(9)));
    assert_eq!(scheduler.schedule(Time(8)), None);
    let plan = scheduler.schedule(Time(9)).unwrap();
    assert_eq!(plan.token_ids.len(), 18, "it computes all of its prompt");
    assert!(!scheduler.kv_arrived(hold, 4), "too late");
    assert_eq!(scheduler.stats().fetch_failures, 1);
    scheduler.check_integrity();
}

#[test]
fn a_hold_follows_blocks_that_the_commit_replaces() {
    let mut scheduler = StepScheduler::new(StepSchedulerConfig {
        max_prefix_wait_steps: 0,
        ..scheduler(32).config
    })
    .unwrap();
    // Both compute the first two blocks in one step, and the commit keeps those of the shorter.
    let mut shorter = request(1);
    shorter.prompt_token_ids.truncate(9);
    let longer = Request {
        id: RequestId(2),
        ..request(1)
    };
    scheduler.add_prefill(shorter, 9, Time(0)).unwrap();
    scheduler.add_prefill(longer, 9, Time(0)).unwrap();
    let plan = scheduler.schedule(Time(1)).unwrap();
    let [first, second] = &plan.filled[..] else {
        panic!("both fill blocks: {plan:?}");
    };
    assert_eq!((first.blocks.len(), second.blocks.len()), (2, 4));
    let output = StepOutput {
        step_id: plan.step_id,
        ..StepOutput::default()
    };
    assert_eq!(
        scheduler.update_from_output(&output, Time(2)),
        Ok(Vec::new())
    );
    assert_eq!(scheduler.take_prefilled(), [RequestId(1), RequestId(2)]);
    scheduler.check_integrity();
    assert_eq!(
        scheduler.stats().kv_blocks_used,
        6,
        "four cached, two replaced"
    );
    assert!(scheduler.release_hold(first.hold));
    scheduler.check_integrity();
    assert!(scheduler.release_hold(second.hold));
    scheduler.check_integrity();
    assert_eq!(scheduler.stats().kv_blocks_used, 0);
    assert_eq!(scheduler.cached_block_hashes().len(), 4);
}
