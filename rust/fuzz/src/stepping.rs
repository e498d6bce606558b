//! Requests that come and go while steps are planned, executed and committed.

use arbitrary::{Arbitrary, Unstructured};
use orchestra_core::{
    HashSeed, RequestId, SamplingParams, Time,
    step::{Request, StepOutput, StepPlan, StepScheduler, StepSchedulerConfig},
};

use crate::operations;

#[derive(Debug, Arbitrary)]
enum Op {
    Add {
        id: u8,
        prompt: Vec<u8>,
        output: Vec<u8>,
        max_tokens: u8,
    },
    Abort(u8),
    AbortAll,
    Schedule(u16),
    /// Tokens for the step that executes: too few, too many or for another step, as it comes.
    Commit {
        step: Option<u8>,
        token_ids: Option<Vec<u8>>,
    },
}

#[derive(Debug, Arbitrary)]
struct Sizes {
    block_size: u8,
    num_blocks: u8,
    max_num_seqs: u8,
    max_num_batched_tokens: u8,
    max_prefill_chunk: u8,
    tpot_target_us: u16,
    num_host_blocks: u8,
    enable_prefix_cache: bool,
}

/// Any operations, in any order, on a replica of any small size.
///
/// # Panics
/// If an invariant breaks.
pub fn stepping(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(sizes) = Sizes::arbitrary(&mut input) else {
        return;
    };
    let config = StepSchedulerConfig {
        block_size: u32::from(sizes.block_size % 6),
        num_blocks: sizes.num_blocks.into(),
        max_num_seqs: u32::from(sizes.max_num_seqs % 9),
        max_num_batched_tokens: sizes.max_num_batched_tokens.into(),
        max_model_len: 60,
        max_num_waiting: 8,
        max_prefill_chunk: u32::from(sizes.max_prefill_chunk % 20),
        tpot_target_us: sizes.tpot_target_us.into(),
        num_host_blocks: sizes.num_host_blocks.into(),
        enable_prefix_cache: sizes.enable_prefix_cache,
        ..StepSchedulerConfig::default()
    };
    let Ok(mut scheduler) = StepScheduler::new(config) else {
        return;
    };
    let (mut executing, mut now) = (None, Time::ZERO);
    for op in operations::<Op>(input) {
        apply(&mut scheduler, &mut executing, &mut now, op);
        scheduler.check_integrity();
    }
    scheduler.abort_all();
    if let Some(plan) = executing {
        let output = StepOutput {
            step_id: plan.step_id,
            token_ids: vec![1; plan.samples.len()],
            logprobs: Vec::new(),
        };
        assert!(scheduler.update_from_output(&output, now).is_ok());
    }
    scheduler.check_integrity();
    assert!(!scheduler.has_work(), "everything can be ended");
}

fn apply(scheduler: &mut StepScheduler, executing: &mut Option<StepPlan>, now: &mut Time, op: Op) {
    match op {
        Op::Add {
            id,
            prompt,
            output,
            max_tokens,
        } => {
            let tokens = |bytes: Vec<u8>| bytes.into_iter().map(|byte| (byte % 3).into()).collect();
            let request = Request {
                id: RequestId(id.into()),
                prompt_token_ids: tokens(prompt),
                output_token_ids: tokens(output),
                sampling: SamplingParams {
                    max_tokens: max_tokens.into(),
                    ..SamplingParams::default()
                },
                hash_seed: HashSeed::default(),
            };
            let num_before = scheduler.stats().num_waiting;
            let is_refused = scheduler.add_request(request, *now).is_err();
            assert_eq!(scheduler.stats().num_waiting == num_before, is_refused);
        }
        Op::Abort(id) => {
            scheduler.abort(RequestId(id.into()));
        }
        Op::AbortAll => {
            scheduler.abort_all();
        }
        Op::Schedule(micros) => {
            now.0 += u64::from(micros);
            // One step at a time: the last one is committed first.
            if executing.is_none() {
                *executing = scheduler.schedule(*now);
            }
        }
        Op::Commit { step, token_ids } => {
            let Some(plan) = executing.as_ref() else {
                return;
            };
            let drawn = token_ids.map_or_else(
                || vec![1; plan.samples.len()],
                |bytes| bytes.into_iter().map(u32::from).collect(),
            );
            let output = StepOutput {
                step_id: step.map_or(plan.step_id, u64::from),
                token_ids: drawn,
                logprobs: Vec::new(),
            };
            if scheduler.update_from_output(&output, *now).is_ok() {
                *executing = None;
            }
        }
    }
}
