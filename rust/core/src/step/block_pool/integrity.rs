//! The pool's invariants, asserted.

use rustc_hash::FxHashSet;

use super::{BlockPool, ContentId, Parent};
use crate::ids::BlockId;

impl BlockPool {
    /// Asserts every invariant, given all tables that hold blocks, each with its number of leading cached blocks:
    /// those of owners, who may write their private blocks, and those of others, who may not.
    pub(in crate::step) fn check_integrity(
        &self,
        owners: &[(&[BlockId], usize)],
        others: &[(&[BlockId], usize)],
    ) {
        let owned = self.occurrences(owners);
        self.check_counts(owned.iter().zip(self.occurrences(others)));
        self.check_tables(owners);
        self.check_tables(others);
        for (index, &count) in owned.iter().enumerate() {
            let is_cached = self.blocks[index].identity.is_some();
            assert!(is_cached || count <= 1, "b{index} has one writer");
        }
        self.check_cache();
    }

    /// Whether a block of the device has this content.
    pub(in crate::step) fn holds_content(&self, content: ContentId) -> bool {
        let mut identities = self.blocks.iter().filter_map(|block| block.identity);
        identities.any(|identity| identity.content == content)
    }

    fn occurrences(&self, tables: &[(&[BlockId], usize)]) -> Vec<u32> {
        let mut occurrences = vec![0; self.num_blocks()];
        for block in tables.iter().flat_map(|(table, _)| *table) {
            occurrences[block.0 as usize] += 1;
        }
        occurrences
    }

    /// Every block is free, unused or held, and held as often as the tables say.
    fn check_counts<'a>(&self, counts: impl Iterator<Item = (&'a u32, u32)>) {
        let occurrences: Vec<u32> = counts.map(|(owned, others)| owned + others).collect();
        for (index, state) in self.blocks.iter().enumerate() {
            assert_eq!(state.ref_count, occurrences[index], "holders of b{index}");
        }
        let free: FxHashSet<BlockId> = self.free.iter().copied().collect();
        assert_eq!(free.len(), self.free.len(), "a block is free once");
        for block in &free {
            let state = &self.blocks[block.0 as usize];
            assert!(
                state.ref_count == 0 && state.identity.is_none(),
                "{block} is free"
            );
        }
        let unused: Vec<BlockId> = self.unused.iter().collect();
        assert_eq!(
            unused.len(),
            self.unused.len(),
            "length of the list of unused blocks"
        );
        for block in &unused {
            let state = &self.blocks[block.0 as usize];
            assert!(
                state.ref_count == 0 && state.identity.is_some(),
                "{block} is unused"
            );
        }
        let num_held = self
            .blocks
            .iter()
            .filter(|block| block.ref_count > 0)
            .count();
        assert_eq!(
            free.len() + unused.len() + num_held,
            self.num_blocks(),
            "blocks in all"
        );
    }

    /// A table is a run of cached blocks, each the parent of the next, then private blocks.
    fn check_tables(&self, tables: &[(&[BlockId], usize)]) {
        for (table, num_cached) in tables {
            for (position, block) in table.iter().enumerate() {
                let state = &self.blocks[block.0 as usize];
                assert_eq!(
                    state.identity.is_some(),
                    position < *num_cached,
                    "cached: {block}"
                );
                if let Some(Parent::Block(parent)) = state.identity.map(|identity| identity.parent)
                {
                    assert_eq!(Some(&parent), table[..position].last(), "parent of {block}");
                }
            }
        }
    }

    /// Index and blocks agree; parents are cached, as held as their children and used after them.
    fn check_cache(&self) {
        let num_cached = self
            .blocks
            .iter()
            .filter(|block| block.identity.is_some())
            .count();
        assert_eq!(self.index.len(), num_cached, "entries of the index");
        for (hash, block) in &self.index {
            let state = &self.blocks[block.0 as usize];
            assert_eq!(
                state.identity.map(|it| it.hash),
                Some(*hash),
                "hash of {block}"
            );
            assert!(!self.host.cache.contains(*hash), "{block} is in both tiers");
            if let Some(Parent::Block(parent)) = state.identity.map(|it| it.parent) {
                let parent_state = &self.blocks[parent.0 as usize];
                assert!(
                    parent_state.identity.is_some(),
                    "parent {parent} of {block} is cached"
                );
                assert!(
                    parent_state.ref_count >= state.ref_count,
                    "holders of parent {parent}"
                );
            }
        }
        assert_eq!(self.cached_hashes().len(), num_cached, "listed hashes");
        let mut is_older = vec![false; self.num_blocks()];
        for block in self.unused.iter() {
            is_older[block.0 as usize] = true;
            if let Some(Parent::Block(parent)) = self.blocks[block.0 as usize]
                .identity
                .map(|identity| identity.parent)
            {
                assert!(
                    !is_older[parent.0 as usize],
                    "{parent} would be evicted before {block}"
                );
            }
        }
    }
}
