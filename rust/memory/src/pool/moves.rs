//! Moving sealed blocks: copy, then commit; a pin that comes first wins.

use std::sync::Arc;

use super::{BlockHandle, Moved, Pool, PoolState};
use crate::{error::MemoryError, runs::Extent};

/// Blocks that are being copied to a free run. Dropping it undoes what was not committed.
#[derive(Debug)]
pub struct Move {
    pool: Arc<Pool>,
    /// Emptied by the commit.
    from: Vec<BlockHandle>,
    to: Extent,
    /// Bytes that are where they go, from the first block on.
    copied: u64,
}

impl Pool {
    /// Begins to move blocks, in this order, to one run of free neighbours. `None` where there is no such run, where
    /// one of the blocks is held or not sealed, or while too many old places wait for participants.
    pub fn begin_move(self: &Arc<Self>, handles: &[BlockHandle]) -> Option<Move> {
        let mut state = self.state.lock();
        if handles.is_empty() || state.epochs.room() < handles.len() {
            return None;
        }
        let to = state.runs.take_run(handles.len() as u32)?;
        let begin = |handle: &BlockHandle| self.named(*handle)?.begin_move(handle.generation);
        let begun = handles.iter().take_while(|handle| begin(handle).is_ok());
        let begun = begun.count();
        if begun < handles.len() {
            for handle in &handles[..begun] {
                self.cancel(handle);
            }
            self.put_back(&mut state, to);
            return None;
        }
        for slot in to.start..to.start + to.len {
            if let Some(word) = self.word(slot) {
                word.reserve();
            }
        }
        drop(state);
        Some(Move {
            pool: Arc::clone(self),
            from: handles.to_vec(),
            to,
            copied: 0,
        })
    }

    fn cancel(&self, handle: &BlockHandle) {
        if let Ok(word) = self.named(*handle) {
            word.cancel_move(handle.generation);
        }
    }

    /// Ends a target that no block moved to.
    fn unreserve(&self, state: &mut PoolState, slot: u32) {
        if let Some(word) = self.word(slot) {
            word.unreserve();
            self.put_back(
                state,
                Extent {
                    start: slot,
                    len: 1,
                },
            );
        }
    }

    /// Makes the copy the block, where nobody held or freed the original in the meantime.
    fn commit_block(&self, state: &mut PoolState, epoch: u64, old: BlockHandle, to: u32) -> bool {
        let committed = self
            .named(old)
            .and_then(|word| word.commit_move(old.generation));
        let Some(word) = self.word(to).filter(|_| committed.is_ok()) else {
            self.unreserve(state, to);
            return false;
        };
        let new = BlockHandle {
            pool: self.id,
            slot: to,
            generation: word.publish(),
        };
        state.sets.move_block(old.slot, to);
        state.epochs.push(Moved { epoch, old, new });
        true
    }
}

impl Move {
    /// How many blocks.
    pub const fn len(&self) -> usize {
        self.from.len()
    }

    /// Whether there is no block to move; never true before it is committed.
    pub const fn is_empty(&self) -> bool {
        self.from.is_empty()
    }

    /// Bytes that are not copied yet.
    pub fn left(&self) -> u64 {
        self.from.len() as u64 * self.pool.config.block_bytes - self.copied
    }

    /// Copies all that is left. Takes no lock.
    pub fn copy(&mut self) -> Result<(), MemoryError> {
        self.copy_some(self.left())
    }

    /// Copies at most so many bytes of what is left, neighbours at once. Takes no lock.
    pub fn copy_some(&mut self, most: u64) -> Result<(), MemoryError> {
        let block_bytes = self.pool.config.block_bytes;
        let end = self.copied + most.min(self.left());
        while self.copied < end {
            let at = (self.copied / block_bytes) as usize;
            let first = self.from[at].slot;
            let mut run = Extent {
                start: first,
                len: 1,
            };
            while let Some(next) = self.from.get(at + run.len as usize)
                && self.pool.follows(run, next.slot)
            {
                run.len += 1;
            }
            let source = self.pool.place(first);
            let target = self.pool.place(self.to.start + at as u32);
            let (Some((from, offset)), Some((to, to_offset))) = (source, target) else {
                return Err(MemoryError::StaleHandle);
            };
            let skip = self.copied % block_bytes;
            let len = (u64::from(run.len) * block_bytes - skip).min(end - self.copied);
            from.copy_to(offset + skip, &to, to_offset + skip, len)?;
            self.copied += len;
        }
        Ok(())
    }

    /// Makes the copies the blocks, each for itself. Returns how many moved; the others stay where they are, and all do
    /// where not every byte is copied.
    pub fn commit(mut self) -> usize {
        if self.left() > 0 {
            return 0;
        }
        let pool = Arc::clone(&self.pool);
        let mut state = pool.state.lock();
        let epoch = state.epochs.advance();
        let from = std::mem::take(&mut self.from);
        let moved = from
            .into_iter()
            .zip(self.to.start..)
            .filter(|&(old, to)| pool.commit_block(&mut state, epoch, old, to))
            .count();
        drop(state);
        pool.free_passed();
        moved
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        if self.from.is_empty() {
            return;
        }
        let mut state = self.pool.state.lock();
        for (handle, to) in self.from.iter().zip(self.to.start..) {
            self.pool.cancel(handle);
            self.pool.unreserve(&mut state, to);
        }
    }
}
