//! How much of a chain workers hold.

use super::{HolderId, PrefixIndex, TOUCH};
use crate::hash::BlockHash;

/// Positions that one round of a depth search probes together.
const PROBES: usize = 8;

/// A chain whose blocks were looked up once at most.
pub(in crate::scheduler) struct Probed<'a> {
    index: &'a PrefixIndex,
    chain: &'a [BlockHash],
    /// By position: how many live workers hold the block; [`UNKNOWN`] where it was not looked up.
    counts: Vec<u32>,
}

const UNKNOWN: u32 = u32::MAX;

impl<'a> Probed<'a> {
    pub(in crate::scheduler) fn new(index: &'a PrefixIndex, chain: &'a [BlockHash]) -> Self {
        Self {
            index,
            chain,
            counts: vec![UNKNOWN; chain.len()],
        }
    }

    /// The largest depth up to `end` whose last block more than `count` workers hold, and how many do; with nested
    /// sets, they hold all blocks before it too.
    pub(in crate::scheduler) fn deepest_above(
        &mut self,
        end: usize,
        count: usize,
    ) -> (usize, usize) {
        let depth = last_true(end, self, Self::fetch, |probed, at| {
            probed.count(at) > count
        });
        let last = depth.checked_sub(1);
        (depth, last.map_or(0, |last| self.count(last)))
    }

    /// Lets the cache lines of these places arrive together.
    fn fetch(&mut self, places: [usize; PROBES]) {
        let unknown = places.into_iter().filter(|&at| self.counts[at] == UNKNOWN);
        self.index.table.touch(unknown.map(|at| self.chain[at]));
    }

    fn count(&mut self, at: usize) -> usize {
        if self.counts[at] == UNKNOWN {
            self.counts[at] = self.index.count(self.chain[at]) as u32;
        }
        self.counts[at] as usize
    }
}

impl PrefixIndex {
    /// How many live workers hold the block.
    fn count(&self, hash: BlockHash) -> usize {
        let holders = self.holders_of(hash);
        if !self.has_dead() {
            return holders.len();
        }
        let mut count = 0;
        holders.for_each(|id| count += usize::from(self.slot_of(id).is_some()));
        count
    }

    /// How many leading blocks of the chain one holder has. O(that).
    pub(in crate::scheduler) fn depth_of(&self, chain: &[BlockHash], id: HolderId) -> usize {
        let mut depth = 0;
        for hashes in chain.chunks(TOUCH) {
            self.table.touch(hashes.iter().copied());
            let held = hashes.iter().take_while(|&&hash| self.contains(hash, id));
            let num_held = held.count();
            depth += num_held;
            if num_held < hashes.len() {
                break;
            }
        }
        depth
    }

    /// How many leading blocks of the chain each worker holds, by slot. Walks all holders of the chain.
    pub(in crate::scheduler) fn depths(&self, chain: &[BlockHash], num_slots: usize) -> Vec<u32> {
        let mut depths = vec![0_u32; num_slots];
        for (depth, &hash) in (0_u32..).zip(chain) {
            let mut is_held = false;
            self.holders_of(hash).for_each(|id| {
                // A holder whose chain broke earlier cannot use this block.
                let slot = self.slot_of(id);
                if let Some(held) = slot.and_then(|slot| depths.get_mut(slot as usize))
                    && *held == depth
                {
                    *held += 1;
                    is_held = true;
                }
            });
            if !is_held {
                break;
            }
        }
        depths
    }
}

/// The border of a predicate that is true up to some index and false from there on.
///
/// Where it is not of that shape, some border: never below the first index at which it is false.
/// Probes [`PROBES`] places at a time, because their cache misses then overlap: log₉ `len` rounds.
/// `fetch` is told the places of a round before they are asked for.
fn last_true<S>(
    len: usize,
    state: &mut S,
    fetch: impl Fn(&mut S, [usize; PROBES]),
    is_true: impl Fn(&mut S, usize) -> bool,
) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let width = high - low;
        // Ascending; all places between where those are few, the last one again and again then.
        let places = std::array::from_fn(|probe| match width {
            0..=PROBES => low + probe.min(width - 1),
            _ => low + (probe + 1) * width / (PROBES + 1),
        });
        fetch(state, places);
        for place in places {
            if is_true(state, place) {
                low = place + 1;
            } else {
                high = place;
                break;
            }
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_found_at_every_place() {
        for len in 0..200 {
            for border in 0..=len {
                let found = last_true(len, &mut (), |(), _| (), |(), index| index < border);
                assert_eq!(found, border);
            }
        }
    }
}
