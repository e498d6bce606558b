//! What is true of every plan, whatever it computes.

use orchestra_core::step::StepPlan;
use rustc_hash::FxHashSet;

use crate::replica::Replica;

impl Replica {
    /// Asserts that a plan's arrays fit each other and the limits.
    pub(crate) fn check_shape(&self, plan: &StepPlan) {
        let (rows, num_tokens) = (plan.context_lens.len(), plan.token_ids.len());
        assert!(
            num_tokens <= self.config.max_num_batched_tokens as usize,
            "token budget"
        );
        assert!((1..=self.config.max_num_seqs as usize).contains(&rows));
        assert_eq!(plan.positions.len(), num_tokens);
        assert_eq!(plan.slot_mapping.len(), num_tokens);
        assert_eq!(plan.query_start.len(), rows + 1);
        assert_eq!(plan.query_start.last(), Some(&(num_tokens as u32)));
        assert_eq!(plan.slots.len(), rows);
        let num_updates = plan.update_blocks.len();
        assert_eq!(plan.update_slots.len(), num_updates);
        assert_eq!(plan.update_columns.len(), num_updates);
        let longest = plan.context_lens.iter().max().expect("a row");
        let width = longest.div_ceil(self.config.block_size);
        assert_eq!(plan.block_table_width, width);
        let lens: Vec<u32> = plan
            .query_start
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .collect();
        if self.config.max_prefill_chunk > 0 {
            assert!(
                lens.iter()
                    .all(|&len| len <= self.config.max_prefill_chunk.max(1))
            );
        }
        for (row, len) in lens.iter().enumerate() {
            let last = plan.query_start[row + 1] as usize - 1;
            assert_eq!(
                plan.positions[last] + 1,
                plan.context_lens[row],
                "row {row} of {len}"
            );
        }
        let slots: FxHashSet<u32> = plan.slots.iter().copied().collect();
        assert_eq!(slots.len(), rows, "a slot has one row");
        for sample in &plan.samples {
            assert_eq!(sample.slot, plan.slots[sample.sequence_index as usize]);
        }
    }
}
