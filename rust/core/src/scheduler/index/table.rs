//! The index's hash table: open addressing in many small shards, so that no insertion waits for a large rehash.

use crate::{hash::BlockHash, scheduler::bits::Bits};

const SHARD_BITS: u32 = 10;
/// Shards. At 17.5 M blocks one holds 17,000, which rehash in some 100 µs; their headers stay in the nearest cache.
pub(super) const NUM_SHARDS: usize = 1 << SHARD_BITS;
/// Marks a free slot.
const EMPTY: u64 = u64::MAX;
const CAPACITY_MIN: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Slot {
    key: u64,
    value: u64,
}

const FREE: Slot = Slot {
    key: 0,
    value: EMPTY,
};

/// Block hash → a 64-bit value that is not `u64::MAX`. 16 bytes a slot.
///
/// Linear probing; a slot's home is the high half of `hash × capacity`, so that a capacity need not be a power of two.
/// A shard grows by half beyond 4/5 full and shrinks below 1/5, so a block costs 20 to 30 bytes while it grows.
#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<Shard>,
    /// Shards that are not empty.
    used: Bits,
    len: usize,
}

#[derive(Clone, Debug, Default)]
struct Shard {
    slots: Vec<Slot>,
    len: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            shards: vec![Shard::default(); NUM_SHARDS],
            used: Bits::default(),
            len: 0,
        }
    }
}

/// Spreads small integers too; a real block hash is spread already.
fn spread(hash: BlockHash) -> u64 {
    hash.0.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn shard_of(hash: BlockHash) -> usize {
    (spread(hash) >> (64 - SHARD_BITS)) as usize
}

impl Table {
    /// Keys.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, hash: BlockHash) -> Option<u64> {
        let shard = &self.shards[shard_of(hash)];
        let slot = shard.slots.get(shard.find(hash.0))?;
        (slot.value != EMPTY).then_some(slot.value)
    }

    /// Reads where the keys are, so that their cache lines arrive together rather than one after the other.
    pub(super) fn touch(&self, hashes: impl Iterator<Item = BlockHash>) {
        let mut sum = 0_u64;
        for hash in hashes {
            let shard = &self.shards[shard_of(hash)];
            if let Some(slot) = shard.slots.get(shard.home(hash.0)) {
                sum = sum.wrapping_add(slot.key);
            }
        }
        std::hint::black_box(sum);
    }

    /// The key's value, to be changed in place; a new key gets `default`. The flag says whether it is new.
    pub(super) fn entry(&mut self, hash: BlockHash, default: u64) -> (&mut u64, bool) {
        let number = shard_of(hash);
        let shard = &mut self.shards[number];
        let mut at = shard.find(hash.0);
        let is_new = shard.slots.get(at).is_none_or(|slot| slot.value == EMPTY);
        if is_new {
            if (shard.len + 1) * 5 > shard.slots.len() * 4 {
                shard.resize((shard.slots.len() * 3 / 2).max(CAPACITY_MIN));
                at = shard.find(hash.0);
            }
            shard.slots[at] = Slot {
                key: hash.0,
                value: default,
            };
            shard.len += 1;
            self.len += 1;
            if shard.len == 1 {
                self.used.insert(number as u32);
            }
        }
        (&mut shard.slots[at].value, is_new)
    }

    pub(super) fn get_mut(&mut self, hash: BlockHash) -> Option<&mut u64> {
        let shard = &mut self.shards[shard_of(hash)];
        let at = shard.find(hash.0);
        let slot = shard.slots.get_mut(at)?;
        (slot.value != EMPTY).then_some(&mut slot.value)
    }

    pub(super) fn remove(&mut self, hash: BlockHash) {
        let number = shard_of(hash);
        let shard = &mut self.shards[number];
        let at = shard.find(hash.0);
        if shard.slots.get(at).is_some_and(|slot| slot.value != EMPTY) {
            shard.remove_at(at);
            self.len -= 1;
            if shard.len == 0 {
                self.used.remove(number as u32);
            }
            if shard.slots.len() > 64 && shard.len * 5 < shard.slots.len() {
                shard.resize(shard.len * 2);
            }
        }
    }

    /// One shard's entries.
    pub(super) fn shard_entries(&self, shard: usize) -> impl Iterator<Item = (BlockHash, u64)> {
        let slots = self.shards[shard].slots.iter();
        slots
            .filter(|slot| slot.value != EMPTY)
            .map(|slot| (BlockHash(slot.key), slot.value))
    }

    /// Every entry, in no order.
    pub(super) fn entries(&self) -> impl Iterator<Item = (BlockHash, u64)> {
        let shards = self.used.iter();
        shards.flat_map(|shard| self.shard_entries(shard as usize))
    }

    /// Slots of one shard, free ones included.
    pub(super) fn shard_capacity(&self, shard: usize) -> usize {
        self.shards[shard].slots.len()
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        let slots: usize = self.shards.iter().map(|shard| shard.slots.capacity()).sum();
        slots * size_of::<Slot>() + self.shards.capacity() * size_of::<Shard>()
    }
}

impl Shard {
    fn home(&self, key: u64) -> usize {
        let spread = spread(BlockHash(key)) << SHARD_BITS;
        ((u128::from(spread) * self.slots.len() as u128) >> 64) as usize
    }

    /// The key's slot, or the free slot where it would go; 0 where there are no slots.
    fn find(&self, key: u64) -> usize {
        let mut at = self.home(key);
        while let Some(slot) = self.slots.get(at) {
            if slot.value == EMPTY || slot.key == key {
                break;
            }
            at += 1;
            if at == self.slots.len() {
                at = 0;
            }
        }
        at
    }

    /// Frees a slot and moves back those that it kept from their homes.
    fn remove_at(&mut self, mut hole: usize) {
        let capacity = self.slots.len();
        let distance = |from: usize, to: usize| {
            if to >= from {
                to - from
            } else {
                to + capacity - from
            }
        };
        let mut at = hole;
        loop {
            at = if at + 1 == capacity { 0 } else { at + 1 };
            let slot = self.slots[at];
            if slot.value == EMPTY {
                break;
            }
            if distance(self.home(slot.key), at) >= distance(hole, at) {
                self.slots[hole] = slot;
                hole = at;
            }
        }
        self.slots[hole] = FREE;
        self.len -= 1;
    }

    fn resize(&mut self, capacity: usize) {
        let old = std::mem::replace(&mut self.slots, vec![FREE; capacity]);
        for slot in old {
            if slot.value != EMPTY {
                let at = self.find(slot.key);
                self.slots[at] = slot;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustc_hash::FxHashMap;

    use super::*;

    #[test]
    fn equals_a_map_under_random_changes() {
        let (mut table, mut map) = (Table::default(), FxHashMap::default());
        let mut random = 1_u64;
        for step in 0..200_000_u64 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Few distinct upper parts, so that shards fill and wrap.
            let hash = BlockHash(((random >> 40) % 64) << 12 | (random >> 60));
            if (random >> 33).is_multiple_of(4) {
                table.remove(hash);
                map.remove(&hash);
            } else {
                *table.entry(hash, step).0 = step;
                map.insert(hash, step);
            }
            assert_eq!(table.get(hash), map.get(&hash).copied());
        }
        assert_eq!(table.len(), map.len());
        assert_eq!(table.entries().collect::<FxHashMap<_, _>>(), map);
    }
}
