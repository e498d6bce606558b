//! The free slots of a pool as runs of neighbours, found by length in constant time.
//!
//! Neighbours that move together need one descriptor, so a request gets the tightest run that holds all of it,
//! and where none does, the longest runs there are: contiguity is preferred and never required. Runs stop at the
//! borders of slabs, because a block or a descriptor must not straddle two registrations.
//!
//! The index is a two-level segregated fit (Masmano et al., ECRTS 2004) over slots instead of bytes: one list for
//! each length up to 64, four for each doubling above, and a bitmap of the lists that hold something.

/// Neighbouring slots of one slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first slot.
    pub start: u32,
    /// How many; at least one.
    pub len: u32,
}

const EXACT: usize = 64;
const PER_DOUBLING: usize = 4;
const BUCKETS: usize = EXACT + (32 - 6) * PER_DOUBLING;
const WORDS: usize = BUCKETS.div_ceil(64);
const NONE: u32 = u32::MAX;
/// Marks the tag at a run's last slot, where that is not its first too.
const LAST: u32 = 1 << 31;

/// The list that runs of this length are in.
const fn bucket_of(len: u32) -> usize {
    if len as usize <= EXACT {
        return len as usize - 1;
    }
    let exponent = len.ilog2();
    let quarter = (len >> (exponent - 2)) & 3;
    EXACT + (exponent as usize - 6) * PER_DOUBLING + quarter as usize
}

/// Which slots are free, by runs.
#[derive(Debug)]
pub struct FreeRuns {
    slots_per_slab: u32,
    /// The run's length at its first slot, and with `LAST` at its last; 0 at all others, so at every slot taken.
    tags: Vec<u32>,
    /// The lists' links, at the first slot of each run.
    next: Vec<u32>,
    previous: Vec<u32>,
    heads: [u32; BUCKETS],
    nonempty: [u64; WORDS],
    num_free: usize,
}

impl FreeRuns {
    /// No slots yet. `slots_per_slab` is at least one.
    pub fn new(slots_per_slab: u32) -> Self {
        debug_assert!(slots_per_slab > 0, "a slab holds at least one block");
        Self {
            slots_per_slab,
            tags: Vec::new(),
            next: Vec::new(),
            previous: Vec::new(),
            heads: [NONE; BUCKETS],
            nonempty: [0; WORDS],
            num_free: 0,
        }
    }

    /// Adds a slab whose slots are all free.
    pub fn add_slab(&mut self) {
        let start = self.tags.len() as u32;
        let slots = self.tags.len() + self.slots_per_slab as usize;
        self.tags.resize(slots, 0);
        self.next.resize(slots, NONE);
        self.previous.resize(slots, NONE);
        self.num_free += self.slots_per_slab as usize;
        self.link(start, self.slots_per_slab);
    }

    /// Slots that are free.
    pub const fn num_free(&self) -> usize {
        self.num_free
    }

    /// The longest run; 0 where nothing is free.
    pub fn largest(&self) -> u32 {
        self.longest_run().map_or(0, |run| run.len)
    }

    /// Takes `n` slots into `extents`, in the order in which they should be used; `false`, and nothing taken, where
    /// fewer are free. `after` names the slot that they should follow.
    pub fn take(&mut self, n: u32, after: Option<u32>, extents: &mut Vec<Extent>) -> bool {
        if n as usize > self.num_free {
            return false;
        }
        let mut left = n;
        if let Some(run) = after.and_then(|slot| self.run_after(slot)) {
            let len = run.len.min(left);
            self.take_from(run, len);
            extents.push(Extent {
                start: run.start,
                len,
            });
            left -= len;
        }
        while left > 0 {
            let found = self.tightest_run(left).or_else(|| self.longest_run());
            let Some(run) = found else {
                debug_assert!(false, "as many slots are in runs as are counted");
                return false;
            };
            let len = run.len.min(left);
            self.take_from(run, len);
            extents.push(Extent {
                start: run.start,
                len,
            });
            left -= len;
        }
        true
    }

