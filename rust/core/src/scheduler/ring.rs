//! A ring for consistent hashing: a session keeps its worker while others come and go.

use std::collections::BTreeSet;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Points of each worker: with 64, shares of the ring differ by some 12 %.
const NUM_POINTS: u64 = 64;

/// Points on a circle of hashes, each with its worker's slot.
#[derive(Debug, Default)]
pub(super) struct Ring {
    points: BTreeSet<(u64, u32)>,
}

impl Ring {
    /// Adds a worker's points, which depend on its name alone: a restarted worker gets its sessions back.
    pub(super) fn insert(&mut self, name: &str, slot: u32) {
        self.points.extend(points(name).map(|point| (point, slot)));
    }

    pub(super) fn remove(&mut self, name: &str, slot: u32) {
        for point in points(name) {
            self.points.remove(&(point, slot));
        }
    }

    /// Slots, from a key's place on; once around, a slot as often as it has points. O(log points) to the first.
    pub(super) fn after_key(&self, key: u64) -> impl Iterator<Item = u32> + '_ {
        let after = self.points.range((key, 0)..);
        let before = self.points.range(..(key, 0));
        after.chain(before).map(|&(_, slot)| slot)
    }
}

fn points(name: &str) -> impl Iterator<Item = u64> + '_ {
    (0..NUM_POINTS).map(|point| xxh3_64_with_seed(name.as_bytes(), point))
}
