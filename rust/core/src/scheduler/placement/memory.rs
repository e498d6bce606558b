//! Memory of one GPU: the placed pieces, by address. What is free lies between them.
//!
//! One list is the whole truth, so free memory and placed memory cannot disagree, and every address is exact: nothing
//! is rounded beyond the extent. All operations are O(pieces on this GPU), of which there are few: a GPU that holds
//! ten models has ten.

use std::cmp::Reverse;

use super::super::place::{NUM_PRIORITIES, PlacementId};

/// Which end of the memory a gang is placed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Low,
    High,
}

/// A contiguous piece that a placement holds, in extents.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) offset: u32,
    pub(super) length: u32,
    pub(super) priority: u8,
    pub(super) placement: PlacementId,
}

impl Piece {
    pub(super) fn stop(&self) -> u32 {
        self.offset + self.length
    }
}

/// Neighbouring extents, free or placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u32,
    pub(super) length: u32,
}

impl Run {
    pub(super) fn stop(self) -> u32 {
        self.offset + self.length
    }

    /// What lies before and behind `inner`; all of it where `inner` lies elsewhere.
    fn without(self, inner: Self) -> [Self; 2] {
        let run = |offset: u32, stop: u32| Self {
            offset,
            length: stop.saturating_sub(offset),
        };
        let cut = inner.offset.clamp(self.offset, self.stop());
        let resume = inner.stop().clamp(self.offset, self.stop());
        [run(self.offset, cut), run(resume, self.stop())]
    }

    /// Its first or last `length` units.
    pub(super) fn at_end(self, length: u32, end: End) -> Self {
        let offset = match end {
            End::Low => self.offset,
            End::High => self.stop() - length,
        };
        Self { offset, length }
    }
}

/// What a request of one priority could take of a GPU: what is free or of lower priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Room {
    /// Its longest run.
    pub(super) longest: u32,
    /// All of it.
    pub(super) total: u32,
}

/// Room by priority of the request. Entry 0 is what is free.
pub(super) type Rooms = [Room; NUM_PRIORITIES];

#[derive(Clone, Debug)]
pub(super) struct GpuMemory {
    capacity: u32,
    /// Where the pieces lie: ascending and disjoint. Apart from whose they are, because finding room reads only this.
    spans: Vec<Run>,
    /// Whose they are, in the same order.
    owners: Vec<Owner>,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    placement: PlacementId,
    priority: u8,
}

impl GpuMemory {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            spans: Vec::new(),
            owners: Vec::new(),
        }
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn num_pieces(&self) -> usize {
        self.spans.len()
    }

    /// The placed pieces, by address.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + Clone + '_ {
        let both = self.spans.iter().zip(&self.owners);
        both.map(|(span, owner)| Piece {
            offset: span.offset,
            length: span.length,
            priority: owner.priority,
            placement: owner.placement,
        })
    }

    /// The free runs, by address.
    pub(super) fn free_runs(&self) -> impl Iterator<Item = Run> + '_ {
        let walls = self.spans.iter().map(|span| (span.offset, span.stop()));
        let mut start = 0;
        walls
            .chain([(self.capacity, self.capacity)])
            .filter_map(move |(offset, stop)| {
                let run = Run {
                    offset: start,
                    length: offset - start,
                };
                start = stop;
                (run.length > 0).then_some(run)
            })
    }

    /// Room for every priority, in one pass.
    pub(super) fn rooms(&self) -> Rooms {
        let mut rooms = Rooms::default();
        let mut starts = [0_u32; NUM_PRIORITIES];
        for (span, owner) in self.spans.iter().zip(&self.owners) {
            // A piece is a wall to requests of its own priority and below.
            let seen = usize::from(owner.priority) + 1;
            for (room, start) in rooms.iter_mut().zip(&mut starts).take(seen) {
                room.add(span.offset - *start);
                *start = span.stop();
            }
        }
        for (room, start) in rooms.iter_mut().zip(starts) {
            room.add(self.capacity - start);
        }
        rooms
    }

    /// Best fit: where in the shortest free run that is long enough, seen from `end`, `length` units would go.
    pub(super) fn best_offset(&self, length: u32, end: End) -> Option<u32> {
        let mut best: Option<Run> = None;
        let mut start = 0;
        // Written out rather than over `free_runs`: this is the hottest loop of placement.
        let stops = self.spans.iter().map(|span| (span.offset, span.stop()));
        for (offset, stop) in stops.chain([(self.capacity, self.capacity)]) {
            let run = Run {
                offset: start,
                length: offset - start,
            };
            start = stop;
            let is_better = best.is_none_or(|best| match end {
                End::Low => run.length < best.length,
                End::High => run.length <= best.length,
            });
            if run.length >= length && is_better {
                best = Some(run);
            }
        }
        best.map(|run| run.at_end(length, end).offset)
    }

    /// Adds to `out` free pieces of `length` units in all, as few as can be and none in the free run `beside`.
    pub(super) fn pages(&self, length: u32, beside: Option<Run>, end: End, out: &mut Vec<Run>) {
        let Some(beside) = beside else {
            match self.best_offset(length, end) {
                Some(offset) => out.push(Run { offset, length }),
                None => pages_of(self.free_runs().collect(), length, end, out),
            }
            return;
        };
        let runs = self.free_runs().flat_map(|run| run.without(beside));
        let runs = runs.filter(|run| run.length > 0);
        pages_of(runs.collect(), length, end, out);
    }

    pub(super) fn insert(&mut self, piece: Piece) {
        let at = self.spans.partition_point(|p| p.offset < piece.offset);
        debug_assert!(
            self.spans
                .get(at)
                .is_none_or(|next| piece.stop() <= next.offset)
        );
        let Piece {
            offset,
            length,
            priority,
            placement,
        } = piece;
        self.spans.insert(at, Run { offset, length });
        self.owners.insert(
            at,
            Owner {
                placement,
                priority,
            },
        );
    }

    /// Frees every piece of the placement.
    pub(super) fn remove(&mut self, placement: PlacementId) {
        let mut owners = self.owners.iter();
        self.spans
            .retain(|_| owners.next().is_some_and(|o| o.placement != placement));
        self.owners.retain(|owner| owner.placement != placement);
    }
}

