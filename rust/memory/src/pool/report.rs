//! What a pool can say about itself, and the check that it says the truth.

use super::Pool;
use crate::{
    fragmentation::{self, Fragmentation},
    table::BlockState,
};

/// Counts of a pool at one moment; those of a pool in use may be a few blocks apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Blocks that exist.
    pub num_blocks: usize,
    /// Blocks in each state, in the order of [`BlockState::ALL`].
    pub by_state: [usize; BlockState::ALL.len()],
    /// Blocks that can be allocated: those that are free, but for slabs that are being drained.
    pub allocatable: usize,
    /// Blocks held by transfers and grants that nobody has proven to be over.
    pub quarantined: usize,
    /// Slabs that there are.
    pub num_slabs: usize,
}

impl PoolStats {
    /// Blocks in a state.
    pub const fn in_state(&self, state: BlockState) -> usize {
        self.by_state[state as usize]
    }
}

impl Pool {
    /// Counts now. Looks at every slot.
    pub fn stats(&self) -> PoolStats {
        let mut stats = PoolStats {
            allocatable: self.state.lock().runs.num_free(),
            quarantined: self.num_quarantined(),
            num_slabs: self.slabs().len(),
            ..PoolStats::default()
        };
        for slot in self.words.iter().filter_map(|words| words.get()).flatten() {
            stats.by_state[slot.load().state() as usize] += 1;
            stats.num_blocks += 1;
        }
        stats
    }

    /// How scattered free and used blocks are.
    pub fn fragmentation(&self) -> Fragmentation {
        let state = self.state.lock();
        fragmentation::scores(
            &state.runs,
            state.sets.iter(),
            &state.asks,
            self.config.slots_per_slab(),
        )
    }

    /// Checks that the index of free runs, the lists of owners and the words of the slots agree (I9).
    ///
    /// # Panics
    /// Where they do not.
    pub fn check_integrity(&self) {
        let state = self.state.lock();
        let mut is_indexed =
            vec![false; state.draining.len() * self.config.slots_per_slab() as usize];
        for run in state.runs.iter() {
            for slot in run.start..run.start + run.len {
                let was = std::mem::replace(&mut is_indexed[slot as usize], true);
                assert!(!was, "slot {slot} is in one run");
            }
        }
        for (slot, is_indexed) in (0_u32..).zip(is_indexed) {
            let slab = slot / self.config.slots_per_slab();
            let is_draining = state.draining[slab as usize];
            let Some(word) = self.word_now(slot) else {
                continue;
            };
            let block = word.state();
            let is_free = block == BlockState::Free;
            assert_eq!(
                is_indexed,
                is_free && !is_draining,
                "slot {slot}: {block:?}"
            );
            assert_eq!(
                state.sets.owner(slot).is_some(),
                block.is_live(),
                "slot {slot}: live blocks have an owner, and no others"
            );
            let holds = word.pins() + word.leases();
            let may_be_held = !matches!(
                block,
                BlockState::Free | BlockState::Reserved | BlockState::Migrating
            );
            assert!(holds == 0 || may_be_held, "slot {slot}: {block:?} is held");
            let waits = matches!(block, BlockState::Limbo | BlockState::Quarantined);
            assert!(holds > 0 || !waits, "slot {slot} waits for nobody");
        }
    }
}