    /// Takes `n` neighbours, or nothing.
    pub fn take_run(&mut self, n: u32) -> Option<Extent> {
        let run = self.tightest_run(n)?;
        self.take_from(run, n);
        Some(Extent {
            start: run.start,
            len: n,
        })
    }

    /// Takes one free slot by name. Looks for the beginning of its run from there, so it costs as much as the run is
    /// long. `false` where it is in no run.
    pub fn take_slot(&mut self, slot: u32) -> bool {
        let mut before = (0..=slot).rev();
        let Some(found) = before.find(|&at| self.tags[at as usize] > 0) else {
            return false;
        };
        // The last slot of a run is met first where it is this one, or where the run lies before it.
        let len = self.tags[found as usize] & !LAST;
        let is_last = self.tags[found as usize] & LAST > 0;
        let start = if is_last { found + 1 - len } else { found };
        if slot >= start + len {
            return false;
        }
        self.unlink(start, len);
        self.num_free -= 1;
        if slot > start {
            self.link(start, slot - start);
        }
        if slot + 1 < start + len {
            self.link(slot + 1, start + len - slot - 1);
        }
        true
    }

    /// Gives slots of one slab back; they join their free neighbours.
    pub fn give_back(&mut self, extent: Extent) {
        let Extent { mut start, mut len } = extent;
        debug_assert!(len > 0 && self.tags[start as usize] == 0, "was not free");
        debug_assert!(
            start / self.slots_per_slab == (start + len - 1) / self.slots_per_slab,
            "an extent lies inside one slab"
        );
        self.num_free += len as usize;
        let before = self.len_before(start);
        if before > 0 {
            self.unlink(start - before, before);
            start -= before;
            len += before;
        }
        if let Some(behind) = self.run_after(start + len - 1) {
            self.unlink(behind.start, behind.len);
            len += behind.len;
        }
        self.link(start, len);
    }