/// Adds to `out` parts of the runs, of `length` units in all and as few as can be: the longest runs, and for what is
/// left then the tightest one that is enough, so that long runs stay long. O(runs log runs).
pub(super) fn pages_of(mut runs: Vec<Run>, length: u32, end: End, out: &mut Vec<Run>) {
    // The longest first; of equal ones the nearest to the end last.
    runs.sort_unstable_by_key(|run| {
        let distance = match end {
            End::Low => run.offset,
            End::High => u32::MAX - run.offset,
        };
        Reverse((run.length, distance))
    });
    let mut left = length;
    for (index, &run) in runs.iter().enumerate() {
        if run.length >= left {
            let num_enough = runs[index..].partition_point(|run| run.length >= left);
            out.push(runs[index + num_enough - 1].at_end(left, end));
            return;
        }
        out.push(run);
        left -= run.length;
    }
    debug_assert_eq!(left, 0, "the runs are too short in sum");
}

impl Room {
    fn add(&mut self, length: u32) {
        self.longest = self.longest.max(length);
        self.total += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pieces: &[(u32, u32, u8)]) -> GpuMemory {
        let mut memory = GpuMemory::new(20);
        for (id, &(offset, length, priority)) in pieces.iter().enumerate() {
            memory.insert(Piece {
                offset,
                length,
                priority,
                placement: PlacementId(id as u64),
            });
        }
        memory
    }

    #[test]
    fn rooms_count_what_a_priority_may_take() {
        // [0,4) free  [4,8) prio 0  [8,10) free  [10,12) prio 2  [12,20) free
        let memory = memory(&[(10, 2, 2), (4, 4, 0)]);
        let expected = [(8, 14), (10, 18), (10, 18), (20, 20)];
        let rooms = memory.rooms().map(|room| (room.longest, room.total));
        assert_eq!(rooms, expected);
    }

    #[test]
    fn best_fit_takes_the_tightest_run_from_its_end() {
        let memory = memory(&[(4, 4, 0), (10, 2, 0), (14, 4, 0)]); // free: [0,4) [8,10) [12,14) [18,20)
        assert_eq!(memory.best_offset(2, End::Low), Some(8));
        assert_eq!(memory.best_offset(1, End::High), Some(19));
        assert_eq!(memory.best_offset(3, End::High), Some(1));
        assert_eq!(memory.best_offset(5, End::Low), None);
    }

    #[test]
    fn pages_are_one_run_where_possible_and_else_the_longest() {
        let memory = memory(&[(5, 2, 0), (10, 2, 0), (14, 4, 0)]); // free: [0,5) [7,10) [12,14) [18,20)
        let run = |offset, length| Run { offset, length };
        let pages = |length, end| {
            let mut pages = Vec::new();
            memory.pages(length, None, end, &mut pages);
            pages
        };
        assert_eq!(pages(3, End::Low), [run(7, 3)]);
        // What the longest run leaves goes into the tightest that is enough, at its end.
        assert_eq!(pages(6, End::Low), [run(0, 5), run(12, 1)]);
        assert_eq!(pages(6, End::High), [run(0, 5), run(19, 1)]);
        assert_eq!(pages(9, End::High), [run(0, 5), run(7, 3), run(19, 1)]);
        let mut beside = Vec::new();
        memory.pages(5, Some(run(1, 2)), End::Low, &mut beside); // free: [0,1) [3,5) [7,10) [12,14) [18,20)
        assert_eq!(beside, [run(7, 3), run(3, 2)]);
    }
}
