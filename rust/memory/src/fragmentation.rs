//! How scattered a pool is: three scores between 0 (nothing to gain) and 1.

use crate::runs::FreeRuns;

/// Sizes of recent requests that are remembered.
const ASKS: usize = 256;

/// The scores of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fragmentation {
    /// Share of the free blocks that are in no run as long as the median of recent requests.
    pub alloc_p50: f64,
    /// The same for the 90th percentile.
    pub alloc_p90: f64,
    /// 1 − (fewest descriptors that could carry all sets) / (descriptors that they need now).
    pub wire: f64,
    /// Share of the slabs in use that could be empty.
    pub slab: f64,
    /// The longest run of free blocks.
    pub largest_run: u32,
    /// Blocks that sets own.
    pub live_blocks: usize,
    /// Runs of neighbours that the sets consist of.
    pub descriptors: usize,
}

/// Sizes of the last requests.
#[derive(Debug)]
pub(crate) struct Asks {
    sizes: [u32; ASKS],
    len: usize,
    next: usize,
}

impl Default for Asks {
    fn default() -> Self {
        Self {
            sizes: [0; ASKS],
            len: 0,
            next: 0,
        }
    }
}

impl Asks {
    pub(crate) fn note(&mut self, size: u32) {
        self.sizes[self.next] = size;
        self.next = (self.next + 1) % ASKS;
        self.len = (self.len + 1).min(ASKS);
    }

    /// The sizes at these percentiles; 1 where nothing was asked for yet.
    fn percentiles<const N: usize>(&self, percents: [usize; N]) -> [u32; N] {
        let mut sizes = self.sizes[..self.len].to_vec();
        sizes.sort_unstable();
        percents.map(|percent| {
            let at = (self.len * percent / 100).min(self.len.saturating_sub(1));
            sizes.get(at).copied().unwrap_or(1)
        })
    }
}

/// Scores from the free runs and from the sets' slots in order.
pub(crate) fn scores<S: Iterator<Item = Option<u32>>>(
    runs: &FreeRuns,
    sets: impl Iterator<Item = S>,
    asks: &Asks,
    slots_per_slab: u32,
) -> Fragmentation {
    let [p50, p90] = asks.percentiles([50, 90]);
    let mut live_blocks = 0;
    let mut descriptors = 0;
    let mut fewest = 0;
    let mut live_per_slab: Vec<u32> = Vec::new();
    for set in sets {
        let mut previous: Option<u32> = None;
        let mut blocks: u32 = 0;
        for slot in set.flatten() {
            let slab = (slot / slots_per_slab) as usize;
            if live_per_slab.len() <= slab {
                live_per_slab.resize(slab + 1, 0);
            }
            live_per_slab[slab] += 1;
            descriptors += usize::from(!is_neighbour(previous, slot, slots_per_slab));
            previous = Some(slot);
            blocks += 1;
        }
        live_blocks += blocks as usize;
        fewest += blocks.div_ceil(slots_per_slab) as usize;
    }
    let in_use = live_per_slab.iter().filter(|live| **live > 0).count();
    let needed = live_blocks.div_ceil(slots_per_slab as usize);
    Fragmentation {
        alloc_p50: unusable(runs, p50),
        alloc_p90: unusable(runs, p90),
        wire: share(descriptors - fewest, descriptors),
        slab: share(in_use - needed, in_use),
        largest_run: runs.largest(),
        live_blocks,
        descriptors,
    }
}

/// Whether a slot can share a descriptor with the one before it in its set.
pub(crate) fn is_neighbour(previous: Option<u32>, slot: u32, slots_per_slab: u32) -> bool {
    !slot.is_multiple_of(slots_per_slab) && previous == slot.checked_sub(1) && slot > 0
}

/// Share of the free blocks in runs shorter than `k` (Gorman and Whitcroft's unusable free space index).
fn unusable(runs: &FreeRuns, k: u32) -> f64 {
    let short = runs.iter().map(|run| run.len).filter(|len| *len < k);
    share(short.map(|len| len as usize).sum(), runs.num_free())
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(score: f64, expected: f64) {
        assert!((score - expected).abs() < 1e-9, "{score} is not {expected}");
    }

    #[test]
    fn scores_of_a_small_pool_are_those_worked_out_by_hand() {
        let mut runs = FreeRuns::new(8);
        runs.add_slab();
        runs.add_slab();
        let mut taken = Vec::new();
        assert!(runs.take(16, None, &mut taken));
        // Free: 1, 3..6 of the first slab, 8..10 of the second.
        for (start, len) in [(1, 1), (3, 3), (8, 2)] {
            runs.give_back(crate::runs::Extent { start, len });
        }
        let mut asks = Asks::default();
        (0..10).for_each(|at| asks.note(if at < 8 { 2 } else { 3 }));
        // One set of three pieces, one of two that a border of slabs keeps apart.
        let sets = [vec![0, 2, 6], vec![7, 10, 11]];
        let sets = sets.iter().map(|set| set.iter().map(|&slot| Some(slot)));
        let scores = scores(&runs, sets, &asks, 8);
        close(scores.alloc_p50, 1.0 / 6.0);
        close(scores.alloc_p90, 3.0 / 6.0);
        close(scores.wire, 1.0 - 2.0 / 5.0);
        close(scores.slab, 0.5);
        assert_eq!(
            (scores.largest_run, scores.live_blocks, scores.descriptors),
            (3, 6, 5)
        );
    }

    #[test]
    fn an_empty_pool_has_nothing_to_gain() {
        let none: [std::iter::Empty<Option<u32>>; 0] = [];
        let scores = scores(&FreeRuns::new(8), none.into_iter(), &Asks::default(), 8);
        assert_eq!(scores, Fragmentation::default());
    }
}
