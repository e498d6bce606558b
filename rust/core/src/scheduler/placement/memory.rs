//! Memory of one GPU: the placed pieces, by address. What is free lies between them.
//!
//! One list is the whole truth, so free memory and placed memory cannot disagree, and every address is exact: nothing
//! is rounded beyond the extent. All operations are O(pieces on this GPU), of which there are few: a GPU that holds
//! ten models has ten.

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

/// A free run, in extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u32,
    pub(super) length: u32,
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
    /// Ascending and disjoint.
    pieces: Vec<Piece>,
}

impl GpuMemory {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            pieces: Vec::new(),
        }
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The runs that pieces of at least this priority leave, by address.
    pub(super) fn runs_below(&self, priority: u8) -> impl Iterator<Item = Run> + '_ {
        let walls = self.pieces.iter().filter(move |p| p.priority >= priority);
        let walls = walls.map(|piece| (piece.offset, piece.stop()));
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

    /// The free runs, by address.
    pub(super) fn free_runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs_below(0)
    }

    /// Room for every priority, in one pass.
    pub(super) fn rooms(&self) -> Rooms {
        let mut rooms = Rooms::default();
        let mut starts = [0_u32; NUM_PRIORITIES];
        for piece in &self.pieces {
            // A piece is a wall to requests of its own priority and below.
            let seen = usize::from(piece.priority) + 1;
            for (room, start) in rooms.iter_mut().zip(&mut starts).take(seen) {
                room.add(piece.offset - *start);
                *start = piece.stop();
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
        let stops = self.pieces.iter().map(|piece| (piece.offset, piece.stop()));
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
        best.map(|run| match end {
            End::Low => run.offset,
            End::High => run.offset + run.length - length,
        })
    }

    /// Free pieces of `length` units in all, as few as can be: one where a run is long enough, else the longest runs.
    pub(super) fn pages(&self, length: u32, end: End) -> Vec<Run> {
        if let Some(offset) = self.best_offset(length, end) {
            return vec![Run { offset, length }];
        }
        let mut runs: Vec<Run> = self.free_runs().collect();
        runs.sort_unstable_by_key(|run| (u32::MAX - run.length, run.offset));
        let mut left = length;
        runs.retain_mut(|run| {
            run.length = run.length.min(left);
            left -= run.length;
            run.length > 0
        });
        runs
    }

    pub(super) fn insert(&mut self, piece: Piece) {
        let at = self.pieces.partition_point(|p| p.offset < piece.offset);
        debug_assert!(
            self.pieces
                .get(at)
                .is_none_or(|next| piece.stop() <= next.offset)
        );
        self.pieces.insert(at, piece);
    }

    /// Frees every piece of the placement.
    pub(super) fn remove(&mut self, placement: PlacementId) {
        self.pieces.retain(|piece| piece.placement != placement);
    }
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
        let memory = memory(&[(4, 4, 0), (11, 9, 0)]); // free: [0,4) [8,11)
        let run = |offset, length| Run { offset, length };
        assert_eq!(memory.pages(3, End::Low), [run(8, 3)]);
        assert_eq!(memory.pages(6, End::Low), [run(0, 4), run(8, 2)]);
    }
}
