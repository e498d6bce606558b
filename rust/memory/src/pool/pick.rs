//! What is worth moving: looked for a little at a time, so that the pool's lock is held for microseconds.

use std::sync::Arc;

use super::{BlockHandle, Pool, PoolState};
use crate::{
    error::MemoryError,
    fragmentation::is_neighbour,
    runs::Extent,
    slab::Slab,
    table::{BlockState, Slot},
    transport::SlabId,
};

/// Blocks that one search looks at.
const SCAN_BLOCKS: usize = 4096;

/// Where the searches go on: each goes round its sets or slots, and rests when it has been round for nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    set: usize,
    slot: u32,
    /// Sets and slots that were looked at since something was found.
    barren_sets: usize,
    barren_slots: u32,
}

impl Cursor {
    /// The pool is another than it was: looking may be worth it again.
    pub(crate) const fn wake(&mut self) {
        self.barren_sets = 0;
        self.barren_slots = 0;
    }
}

impl Pool {
    /// The blocks of one sequence whose joining saves most descriptors for each block moved: at most `max`, and not
    /// more than there is a free run for.
    pub(crate) fn pick_scattered(&self, cursor: &mut Cursor, max: u32) -> Option<Vec<BlockHandle>> {
        let state = self.state.lock();
        let window = max.min(state.runs.largest()) as usize;
        let num_sets = state.sets.num_sets();
        if window < 2 || num_sets == 0 || cursor.barren_sets >= num_sets {
            return None;
        }
        let mut best: Option<(usize, usize, Vec<u32>)> = None;
        let (mut scanned, mut slots) = (0, Vec::new());
        for _ in 0..num_sets {
            slots.clear();
            slots.extend(state.sets.nth(cursor.set % num_sets));
            for part in slots.chunks(window) {
                let Some(descriptors) = self.descriptors_to_join(part) else {
                    continue;
                };
                let gain = descriptors - 1;
                // gain / blocks is more than the best: compared without dividing.
                let is_best = best
                    .as_ref()
                    .is_none_or(|(saved, blocks, _)| gain * blocks > saved * part.len());
                if gain > 0 && is_best {
                    best = Some((gain, part.len(), part.to_vec()));
                }
                // None can save more than a descriptor for each block but the first, in as many blocks as may move.
                if gain + 1 == window {
                    return self.found(cursor, best);
                }
            }
            cursor.set = (cursor.set + 1) % num_sets;
            cursor.barren_sets += 1;
            scanned += slots.len();
            if scanned >= SCAN_BLOCKS {
                break;
            }
        }
        self.found(cursor, best)
    }

    fn found(
        &self,
        cursor: &mut Cursor,
        best: Option<(usize, usize, Vec<u32>)>,
    ) -> Option<Vec<BlockHandle>> {
        let (_, _, slots) = best?;
        cursor.barren_sets = 0;
        slots.into_iter().map(|slot| self.handle_of(slot)).collect()
    }

    /// Descriptors that these blocks need now; `None` where one of them cannot move.
    fn descriptors_to_join(&self, slots: &[u32]) -> Option<usize> {
        let mut previous = None;
        let mut descriptors = 0;
        for &slot in slots {
            if !self.is_movable(slot) {
                return None;
            }
            let joins = is_neighbour(previous, slot, self.config.slots_per_slab());
            descriptors += usize::from(!joins);
            previous = Some(slot);
        }
        Some(descriptors)
    }

