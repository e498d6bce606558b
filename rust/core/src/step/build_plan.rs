//! Writes what was decided as flat arrays.

use super::{
    plan::{Sample, SequenceStart, StepPlan},
    sequence::Running,
};

/// The sequences that have scheduled tokens, in the order of a plan: those that decode, then those that prefill.
pub(super) fn plan_rows(running: &[Running]) -> Vec<&Running> {
    let scheduled = || {
        running
            .iter()
            .filter(|running| running.num_scheduled_tokens > 0)
    };
    let decodes = scheduled().filter(|running| running.is_decode());
    decodes
        .chain(scheduled().filter(|running| !running.is_decode()))
        .collect()
}

/// The plan of these rows.
pub(super) fn build_plan(
    step_id: u64,
    rows: &[&Running],
    block_size: u32,
    starts: Vec<SequenceStart>,
) -> StepPlan {
    let num_tokens = rows.iter().map(|row| row.num_scheduled_tokens).sum();
    let width = rows
        .iter()
        .map(|row| num_blocks(row, block_size))
        .max()
        .unwrap_or(0);
    let mut plan = StepPlan {
        step_id,
        token_ids: Vec::with_capacity(num_tokens),
        positions: Vec::with_capacity(num_tokens),
        slot_mapping: Vec::with_capacity(num_tokens),
        query_start: Vec::with_capacity(rows.len() + 1),
        context_lens: Vec::with_capacity(rows.len()),
        block_tables: Vec::with_capacity(rows.len() * width),
        block_table_width: width as u32,
        samples: Vec::with_capacity(rows.len()),
        starts,
    };
    plan.query_start.push(0);
    for row in rows {
        push_row(&mut plan, row, block_size);
    }
    plan
}

/// Tokens of KV after the step.
fn context_len(row: &Running) -> usize {
    row.num_computed_tokens + row.num_scheduled_tokens
}

/// Blocks that hold them. A table that reaches further, to tokens of later steps, is cut.
fn num_blocks(row: &Running, block_size: u32) -> usize {
    context_len(row).div_ceil(block_size as usize)
}

fn push_row(plan: &mut StepPlan, row: &Running, block_size: u32) {
    let (start, end) = (row.num_computed_tokens, context_len(row));
    plan.token_ids
        .extend_from_slice(&row.sequence.token_ids[start..end]);
    plan.positions.extend(start as u32..end as u32);
    plan.slot_mapping
        .extend((start as u32..end as u32).map(|position| {
            let block = row.block_table[(position / block_size) as usize];
            block.0 * block_size + position % block_size
        }));
    let sequence_index = plan.context_lens.len();
    plan.context_lens.push(end as u32);
    plan.query_start.push(plan.token_ids.len() as u32);

    let blocks = &row.block_table[..num_blocks(row, block_size)];
    plan.block_tables.extend(blocks.iter().map(|block| block.0));
    plan.block_tables
        .resize((sequence_index + 1) * plan.block_table_width as usize, 0);

    if row.draws_token() {
        plan.samples.push(Sample {
            request_id: row.sequence.id,
            sequence_index: sequence_index as u32,
            slot: row.slot,
            position: end as u32,
            logprobs: row.sequence.sampling.logprobs,
        });
    }
}
