//! Host memory that keeps the KV of preempted sequences, and blocks that the device's cache gave up or that another
//! worker brought, so that they are copied back instead of computed again.
//!
//! Copies are made by the plan that follows: first those into host memory, then those out of it. So a device block
//! that a victim gave up may have a new owner in the very plan that saves it.

use rustc_hash::FxHashSet;

use super::{
    config::StepSchedulerConfig,
    host_cache::{Before, ContentId, Gone, HostCache, Kept, Origin},
    kv_events::KvEventLog,
    plan::{BlockCopies, StepPlan},
};
use crate::{
    hash::BlockHash,
    ids::{BlockId, TokenId},
};

/// KV of a preempted sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Swapped {
    /// The block of its table that `host_blocks` begins with. Those before it were shared and stay where they are.
    pub(super) first_column: usize,
    pub(super) host_blocks: Vec<u32>,
    pub(super) num_computed_tokens: usize,
}

/// The host's blocks, and the copies that the next plan has to make.
///
/// Preempted sequences come first: what the cache keeps goes where they need the room.
#[derive(Debug)]
pub(super) struct HostTier {
    num_blocks: u32,
    block_size: usize,
    cost_permille: u64,
    free: Vec<u32>,
    pub(super) cache: HostCache,
    /// Pinned for the sequence that is about to start.
    hits: Vec<u32>,
    /// Read by the next plan, and so not to be written by it.
    leaving: Vec<u32>,
    swap_out: BlockCopies,
    swap_in: BlockCopies,
}

impl HostTier {
    pub(super) fn new(config: &StepSchedulerConfig) -> Self {
        Self {
            num_blocks: config.num_host_blocks,
            block_size: config.block_size as usize,
            cost_permille: u64::from(config.swap_cost_permille),
            free: (0..config.num_host_blocks).rev().collect(),
            cache: HostCache::new(config.num_host_blocks, config.block_size),
            hits: Vec::new(),
            leaving: Vec::new(),
            swap_out: BlockCopies::default(),
            swap_in: BlockCopies::default(),
        }
    }

    // === preempted sequences ===

    /// Keeps the blocks of `table` from `first_column` on, as far as `num_computed_tokens` reach. `None`, and nothing
    /// kept, where computing them again costs no more, or where host memory lacks room.
    pub(super) fn keep(
        &mut self,
        table: &[BlockId],
        first_column: usize,
        num_computed_tokens: usize,
        events: &mut KvEventLog,
    ) -> Option<Swapped> {
        let end = num_computed_tokens.div_ceil(self.block_size);
        let blocks = table.get(first_column..end)?;
        let num_moved_tokens = (blocks.len() * self.block_size) as u64;
        let num_lost_tokens =
            num_computed_tokens.saturating_sub(first_column * self.block_size) as u64;
        let is_cheaper = num_moved_tokens * self.cost_permille < num_lost_tokens * 1000;
        if !is_cheaper || blocks.len() > self.num_available() {
            return None;
        }
        let host_blocks: Vec<u32> = blocks
            .iter()
            .map_while(|_| self.take(Origin::Evicted, events))
            .collect();
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
        let Swapped {
            first_column,
            mut host_blocks,
            num_computed_tokens,
        } = swapped;
        let is_useful = (first_column..first_column + host_blocks.len()).contains(&num_matched);
        if is_useful {
            let copied = host_blocks.split_off(num_matched - first_column);
            for (&block, host_block) in table[num_matched..].iter().zip(copied) {
                self.cache.pin(host_block);
                self.copy_in(block, host_block);
            }
        }
        self.free.extend(host_blocks);
        is_useful.then_some(num_computed_tokens)
    }

    /// Forgets what is kept of a sequence that has ended.
    pub(super) fn free(&mut self, swapped: Swapped) {
        self.free.extend(swapped.host_blocks);
    }

    // === the second level of the prefix cache ===

    /// Keeps a block that the device's cache gives up; `false` where that is not worth its copies, or where there is
    /// no room.
    pub(super) fn demote(
        &mut self,
        block: BlockId,
        kept: Kept,
        token_ids: &[TokenId],
        events: &mut KvEventLog,
    ) -> bool {
        if self.cost_permille >= 1000 || self.cache.contains(kept.hash) {
            return false;
        }
        let Some(host_block) = self.take(Origin::Evicted, events) else {
            return false;
        };
        self.swap_out.push(block, host_block);
        self.cache
            .insert(host_block, kept, token_ids, Origin::Evicted);
        events.kept(kept.hash);
        true
    }

