//! Figures for readers that must not stop decisions.
//!
//! A scheduler is behind a lock. Readers that can do with figures of a few milliseconds ago share a [`Snapshot`]
//! instead: at most one of them in that time takes the lock and copies, and those that decide never wait for the others.
//!
//! *Property.* No reader is shown an older state than any reader was shown before. Two readers may copy at a time and
//! come back in either order; the number of the copy, drawn under the owner's lock, says which one stays. The model
//! check in `tests/snapshot_loom.rs` goes through every interleaving, and fails without that comparison.

use std::time::Duration;

use orchestra_core::Time;

use super::sync::{Arc, Mutex};

/// A copy of some state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot<T> {
    /// Counts the copies; drawn under the lock that guards the state.
    pub(crate) number: u64,
    /// When it was copied.
    pub(crate) taken_at: Time,
    /// What was copied.
    pub(crate) value: T,
}

/// The latest copy.
#[derive(Debug)]
pub(crate) struct Snapshots<T> {
    latest: Mutex<Option<Arc<Snapshot<T>>>>,
}

impl<T> Default for Snapshots<T> {
    fn default() -> Self {
        Self {
            latest: Mutex::new(None),
        }
    }
}

impl<T> Snapshots<T> {
    /// The latest copy where it is younger than `max_age`, otherwise what `take` copies.
    pub(crate) fn read(
        &self,
        now: Time,
        max_age: Duration,
        take: impl FnOnce() -> Snapshot<T>,
    ) -> Arc<Snapshot<T>> {
        let is_fresh = |latest: &Arc<Snapshot<T>>| now < latest.taken_at + max_age;
        if let Some(latest) = self.with(|latest| latest.clone().filter(is_fresh)) {
            return latest;
        }
        let taken = Arc::new(take());
        self.with(|latest| match latest {
            Some(newer) if newer.number > taken.number => Arc::clone(newer),
            _ => {
                *latest = Some(Arc::clone(&taken));
                taken
            }
        })
    }

    /// The lock is held for a copy of a pointer.
    fn with<R>(&self, change: impl FnOnce(&mut Option<Arc<Snapshot<T>>>) -> R) -> R {
        change(&mut self.latest.lock())
    }
}
