//! Writes what was decided as flat arrays.

use std::ops::Range;

use super::{
    commit::Executing,
    plan::{PENDING_TOKEN, Sample, StepPlan},
    sequence::Running,
};
use crate::time::Time;

/// What is known of a plan before it is written.
pub(super) struct PlanShape {
    pub(super) step_id: u64,
    pub(super) planned_at: Time,
    /// Sequences that only lacked their last token.
    pub(super) num_decodes: usize,
    /// Tokens of the others.
    pub(super) num_prefill_tokens: usize,
}

/// The plan of the sequences that have scheduled tokens, those that decode first, and what its commit needs to
/// know. Blocks that the plan tells the runner of count as sent.
pub(super) fn build_plan(
    shape: &PlanShape,
    running: &mut [Running],
    block_size: u32,
) -> (StepPlan, Executing) {
    let num_tokens = shape.num_decodes + shape.num_prefill_tokens;
    let mut plan = StepPlan {
        step_id: shape.step_id,
        token_ids: Vec::with_capacity(num_tokens),
        positions: Vec::with_capacity(num_tokens),
        slot_mapping: Vec::with_capacity(num_tokens),
        query_start: Vec::with_capacity(running.len() + 1),
        context_lens: Vec::with_capacity(running.len()),
        slots: Vec::with_capacity(running.len()),
        samples: Vec::with_capacity(running.len()),
        ..StepPlan::default()
    };
    let mut executing = Executing::new(shape, running.len());
    plan.query_start.push(0);
    let mut has_prefills = false;
    for row in &mut *running {
        let is_scheduled = row.num_scheduled_tokens > 0;
        if is_scheduled && row.is_decode() {
            push_row(&mut plan, &mut executing, row, block_size);
        } else {
            has_prefills |= is_scheduled;
        }
    }
    if has_prefills {
        let prefills = running
            .iter_mut()
            .filter(|row| row.num_scheduled_tokens > 0 && !row.is_decode());
        for row in prefills {
            push_row(&mut plan, &mut executing, row, block_size);
        }
    }
    (plan, executing)
}

fn push_row(plan: &mut StepPlan, executing: &mut Executing, row: &mut Running, block_size: u32) {
    let (start, end) = (
        row.next_position(),
        row.next_position() + row.num_scheduled_tokens,
    );
    let num_blocks = if row.is_decode() {
        push_last_token(plan, row, block_size)
    } else {
        push_tokens(plan, row, start as u32..end as u32, block_size)
    };
    plan.block_table_width = plan.block_table_width.max(num_blocks);
    push_table_updates(plan, row);

    let sequence_index = plan.context_lens.len() as u32;
    plan.context_lens.push(end as u32);
    plan.query_start.push(plan.token_ids.len() as u32);
    plan.slots.push(row.slot);
    if row.draws_token() {
        let logprobs = row.sequence.sampling.logprobs;
        plan.samples.push(Sample {
            request_id: row.sequence.id,
            sequence_index,
            slot: row.slot,
            position: end as u32,
            logprobs,
        });
        executing.expect_token(row.seniority, logprobs.is_some());
    }
}

/// Adds the one token of a decode. It is the last one, known or pending, and the table ends with its block: so this needs no
/// division and no loop, which most rows of most steps would pay for. Returns in how many blocks the sequence has its
/// KV after the step.
fn push_last_token(plan: &mut StepPlan, row: &Running, block_size: u32) -> u32 {
    let position = row.next_position() as u32;
    let column = row.block_table.len() - 1;
    let offset = position - column as u32 * block_size;
    let known = row.sequence.token_ids.get(position as usize);
    plan.token_ids.push(known.copied().unwrap_or(PENDING_TOKEN));
    plan.positions.push(position);
    plan.slot_mapping
        .push(row.block_table[column].0 * block_size + offset);
    column as u32 + 1
}

/// Adds the tokens of a prefill at these positions, and returns the same. The table may reach further, to tokens of
/// later steps.
fn push_tokens(plan: &mut StepPlan, row: &Running, positions: Range<u32>, block_size: u32) -> u32 {
    let token_ids = &row.sequence.token_ids[positions.start as usize..positions.end as usize];
    plan.token_ids.extend_from_slice(token_ids);
    let mut column = positions.start / block_size;
    let mut position = positions.start;
    while position < positions.end {
        let block_end = positions.end.min((column + 1) * block_size);
        let first_slot = row.block_table[column as usize].0 * block_size;
        let offset = position - column * block_size;
        let count = block_end - position;
        plan.slot_mapping
            .extend(first_slot + offset..first_slot + offset + count);
        position = block_end;
        column += 1;
    }
    plan.positions.extend(positions);
    column
}

/// Tells the runner of the blocks that its table lacks.
fn push_table_updates(plan: &mut StepPlan, row: &mut Running) {
    let sent = row.num_sent_blocks;
    if sent == row.block_table.len() {
        return;
    }
    let blocks = &row.block_table[sent..];
    plan.update_slots
        .extend(std::iter::repeat_n(row.slot, blocks.len()));
    plan.update_columns
        .extend(sent as u32..row.block_table.len() as u32);
    plan.update_blocks
        .extend(blocks.iter().map(|block| block.0));
    row.num_sent_blocks = row.block_table.len();
}