    /// Whether there is anything to copy back, and that costs less than to compute it.
    pub(super) fn offers_hits(&self) -> bool {
        // Half of the way there and back.
        self.cost_permille < 2000 && !self.cache.is_empty()
    }

    /// Holds what was found for the sequence that is about to start.
    pub(super) fn pin_hits(&mut self, found: Vec<u32>) {
        for &host_block in &found {
            self.cache.pin(host_block);
        }
        self.hits = found;
    }

    /// What was found for the sequence that starts. Each of them has to be copied or [unpinned](Self::unpin).
    pub(super) fn take_hits(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.hits)
    }

    /// The sequence does not start.
    pub(super) fn drop_hits(&mut self) {
        for host_block in self.take_hits() {
            self.unpin(host_block);
        }
    }

    /// Has the next plan copy a pinned block back. What it holds stays as it is until then.
    pub(super) fn copy_in(&mut self, block: BlockId, host_block: u32) {
        self.swap_in.push(block, host_block);
        self.leaving.push(host_block);
    }

    /// The device holds a block of this hash now. Gives the number of its content where host memory kept the same.
    pub(super) fn supersede(
        &mut self,
        before: Before,
        hash: BlockHash,
        token_ids: &[TokenId],
        events: &mut KvEventLog,
    ) -> Option<ContentId> {
        let same = self.cache.find(before, hash, token_ids);
        let (kept, free) = self.cache.take(hash)?;
        self.free.extend(free);
        if same.is_none() {
            self.forget_after(kept.content, events);
        }
        same.map(|(_, content)| content)
    }

    /// A content is gone from both tiers, and so is what follows it.
    pub(super) fn forget_after(&mut self, content: ContentId, events: &mut KvEventLog) {
        let mut gone = Gone::default();
        self.cache.remove_after(content, &mut gone);
        self.let_go(gone, events);
    }

    /// Ends a reading.
    pub(super) fn unpin(&mut self, host_block: u32) {
        if self.cache.unpin(host_block) {
            self.free.push(host_block);
        }
    }

    /// Blocks for what another worker is about to write, at most `num_blocks`. What came from others before makes room
    /// first where they have their share, `num_incoming` that are on their way included.
    pub(super) fn reserve(
        &mut self,
        num_blocks: usize,
        num_incoming: usize,
        events: &mut KvEventLog,
    ) -> Vec<u32> {
        let mut reserved = Vec::new();
        while reserved.len() < num_blocks.min(self.quota()) {
            let num_theirs = self.cache.num_received() + num_incoming + reserved.len();
            let is_at_quota = num_theirs >= self.quota();
            if is_at_quota && self.cache.num_received() == 0 {
                break;
            }
            if is_at_quota {
                let Some(gone) = self.cache.evict(Origin::Received) else {
                    break;
                };
                self.let_go(gone, events);
                continue;
            }
            let Some(block) = self.take(Origin::Evicted, events) else {
                break;
            };
            reserved.push(block);
        }
        reserved
    }

    /// Blocks that other workers may fill: half.
    pub(super) const fn quota(&self) -> usize {
        self.num_blocks as usize / 2
    }

    /// Gives back reserved blocks that nobody writes.
    pub(super) fn give_back(&mut self, host_blocks: &[u32]) {
        self.free.extend(host_blocks);
    }

    /// A block to write: a free one, else the one used longest ago.
    fn take(&mut self, prefer: Origin, events: &mut KvEventLog) -> Option<u32> {
        while self.free.is_empty() {
            let gone = self.cache.evict(prefer)?;
            self.let_go(gone, events);
        }
        self.free.pop()
    }

    fn let_go(&mut self, gone: Gone, events: &mut KvEventLog) {
        self.free.extend(gone.blocks);
        for hash in gone.hashes {
            events.removed(hash);
        }
    }

    fn num_available(&self) -> usize {
        self.free.len() + self.cache.num_unread()
    }

    // === copies ===

    /// Whether the next plan has copies to make.
    pub(super) fn has_copies(&self) -> bool {
        !self.swap_out.blocks.is_empty() || !self.swap_in.blocks.is_empty()
    }

    /// Makes none of the copies that the next plan would have made, and keeps nothing for anybody: nobody wants what
    /// they were to save. What is read, or being filled, stays until that ends.
    pub(super) fn forget_all(&mut self) {
        self.swap_out = BlockCopies::default();
        self.swap_in = BlockCopies::default();
        self.drop_hits();
        for host_block in std::mem::take(&mut self.leaving) {
            self.unpin(host_block);
        }
        let free = self.cache.clear();
        self.free.extend(free);
    }

    /// Moves the copies into the plan that is to make them. What it reads, later plans may write.
    pub(super) fn move_copies(&mut self, plan: &mut StepPlan) {
        plan.swap_out = last_copies(std::mem::take(&mut self.swap_out));
        plan.swap_in = std::mem::take(&mut self.swap_in);
        for host_block in std::mem::take(&mut self.leaving) {
            self.unpin(host_block);
        }
    }

    /// Asserts that each block is free, cached, read, or one of `taken`: kept for one sequence, or being filled.
    pub(super) fn check_integrity(
        &self,
        taken: impl Iterator<Item = u32>,
        is_on_device: impl Fn(ContentId) -> bool,
    ) {
        let mut blocks = self.free.clone();
        blocks.extend(taken);
        blocks.extend(self.cache.check_integrity(is_on_device));
        blocks.sort_unstable();
        assert!(
            blocks.iter().copied().eq(0..self.num_blocks),
            "host blocks: {blocks:?}"
        );
    }
}

