//! The prefix index: which workers hold which KV block.
//!
//! Memory: 20 to 30 bytes a block for the [`table`], 32 more for one that several workers hold ([`sets`]).
//! A lookup, an insertion and a removal are O(1).
//!
//! What a worker holds goes by a holder id rather than by the worker's slot. Clearing a worker, or removing it, takes
//! its id away in O(1); entries of a dead id are passed over, and swept a few at a time with the KV events that
//! follow. An id is given out again only after a sweep of the whole index.

mod depth;
mod sets;
mod table;

pub(super) use self::{
    depth::Probed,
    sets::{HolderId, Holders},
};
use self::{
    sets::Sets,
    table::{NUM_SHARDS, Table},
};
use crate::hash::BlockHash;

/// Marks a value as a set's number; otherwise it is the id of the only holder.
const IS_SET: u64 = 1 << 63;
/// Slot of an id that is dead or not given out.
const NO_SLOT: u32 = u32::MAX;
/// One step of a sweep looks at about this many table slots, some 5 µs …
const SWEEP_SLOTS: usize = 4096;
/// … and follows this many blocks of KV events: a fifth of their time at most.
const SWEEP_EVERY: usize = 512;
/// Hashes whose cache lines are fetched together.
const TOUCH: usize = 16;

/// Block hash → the workers that hold it.
///
/// Hash chains of different models, weights epochs and salts start from different seeds, so one map serves all.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    table: Table,
    sets: Sets,
    /// By holder id: the worker's slot.
    slots: Vec<u32>,
    free: Vec<HolderId>,
    /// Died since the running sweep began.
    dead: Vec<HolderId>,
    /// Died before it.
    dying: Vec<HolderId>,
    /// The shard that the sweep comes to next.
    sweep_at: usize,
    num_since_sweep: usize,
}

// === holder ids ===

impl PrefixIndex {
    /// A new id for what the worker in this slot holds.
    pub(super) fn add_holder(&mut self, slot: u32) -> HolderId {
        if self.free.is_empty() && self.slots.len() > usize::from(u16::MAX) {
            // 65,536 ids against 16,384 workers: 49,152 clears came before one sweep ended.
            self.sweep_all();
        }
        if let Some(id) = self.free.pop() {
            self.slots[usize::from(id.0)] = slot;
            return id;
        }
        self.slots.push(slot);
        HolderId((self.slots.len() - 1) as u16)
    }

    /// Forgets all that goes by this id, in O(1): the entries are swept later. `num_blocks` is their number.
    pub(super) fn remove_holder(&mut self, id: HolderId, num_blocks: u32) {
        self.slots[usize::from(id.0)] = NO_SLOT;
        if num_blocks == 0 {
            self.free.push(id);
            return;
        }
        self.dead.push(id);
        if self.table.len() <= SWEEP_SLOTS {
            self.sweep_all();
        }
    }

    /// The worker's slot; `None` for a dead id.
    pub(super) fn slot_of(&self, id: HolderId) -> Option<u32> {
        let slot = self.slots[usize::from(id.0)];
        (slot != NO_SLOT).then_some(slot)
    }

    fn has_dead(&self) -> bool {
        !(self.dead.is_empty() && self.dying.is_empty())
    }

    /// Sweeps a little, in proportion to the blocks of the KV events that came in.
    fn sweep_after(&mut self, num_blocks: usize) {
        if !self.has_dead() {
            return;
        }
        self.num_since_sweep += num_blocks;
        while self.num_since_sweep >= SWEEP_EVERY && self.has_dead() {
            self.num_since_sweep -= SWEEP_EVERY;
            self.sweep_step();
        }
    }

    fn sweep_step(&mut self) {
        if self.dying.is_empty() {
            self.dying = std::mem::take(&mut self.dead);
            self.sweep_at = 0;
        }
        let mut num_slots = 0;
        while num_slots < SWEEP_SLOTS && self.sweep_at < NUM_SHARDS {
            let capacity = self.table.shard_capacity(self.sweep_at);
            if capacity > 0 {
                self.sweep_shard(self.sweep_at);
            }
            num_slots += 16 + capacity;
            self.sweep_at += 1;
        }
        if self.sweep_at == NUM_SHARDS {
            self.free.append(&mut self.dying);
        }
    }

    fn sweep_shard(&mut self, shard: usize) {
        let mut dead = Vec::new();
        for (hash, value) in self.table.shard_entries(shard) {
            self.holders(value).for_each(|id| {
                if self.slot_of(id).is_none() {
                    dead.push((hash, id));
                }
            });
        }
        for (hash, id) in dead {
            self.remove(hash, id);
        }
    }

    fn sweep_all(&mut self) {
        // The first round ends a running sweep, the second takes those that died meanwhile.
        while self.has_dead() {
            self.sweep_step();
        }
    }
}

// === entries ===