    /// The short piece of used blocks between two free runs whose removal gains the longest run for each block moved.
    pub(crate) fn pick_wall(&self, cursor: &mut Cursor, max: u32) -> Option<Vec<BlockHandle>> {
        let state = self.state.lock();
        let num_slots = state.draining.len() as u32 * self.config.slots_per_slab();
        if cursor.barren_slots >= num_slots {
            return None;
        }
        let mut best: Option<(u64, Extent)> = None;
        let mut scanned = 0;
        while scanned < SCAN_BLOCKS as u32 && scanned < num_slots {
            let slot = (cursor.slot + scanned) % num_slots;
            let before = state.runs.len_before(slot);
            let Some(wall) = self.wall_at(&state, slot, max).filter(|_| before > 0) else {
                scanned += 1;
                continue;
            };
            scanned += wall.len;
            let behind = state.runs.run_after(wall.start + wall.len - 1);
            let behind = behind.map_or(0, |run| run.len);
            let gain = u64::from(before.min(behind)) * 1024 / u64::from(wall.len);
            if gain > best.map_or(0, |(gain, _)| gain) {
                best = Some((gain, wall));
            }
        }
        cursor.slot = (cursor.slot + scanned) % num_slots;
        cursor.barren_slots += scanned;
        let (_, wall) = best?;
        cursor.barren_slots = 0;
        self.handles_of(wall)
    }

    /// Blocks of a slab that is being drained, as many neighbours as can move together.
    pub(crate) fn pick_of_slab(&self, slab: SlabId, max: u32) -> Option<Vec<BlockHandle>> {
        let index = self.index_of(slab)?;
        let state = self.state.lock();
        let per_slab = self.config.slots_per_slab();
        let first = index as u32 * per_slab;
        let start = (first..first + per_slab).find(|&slot| self.is_movable(slot))?;
        let most = max.min(state.runs.largest());
        let len = (start..first + per_slab)
            .take(most as usize)
            .take_while(|&slot| self.is_movable(slot))
            .count() as u32;
        (len > 0).then(|| self.handles_of(Extent { start, len }))?
    }

    /// The movable blocks from this slot to the next free run of its slab, if they are at most `max`.
    fn wall_at(&self, state: &PoolState, start: u32, max: u32) -> Option<Extent> {
        let mut len = 0;
        while len < max && self.is_movable(start + len) {
            len += 1;
            if state.runs.run_after(start + len - 1).is_some() {
                return Some(Extent { start, len });
            }
            if (start + len).is_multiple_of(self.config.slots_per_slab()) {
                return None;
            }
        }
        None
    }

    fn is_movable(&self, slot: u32) -> bool {
        self.word_now(slot).is_some_and(|word| {
            word.state() == BlockState::Sealed && word.pins() == 0 && word.leases() == 0
        })
    }

    fn handles_of(&self, extent: Extent) -> Option<Vec<BlockHandle>> {
        let slots = extent.start..extent.start + extent.len;
        slots.map(|slot| self.handle_of(slot)).collect()
    }

    // === draining ===

    fn index_of(&self, slab: SlabId) -> Option<usize> {
        let slabs = self.slabs.read();
        let is_it = |one: &Option<_>| one.as_ref().is_some_and(|one: &Arc<Slab>| one.id() == slab);
        slabs.iter().position(is_it)
    }

    /// From now on no block of this slab is handed out; those in use stay until they are freed or moved.
    pub fn drain(&self, slab: SlabId) -> Result<(), MemoryError> {
        let index = self
            .index_of(slab)
            .ok_or(MemoryError::UnknownSlab(slab.0))?;
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.draining[index], true) {
            state.runs.take_slab(index as u32);
        }
        Ok(())
    }

    /// Whether every block of a slab that is being drained is free.
    pub fn is_drained(&self, slab: SlabId) -> bool {
        let Some(index) = self.index_of(slab) else {
            return false;
        };
        let state = self.state.lock();
        let words = self.words.get(index).and_then(|words| words.get());
        let is_free = |word: &Slot| word.load().state() == BlockState::Free;
        state.draining[index] && words.is_some_and(|words| words.iter().all(is_free))
    }

    /// Takes a drained slab out of the pool. The caller keeps it as long as a peer may still write to it.
    pub fn take_out(&self, slab: SlabId) -> Result<Arc<Slab>, MemoryError> {
        if !self.is_drained(slab) {
            return Err(MemoryError::InUse);
        }
        let index = self.index_of(slab);
        let taken = index.and_then(|index| self.slabs.write().get_mut(index)?.take());
        taken.ok_or(MemoryError::UnknownSlab(slab.0))
    }
}
