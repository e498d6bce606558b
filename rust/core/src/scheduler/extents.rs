//! Free memory of one GPU: contiguous runs, by address.

use std::collections::BTreeMap;

/// Which end of the memory an extent is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Low,
    High,
}

/// The free runs of one GPU, in units of one extent. Runs never touch: neighbours are merged.
#[derive(Clone, Debug)]
pub(super) struct FreeRuns {
    /// Offset → length.
    runs: BTreeMap<u64, u64>,
    total: u64,
}

impl FreeRuns {
    /// Memory of `total` units, all free.
    pub(super) fn new(total: u64) -> Self {
        let runs = if total > 0 {
            BTreeMap::from([(0, total)])
        } else {
            BTreeMap::new()
        };
        Self { runs, total }
    }

    /// Units in all.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Free units, in runs of any length.
    pub(super) fn free(&self) -> u64 {
        self.runs.values().sum()
    }

    /// Whether a run of this length is free.
    pub(super) fn fits(&self, length: u64) -> bool {
        self.runs.values().any(|&run| run >= length)
    }

    /// Takes the first run that is long enough, seen from `end`; its offset. `None` where no run is.
    pub(super) fn take(&mut self, length: u64, end: End) -> Option<u64> {
        let long_enough = |(&offset, &run): (&u64, &u64)| (run >= length).then_some((offset, run));
        let (offset, run) = match end {
            End::Low => self.runs.iter().find_map(long_enough),
            End::High => self.runs.iter().rev().find_map(long_enough),
        }?;
        // [offset ......... offset + run)          the run
        // [offset, +length)[....... rest )         taken from the low end
        // [ rest .......)[-length, offset + run)   taken from the high end
        self.runs.remove(&offset);
        let rest = run - length;
        let (taken, rest_offset) = match end {
            End::Low => (offset, offset + length),
            End::High => (offset + rest, offset),
        };
        if rest > 0 {
            self.runs.insert(rest_offset, rest);
        }
        Some(taken)
    }

    /// Gives `[offset, offset + length)` back and merges it with its free neighbours.
    pub(super) fn give_back(&mut self, offset: u64, length: u64) {
        let (mut start, mut stop) = (offset, offset + length);
        let before = self.runs.range(..offset).next_back();
        if let Some((&before, _)) = before.filter(|&(&before, &run)| before + run == start) {
            self.runs.remove(&before);
            start = before;
        }
        if let Some(run) = self.runs.remove(&stop) {
            stop += run;
        }
        self.runs.insert(start, stop - start);
    }

    /// The free runs as (offset, length), by address.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(&offset, &length)| (offset, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_grow_towards_each_other_and_merge_back() {
        let mut memory = FreeRuns::new(10);
        assert_eq!(memory.take(3, End::Low), Some(0));
        assert_eq!(memory.take(4, End::High), Some(6));
        assert_eq!(memory.take(4, End::Low), None);
        assert_eq!(memory.take(1, End::Low), Some(3));
        memory.give_back(0, 3);
        assert_eq!(memory.iter().collect::<Vec<_>>(), [(0, 3), (4, 2)]);
        memory.give_back(3, 1);
        memory.give_back(6, 4);
        assert_eq!(memory.iter().collect::<Vec<_>>(), [(0, 10)]);
        assert_eq!((memory.free(), memory.total()), (10, 10));
    }
}