/// Of several copies into one block of host memory, which its later owners made, only the last counts.
fn last_copies(copies: BlockCopies) -> BlockCopies {
    let mut is_written = FxHashSet::default();
    let BlockCopies {
        blocks,
        host_blocks,
    } = copies;
    let pairs = blocks.into_iter().zip(host_blocks).rev();
    let (mut blocks, mut host_blocks): (Vec<u32>, Vec<u32>) = pairs
        .filter(|&(_, host_block)| is_written.insert(host_block))
        .unzip();
    blocks.reverse();
    host_blocks.reverse();
    BlockCopies {
        blocks,
        host_blocks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_SIZE: u32 = 4;

    fn tier(num_host_blocks: u32, swap_cost_permille: u32) -> HostTier {
        HostTier::new(&StepSchedulerConfig {
            num_host_blocks,
            block_size: BLOCK_SIZE,
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
        let swapped = tier.keep(&table(), 2, 18, &mut KvEventLog::new(9)).unwrap();
        assert_eq!(copies(&mut tier), [vec![12, 13, 14], vec![]]);
        tier.check_integrity(swapped.host_blocks.iter().copied(), |_| false);
        assert_eq!(tier.restore(swapped, &table(), 3), Some(18));
        assert_eq!(copies(&mut tier), [vec![], vec![13, 14]]);
        tier.check_integrity(std::iter::empty(), |_| false);
    }

    #[test]
    fn what_does_not_reach_the_matched_blocks_or_not_beyond_them_is_of_no_use() {
        let mut tier = tier(4, 100);
        for num_matched in [1, 5] {
            let swapped = tier.keep(&table(), 2, 18, &mut KvEventLog::new(9)).unwrap();
            copies(&mut tier);
            assert_eq!(tier.restore(swapped, &table(), num_matched), None);
            assert!(
                copies(&mut tier).iter().all(Vec::is_empty),
                "{num_matched} matched"
            );
        }
        tier.check_integrity(std::iter::empty(), |_| false);
    }

    #[test]
    fn keeps_nothing_without_room_or_where_computing_again_is_as_cheap() {
        assert_eq!(
            tier(2, 100).keep(&table(), 2, 18, &mut KvEventLog::new(9)),
            None
        );
        assert_eq!(
            tier(9, 100).keep(&table(), 5, 18, &mut KvEventLog::new(9)),
            None
        );
        assert_eq!(
            tier(9, 1000).keep(&table(), 2, 20, &mut KvEventLog::new(9)),
            None
        );
        assert!(
            tier(9, 999)
                .keep(&table(), 2, 20, &mut KvEventLog::new(9))
                .is_some()
        );
        // Three blocks are moved for ten tokens.
        assert!(
            tier(9, 833)
                .keep(&table(), 2, 18, &mut KvEventLog::new(9))
                .is_some()
        );
        assert_eq!(
            tier(9, 834).keep(&table(), 2, 18, &mut KvEventLog::new(9)),
            None
        );
    }
}
