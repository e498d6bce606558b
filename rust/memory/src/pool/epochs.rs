//! When the old place of a moved block may be used again: once everybody who keeps block numbers has caught up.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use super::{BlockHandle, Pool};

/// The most moved blocks whose old places wait: nothing is moved while there are as many.
pub(super) const WAITING_MAX: usize = 4096;

/// Somebody who keeps handles or addresses of a pool's blocks without pinning them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParticipantId(u64);

/// A block that lies elsewhere since `epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// When it moved.
    pub epoch: u64,
    /// The handle that went stale.
    pub old: BlockHandle,
    /// The one that replaces it.
    pub new: BlockHandle,
}

/// The moves that not every participant knows of.
#[derive(Debug, Default)]
pub(super) struct Epochs {
    current: u64,
    next_participant: u64,
    /// The epoch up to which each has applied all moves.
    passed: FxHashMap<ParticipantId, u64>,
    /// In order of epochs. The old slot of each has a lease for it.
    waiting: VecDeque<Moved>,
}

impl Epochs {
    pub(super) fn advance(&mut self) -> u64 {
        self.current += 1;
        self.current
    }

    pub(super) fn push(&mut self, moved: Moved) {
        debug_assert!(self.waiting.len() < WAITING_MAX, "moves stop at the limit");
        self.waiting.push_back(moved);
    }

    pub(super) fn room(&self) -> usize {
        WAITING_MAX.saturating_sub(self.waiting.len())
    }

    /// The next move that everybody knows of.
    fn pop_passed(&mut self) -> Option<Moved> {
        let passed = self.passed.values().copied().min().unwrap_or(self.current);
        if self.waiting.front()?.epoch > passed {
            return None;
        }
        self.waiting.pop_front()
    }
}

impl Pool {
    /// Somebody starts to keep handles without pins: from now on, moved blocks' old places wait for them.
    pub fn join(&self) -> ParticipantId {
        let epochs = &mut self.state.lock().epochs;
        let id = ParticipantId(epochs.next_participant);
        epochs.next_participant += 1;
        epochs.passed.insert(id, epochs.current);
        id
    }

    /// The moves after `epoch` that somebody may not have applied.
    pub fn moved_since(&self, epoch: u64) -> Vec<Moved> {
        let state = self.state.lock();
        let after = state.epochs.waiting.iter();
        after.filter(|moved| moved.epoch > epoch).copied().collect()
    }

    /// A participant has applied every move up to `epoch`.
    pub fn pass(&self, participant: ParticipantId, epoch: u64) {
        let mut state = self.state.lock();
        let epoch = epoch.min(state.epochs.current);
        if let Some(passed) = state.epochs.passed.get_mut(&participant) {
            *passed = epoch.max(*passed);
        }
        drop(state);
        self.free_passed();
    }

    /// A participant keeps no handles any more, or is gone.
    pub fn leave(&self, participant: ParticipantId) {
        self.state.lock().epochs.passed.remove(&participant);
        self.free_passed();
    }

    /// Ends the epochs' leases on the old places that nobody names any more.
    pub(super) fn free_passed(&self) {
        loop {
            let moved = self.state.lock().epochs.pop_passed();
            match moved {
                Some(moved) => self.end_lease(moved.old.slot),
                None => return,
            }
        }
    }
}
