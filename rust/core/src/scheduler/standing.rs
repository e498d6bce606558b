//! What a routing decision reads of a worker, in one cache line.

use super::index::HolderId;
use super::worker::{Worker, WorkerId};

/// No slot, no cell.
pub(super) const NIL: u32 = u32::MAX;

/// A worker in a decision's eyes. Derived from [`Worker`] on every change of it, except for its place in the grid.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Standing {
    pub(super) id: WorkerId,
    pub(super) holder: HolderId,
    pub(super) group: u32,
    /// Cell of the group's load grid; [`NIL`] while it takes no requests.
    pub(super) cell: u32,
    /// Neighbours in the cell's list.
    pub(super) before: u32,
    pub(super) next: u32,
    /// Prompt tokens that wait to be computed there.
    pub(super) queued: u64,
    /// Sequences that run or wait there.
    pub(super) batch: u32,
    pub(super) kv_blocks_free: u32,
    pub(super) max_num_seqs: u32,
    pub(super) num_blocks: u32,
    pub(super) max_model_len: u32,
    /// Some of what it holds is in host memory.
    pub(super) has_kept: bool,
    /// Number of the decision that last chose the worker; 0: none. Here and not in [`Worker`], so that a tie costs no
    /// look elsewhere.
    pub(super) last_chosen: u64,
}

impl Standing {
    pub(super) fn new(id: WorkerId, worker: &Worker) -> Self {
        let mut standing = Self {
            id,
            holder: worker.holder,
            group: worker.group,
            cell: NIL,
            before: NIL,
            next: NIL,
            queued: 0,
            batch: 0,
            kv_blocks_free: 0,
            max_num_seqs: worker.spec.max_num_seqs,
            num_blocks: worker.spec.num_blocks,
            max_model_len: worker.spec.max_model_len,
            has_kept: false,
            last_chosen: 0,
        };
        standing.refresh(worker);
        standing
    }

    /// Takes over the worker's figures.
    pub(super) fn refresh(&mut self, worker: &Worker) {
        self.holder = worker.holder;
        self.has_kept = !worker.kept.is_empty();
        self.queued = worker.queued_prefill_tokens();
        self.batch = worker.batch();
        // At most `num_blocks`, which is a u32.
        self.kv_blocks_free = worker.kv_blocks_free() as u32;
    }

    /// The class of its room: see [`room_class`]. `None` where its batch is full.
    pub(super) fn room(&self) -> Option<usize> {
        (self.batch < self.max_num_seqs).then(|| room_class(self.kv_blocks_free))
    }
}

/// Classes of free KV blocks: 0, then two to the octave. Monotone.
pub(super) const NUM_ROOM_CLASSES: usize = 65;

/// The class of a number of free blocks.
pub(super) fn room_class(blocks: u32) -> usize {
    let Some(octave) = blocks.checked_ilog2() else {
        return 0;
    };
    let half = octave.checked_sub(1).map_or(0, |shift| blocks >> shift & 1);
    (1 + 2 * octave + half) as usize
}