    /// Every free run, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> {
        (0..BUCKETS).flat_map(|bucket| self.iter_bucket(bucket))
    }

    /// The free run that begins right behind this slot, in the same slab.
    pub fn run_after(&self, slot: u32) -> Option<Extent> {
        let start = slot + 1;
        if start.is_multiple_of(self.slots_per_slab) {
            return None;
        }
        let len = *self.tags.get(start as usize)?;
        // The slot before is taken, so a tag here is that of a first slot.
        (len > 0).then_some(Extent { start, len })
    }

    /// The length of the free run that ends right before this slot, in the same slab.
    pub fn len_before(&self, slot: u32) -> u32 {
        if slot.is_multiple_of(self.slots_per_slab) {
            return 0;
        }
        self.tags[slot as usize - 1] & !LAST
    }

    /// Takes every free slot of a slab out of the index, where it will not be found again.
    pub fn take_slab(&mut self, slab: u32) -> u32 {
        let first = slab * self.slots_per_slab;
        let mut taken = 0;
        let mut slot = first;
        while slot < first + self.slots_per_slab {
            let len = self.tags[slot as usize];
            if len > 0 {
                self.take_from(Extent { start: slot, len }, len);
                taken += len;
            }
            slot += len.max(1);
        }
        taken
    }

    // === lists ===

    fn iter_bucket(&self, bucket: usize) -> impl Iterator<Item = Extent> {
        let first = Some(self.heads[bucket]).filter(|&start| start != NONE);
        std::iter::successors(first, |&start| {
            Some(self.next[start as usize]).filter(|&start| start != NONE)
        })
        .map(|start| Extent {
            start,
            len: self.tags[start as usize],
        })
    }

    /// The shortest run of at least `n`.
    fn tightest_run(&self, n: u32) -> Option<Extent> {
        let bucket = bucket_of(n);
        self.tightest_in(bucket, n)
            .or_else(|| self.tightest_in(self.first_nonempty(bucket + 1)?, n))
    }

    /// The same in one list. All runs of a list for one length are as tight.
    fn tightest_in(&self, bucket: usize, n: u32) -> Option<Extent> {
        let mut runs = self.iter_bucket(bucket);
        if bucket < EXACT {
            return runs.next();
        }
        runs.filter(|run| run.len >= n).min_by_key(|run| run.len)
    }

    fn longest_run(&self) -> Option<Extent> {
        let word = self.nonempty.iter().rposition(|&word| word != 0)?;
        let bucket = word * 64 + self.nonempty[word].ilog2() as usize;
        self.iter_bucket(bucket).max_by_key(|run| run.len)
    }

    fn first_nonempty(&self, from: usize) -> Option<usize> {
        let first_word = from / 64;
        (first_word..WORDS).find_map(|word| {
            let mask = if word == first_word {
                u64::MAX << (from % 64)
            } else {
                u64::MAX
            };
            let lists = self.nonempty[word] & mask;
            (lists != 0).then(|| word * 64 + lists.trailing_zeros() as usize)
        })
    }

    /// Takes the first `n` slots of a run; the rest stays free.
    fn take_from(&mut self, run: Extent, n: u32) {
        self.unlink(run.start, run.len);
        self.num_free -= n as usize;
        if n < run.len {
            self.link(run.start + n, run.len - n);
        }
    }

    fn link(&mut self, start: u32, len: u32) {
        let bucket = bucket_of(len);
        let head = std::mem::replace(&mut self.heads[bucket], start);
        self.next[start as usize] = head;
        self.previous[start as usize] = NONE;
        if head != NONE {
            self.previous[head as usize] = start;
        }
        self.nonempty[bucket / 64] |= 1 << (bucket % 64);
        self.tags[(start + len) as usize - 1] = len | LAST;
        self.tags[start as usize] = len;
    }

    fn unlink(&mut self, start: u32, len: u32) {
        let bucket = bucket_of(len);
        let next = self.next[start as usize];
        let previous = self.previous[start as usize];
        match previous {
            NONE => self.heads[bucket] = next,
            _ => self.next[previous as usize] = next,
        }
        if next != NONE {
            self.previous[next as usize] = previous;
        }
        if self.heads[bucket] == NONE {
            self.nonempty[bucket / 64] &= !(1 << (bucket % 64));
        }
        self.tags[(start + len) as usize - 1] = 0;
        self.tags[start as usize] = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The free slots as a plain list of booleans.
    struct Naive {
        slots_per_slab: usize,
        free: Vec<bool>,
    }

    impl Naive {
        fn runs(&self) -> Vec<Extent> {
            let mut runs: Vec<Extent> = Vec::new();
            for (slot, _) in self.free.iter().enumerate().filter(|(_, free)| **free) {
                let slot = slot as u32;
                match runs.last_mut() {
                    Some(run)
                        if run.start + run.len == slot
                            && !(slot as usize).is_multiple_of(self.slots_per_slab) =>
                    {
                        run.len += 1;
                    }
                    _ => runs.push(Extent {
                        start: slot,
                        len: 1,
                    }),
                }
            }
            runs
        }
    }

    fn check(runs: &FreeRuns, naive: &Naive) {
        let mut indexed: Vec<Extent> = runs.iter().collect();
        indexed.sort_by_key(|run| run.start);
        assert_eq!(indexed, naive.runs());
        assert_eq!(
            runs.num_free(),
            naive.free.iter().filter(|free| **free).count()
        );
        let longest = indexed.iter().map(|run| run.len).max().unwrap_or(0);
        assert_eq!(runs.largest(), longest);
        let tagged = runs.tags.iter().filter(|tag| **tag != 0).count();
        let ends = indexed.iter().map(|run| 1 + usize::from(run.len > 1)).sum();
        assert_eq!(tagged, ends, "only the ends of runs are tagged");
    }

    /// Whether these extents are the tightest run, or the longest runs where none is long enough.
    fn check_choice(before: &[Extent], extents: &[Extent], n: u32) {
        let tightest = before
            .iter()
            .map(|run| run.len)
            .filter(|len| *len >= n)
            .min();
        if let Some(len) = tightest {
            assert_eq!(extents.len(), 1);
            let from = before.iter().find(|run| run.start == extents[0].start);
            assert_eq!(from.unwrap().len, len);
        } else {
            let longest = before.iter().map(|run| run.len).max().unwrap();
            assert_eq!(extents[0].len, longest);
        }
    }

    proptest! {
        #[test]
        fn the_index_is_what_a_scan_would_find(
            slots_per_slab in 1_u32..200,
            steps in prop::collection::vec((0_u8..5, 1_u32..150, any::<prop::sample::Index>()), 1..120),
        ) {
            let mut runs = FreeRuns::new(slots_per_slab);
            let mut naive = Naive { slots_per_slab: slots_per_slab as usize, free: Vec::new() };
            let mut held: Vec<Extent> = Vec::new();
            for (kind, n, which) in steps {
                let before = naive.runs();
                let mut extents = Vec::new();
                match kind {
                    0 if naive.free.len() < 800 => {
                        runs.add_slab();
                        naive.free.resize(naive.free.len() + slots_per_slab as usize, true);
                    }
                    1 => {
                        let took = runs.take(n, None, &mut extents);
                        let num_free: u32 = before.iter().map(|run| run.len).sum();
                        prop_assert_eq!(took, num_free >= n);
                        if took {
                            check_choice(&before, &extents, n);
                        }
                    }
                    2 => {
                        let run = runs.take_run(n);
                        prop_assert_eq!(run.is_some(), before.iter().any(|run| run.len >= n));
                        extents.extend(run);
                    }
                    3 if !naive.free.is_empty() => {
                        let slot = which.index(naive.free.len());
                        prop_assert_eq!(runs.take_slot(slot as u32), naive.free[slot]);
                        if naive.free[slot] {
                            extents.push(Extent { start: slot as u32, len: 1 });
                        }
                    }
                    _ if !held.is_empty() => {
                        let extent = held.swap_remove(which.index(held.len()));
                        runs.give_back(extent);
                        naive.free[extent.start as usize..(extent.start + extent.len) as usize].fill(true);
                    }
                    _ => {}
                }
                for extent in &extents {
                    let slots = &mut naive.free[extent.start as usize..(extent.start + extent.len) as usize];
                    prop_assert!(slots.iter().all(|free| *free), "nothing is taken twice");
                    slots.fill(false);
                }
                held.extend(extents);
                check(&runs, &naive);
            }
        }
    }

    #[test]
    fn what_follows_a_slot_is_taken_first() {
        let mut runs = FreeRuns::new(16);
        runs.add_slab();
        let mut extents = Vec::new();
        assert!(runs.take(4, None, &mut extents));
        assert!(runs.take(4, None, &mut extents));
        runs.give_back(extents[0]);
        extents.clear();
        assert!(runs.take(6, Some(7), &mut extents));
        assert_eq!(extents, [Extent { start: 8, len: 6 }]);
        // Slots 0..4 and 14..16 are left: what does not fit behind comes from the longest run.
        assert!(runs.take(5, Some(13), &mut extents));
        assert_eq!(
            extents[1..],
            [Extent { start: 14, len: 2 }, Extent { start: 0, len: 3 }]
        );
    }

    #[test]
    fn runs_of_every_length_have_a_list_and_longer_ones_no_lower_list() {
        let lengths = (1..5000).chain([1 << 20, LAST - 1]);
        let lists: Vec<usize> = lengths.map(bucket_of).collect();
        assert!(lists.is_sorted() && *lists.last().unwrap() < BUCKETS);
    }
}
