//! Host memory that keeps the KV of preempted sequences, so that it is copied back instead of computed again.
//!
//! Copies are made by the plan that follows: first those into host memory, then those out of it. So a device block
//! that a victim gave up may have a new owner in the very plan that saves it.

use super::{
    config::StepSchedulerConfig,
    plan::{BlockCopies, StepPlan},
};
use crate::ids::BlockId;

/// KV of a preempted sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Swapped {
    /// The block of its table that `host_blocks` begins with. Those before it were shared and stay where they are.
    pub(super) first_column: usize,
    pub(super) host_blocks: Vec<u32>,
    pub(super) num_computed_tokens: usize,
}

impl Swapped {
    /// The block of the table behind the last one that is kept.
    pub(super) fn end_column(&self) -> usize {
        self.first_column + self.host_blocks.len()
    }
}

/// The host's blocks, and the copies that the next plan has to make.
#[derive(Debug)]
pub(super) struct HostTier {
    num_blocks: u32,
    cost_permille: u64,
    free: Vec<u32>,
    swap_out: BlockCopies,
    swap_in: BlockCopies,
}

impl HostTier {
    pub(super) fn new(config: &StepSchedulerConfig) -> Self {
        Self {
            num_blocks: config.num_host_blocks,
            cost_permille: u64::from(config.swap_cost_permille),
            free: (0..config.num_host_blocks).rev().collect(),
            swap_out: BlockCopies::default(),
            swap_in: BlockCopies::default(),
        }
    }

    /// Keeps the blocks of `table` from `first_column` on, as far as `num_computed_tokens` reach. `None`, and nothing
    /// kept, where computing them again costs no more, or where host memory lacks room.
    pub(super) fn keep(
        &mut self,
        table: &[BlockId],
        first_column: usize,
        num_computed_tokens: usize,
        block_size: usize,
    ) -> Option<Swapped> {
        let end = num_computed_tokens.div_ceil(block_size);
        let blocks = table.get(first_column..end)?;
        let num_moved_tokens = (blocks.len() * block_size) as u64;
        let num_lost_tokens = num_computed_tokens.saturating_sub(first_column * block_size) as u64;
        let is_cheaper = num_moved_tokens * self.cost_permille < num_lost_tokens * 1000;
        let rest = self.free.len().checked_sub(blocks.len())?;
        if !is_cheaper {
            return None;
        }
        let host_blocks = self.free.split_off(rest);
        for (block, &host_block) in blocks.iter().zip(&host_blocks) {
            self.swap_out.push(*block, host_block);
        }
        Some(Swapped {
            first_column,
            host_blocks,
            num_computed_tokens,
        })
    }

    /// Copies what is kept back into `table`, whose first `num_matched` blocks hold theirs already, and frees it.
    /// Returns how many tokens are computed then; `None` where the table lacks the KV before what is kept.
    pub(super) fn restore(
        &mut self,
        swapped: Swapped,
        table: &[BlockId],
        num_matched: usize,
    ) -> Option<usize> {
        let is_useful = (swapped.first_column..swapped.end_column()).contains(&num_matched);
        if is_useful {
            let host_blocks = &swapped.host_blocks[num_matched - swapped.first_column..];
            for (block, &host_block) in table[num_matched..].iter().zip(host_blocks) {
                self.swap_in.push(*block, host_block);
            }
        }
        let num_computed_tokens = swapped.num_computed_tokens;
        self.free(swapped);
        is_useful.then_some(num_computed_tokens)
    }

    /// Forgets what is kept of a sequence that has ended.
    pub(super) fn free(&mut self, swapped: Swapped) {
        self.free.extend(swapped.host_blocks);
    }

    /// Whether the next plan has copies to make.
    pub(super) fn has_copies(&self) -> bool {
        !self.swap_out.blocks.is_empty() || !self.swap_in.blocks.is_empty()
    }

    /// Makes none of the copies that the next plan would have made: nobody wants what they were to save.
    pub(super) fn forget_copies(&mut self) {
        self.swap_out = BlockCopies::default();
        self.swap_in = BlockCopies::default();
    }

    /// Moves the copies into the plan that is to make them.
    pub(super) fn move_copies(&mut self, plan: &mut StepPlan) {
        plan.swap_out = std::mem::take(&mut self.swap_out);
        plan.swap_in = std::mem::take(&mut self.swap_in);
    }

    /// Asserts that each block is free or kept for one sequence.
    pub(super) fn check_integrity<'a>(&self, kept: impl Iterator<Item = &'a Swapped>) {
        let mut blocks = self.free.clone();
        blocks.extend(kept.flat_map(|swapped| &swapped.host_blocks));
        blocks.sort_unstable();
        assert!(
            blocks.iter().copied().eq(0..self.num_blocks),
            "host blocks: {blocks:?}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_SIZE: usize = 4;

    fn tier(num_host_blocks: u32, swap_cost_permille: u32) -> HostTier {
        HostTier::new(&StepSchedulerConfig {
            num_host_blocks,
            swap_cost_permille,
            ..StepSchedulerConfig::default()
        })
    }

    fn table() -> Vec<BlockId> {
        (10..16).map(BlockId).collect()
    }

    /// The blocks to copy in and out, by the plan that is to do it.
    fn copies(tier: &mut HostTier) -> [Vec<u32>; 2] {
        let mut plan = StepPlan::default();
        tier.move_copies(&mut plan);
        [plan.swap_out.blocks, plan.swap_in.blocks]
    }

    #[test]
    fn keeps_what_is_computed_and_not_shared_and_restores_what_the_cache_lacks() {
        let mut tier = tier(4, 100);
        let swapped = tier.keep(&table(), 2, 18, BLOCK_SIZE).unwrap();
        assert_eq!(copies(&mut tier), [vec![12, 13, 14], vec![]]);
        tier.check_integrity([&swapped].into_iter());
        assert_eq!(tier.restore(swapped, &table(), 3), Some(18));
        assert_eq!(copies(&mut tier), [vec![], vec![13, 14]]);
        tier.check_integrity([].into_iter());
    }

    #[test]
    fn what_does_not_reach_the_matched_blocks_or_not_beyond_them_is_of_no_use() {
        let mut tier = tier(4, 100);
        for num_matched in [1, 5] {
            let swapped = tier.keep(&table(), 2, 18, BLOCK_SIZE).unwrap();
            copies(&mut tier);
            assert_eq!(tier.restore(swapped, &table(), num_matched), None);
            assert!(
                copies(&mut tier).iter().all(Vec::is_empty),
                "{num_matched} matched"
            );
        }
        tier.check_integrity([].into_iter());
    }

    #[test]
    fn keeps_nothing_without_room_or_where_computing_again_is_as_cheap() {
        assert_eq!(tier(2, 100).keep(&table(), 2, 18, BLOCK_SIZE), None);
        assert_eq!(tier(9, 100).keep(&table(), 5, 18, BLOCK_SIZE), None);
        assert_eq!(tier(9, 1000).keep(&table(), 2, 20, BLOCK_SIZE), None);
        assert!(tier(9, 999).keep(&table(), 2, 20, BLOCK_SIZE).is_some());
        // Three blocks are moved for ten tokens.
        assert!(tier(9, 833).keep(&table(), 2, 18, BLOCK_SIZE).is_some());
        assert_eq!(tier(9, 834).keep(&table(), 2, 18, BLOCK_SIZE), None);
    }
}