impl PrefixIndex {
    fn holders(&self, value: u64) -> Holders<'_> {
        if value & IS_SET == 0 {
            Holders::One(value as u16)
        } else {
            self.sets.get(value as u32)
        }
    }

    /// The block's holders, dead ones included.
    pub(super) fn holders_of(&self, hash: BlockHash) -> Holders<'_> {
        let value = self.table.get(hash);
        value.map_or(Holders::NONE, |value| self.holders(value))
    }

    /// Whether this holder has the block.
    pub(super) fn contains(&self, hash: BlockHash, id: HolderId) -> bool {
        match self.table.get(hash) {
            Some(value) if value & IS_SET == 0 => value == u64::from(id.0),
            Some(value) => self.sets.get(value as u32).contains(id),
            None => false,
        }
    }

    /// Adds a holder to each block; returns how many of the pairs are new.
    pub(super) fn insert_all(&mut self, hashes: &[BlockHash], id: HolderId) -> u32 {
        let mut num_new = 0;
        for hashes in hashes.chunks(TOUCH) {
            self.table.touch(hashes.iter().copied());
            for &hash in hashes {
                num_new += u32::from(self.insert(hash, id));
            }
        }
        self.sweep_after(hashes.len());
        num_new
    }

    /// Removes a holder from each block; returns how many of the pairs there were.
    pub(super) fn remove_all(&mut self, hashes: &[BlockHash], id: HolderId) -> u32 {
        let mut num_removed = 0;
        for hashes in hashes.chunks(TOUCH) {
            self.table.touch(hashes.iter().copied());
            for &hash in hashes {
                num_removed += u32::from(self.remove(hash, id));
            }
        }
        self.sweep_after(hashes.len());
        num_removed
    }

    fn insert(&mut self, hash: BlockHash, id: HolderId) -> bool {
        let (value, is_new) = self.table.entry(hash, id.0.into());
        if is_new {
            return true;
        }
        if *value & IS_SET != 0 {
            return self.sets.insert(*value as u32, id);
        }
        let other = HolderId(*value as u16);
        if other == id {
            return false;
        }
        *value = if self.slots[usize::from(other.0)] == NO_SLOT {
            id.0.into()
        } else {
            IS_SET | u64::from(self.sets.add(other, id))
        };
        true
    }

    fn remove(&mut self, hash: BlockHash, id: HolderId) -> bool {
        let Some(value) = self.table.get_mut(hash) else {
            return false;
        };
        if *value & IS_SET == 0 {
            let is_holder = *value == u64::from(id.0);
            if is_holder {
                self.table.remove(hash);
            }
            return is_holder;
        }
        let set = *value as u32;
        if !self.sets.remove(set, id) {
            return false;
        }
        if self.sets.get(set).len() <= 1 {
            match self.sets.dissolve(set) {
                Some(last) => *value = last.0.into(),
                None => self.table.remove(hash),
            }
        }
        true
    }

    /// Distinct blocks, those included whose holders left and that are not swept yet.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.table.heap_bytes() + self.sets.heap_bytes()
    }

    /// Every (block, worker slot) pair, in no order.
    pub(super) fn entries(&self) -> Vec<(BlockHash, u32)> {
        let mut entries = Vec::new();
        for (hash, value) in self.table.entries() {
            self.holders(value)
                .for_each(|id| entries.extend(self.slot_of(id).map(|slot| (hash, slot))));
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_leading_blocks_only() {
        let chain: Vec<BlockHash> = (10..14).map(BlockHash).collect();
        let mut index = PrefixIndex::default();
        let [first, second] = [0, 1].map(|slot| index.add_holder(slot));
        index.insert_all(&chain, first);
        index.insert_all(&[chain[0], chain[2]], second); // block 1 was evicted there
        assert_eq!(index.depths(&chain, 3), [4, 1, 0]);
        assert_eq!(index.depth_of(&chain, second), 1);
        assert_eq!(Probed::new(&index, &chain).deepest_above(4, 0), (4, 1));

        index.remove_holder(first, 4);
        assert_eq!(index.depths(&chain, 3), [0, 1, 0]);
        assert_eq!(index.len(), 2);
    }

    #[test]
    fn a_dead_id_is_passed_over_and_swept_before_it_is_used_again() {
        let chain: Vec<BlockHash> = (0..20_000).map(BlockHash).collect();
        let mut index = PrefixIndex::default();
        let [first, second] = [0, 1].map(|slot| index.add_holder(slot));
        index.insert_all(&chain, first);
        index.insert_all(&chain[..10], second);
        index.remove_holder(first, 20_000);
        let deepest = Probed::new(&index, &chain).deepest_above(chain.len(), 0);
        assert_eq!(deepest, (10, 1));
        let third = index.add_holder(2);
        assert_ne!(third, first);
        for _ in 0..100 {
            index.insert_all(&chain[..SWEEP_EVERY], second);
        }
        assert_eq!(index.len(), SWEEP_EVERY);
        assert_eq!(index.add_holder(3), first);
    }
}
