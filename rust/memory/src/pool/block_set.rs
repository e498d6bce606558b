//! The blocks of one owner, in order.

use std::{fmt, ops::Range, sync::Arc};

use super::{BlockHandle, Pool, sets::SetId};
use crate::{error::MemoryError, runs::Extent, slab::Slab};

/// Blocks that belong together, such as those of one sequence. Dropping it frees them.
///
/// Blocks of a set may be moved while it lives: a handle that went stale is asked for again by its number.
pub struct BlockSet {
    pool: Arc<Pool>,
    id: SetId,
}

impl fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockSet")
            .field("pool", &self.pool.id)
            .field("id", &self.id)
            .finish()
    }
}

impl BlockSet {
    pub(super) const fn new(pool: Arc<Pool>, id: SetId) -> Self {
        Self { pool, id }
    }

    pub(super) const fn id(&self) -> SetId {
        self.id
    }

    /// The pool of its blocks.
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// How many blocks were taken for it, those since freed or lost included: their numbers are not reused.
    pub fn len(&self) -> usize {
        self.pool.state.lock().sets.len(self.id)
    }

    /// Whether no block was taken for it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block of this number, where it lies now; `None` where it was freed or lost to quarantine.
    pub fn handle(&self, at: usize) -> Option<BlockHandle> {
        let state = self.pool.state.lock();
        let slot = state.sets.slot(self.id, at)?;
        self.pool.handle_of(slot)
    }

    /// Its blocks in order, without those that are gone.
    pub fn handles(&self) -> Vec<BlockHandle> {
        let state = self.pool.state.lock();
        state
            .sets
            .iter_set(self.id)
            .filter_map(|slot| self.pool.handle_of(slot))
            .collect()
    }

    /// The blocks of these numbers.
    pub fn handles_in(&self, range: Range<usize>) -> Result<Vec<BlockHandle>, MemoryError> {
        let state = self.pool.state.lock();
        range
            .map(|at| {
                let slot = state.sets.slot(self.id, at);
                slot.and_then(|slot| self.pool.handle_of(slot))
                    .ok_or(MemoryError::StaleHandle)
            })
            .collect()
    }

    /// Its blocks as runs of neighbours: as many descriptors as a transfer of all of them needs on this side.
    pub fn extents(&self) -> Vec<Extent> {
        let state = self.pool.state.lock();
        let mut extents: Vec<Extent> = Vec::new();
        for slot in state.sets.iter_set(self.id) {
            match extents.last_mut() {
                Some(run) if self.pool.follows(*run, slot) => run.len += 1,
                _ => extents.push(Extent {
                    start: slot,
                    len: 1,
                }),
            }
        }
        extents
    }

    /// Takes `n` blocks more, behind the last where there is room.
    pub fn extend(&mut self, n: u32) -> Result<(), MemoryError> {
        let mut state = self.pool.state.lock();
        let last = state.sets.len(self.id).checked_sub(1);
        let after = last.and_then(|at| state.sets.slot(self.id, at));
        let slots = self.pool.take(&mut state, n, after)?;
        state.sets.append(self.id, &slots);
        Ok(())
    }

    /// Frees the blocks from number `len` on.
    pub fn truncate(&mut self, len: usize) {
        let mut state = self.pool.state.lock();
        let tail = state.sets.truncate(self.id, len);
        self.pool.retire_all(&mut state, tail);
    }

    /// Seals all its blocks.
    pub fn seal(&self) -> Result<(), MemoryError> {
        self.pool.seal(&self.handles())
    }

    /// Copies bytes into the block of this number, which its owner fills.
    pub fn write(&self, at: usize, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let handle = self.handle(at).ok_or(MemoryError::StaleHandle)?;
        self.pool.write(handle, offset, bytes)
    }

    /// Where the block of this number lies now. Only a pin keeps a sealed block there.
    pub fn place(&self, at: usize) -> Option<(Arc<Slab>, u64)> {
        self.pool.place(self.handle(at)?.slot)
    }
}

impl Drop for BlockSet {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        let slots = state.sets.remove(self.id);
        self.pool.retire_all(&mut state, slots);
    }
}

impl Pool {
    /// The handle of a slot that some set lists; the pool's lock is held.
    pub(super) fn handle_of(&self, slot: u32) -> Option<BlockHandle> {
        let word = self.word_now(slot)?;
        debug_assert!(word.state().is_live(), "sets list live blocks");
        Some(BlockHandle {
            pool: self.id,
            slot,
            generation: word.generation(),
        })
    }
}
