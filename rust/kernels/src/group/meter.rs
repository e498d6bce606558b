//! How far a rank's collectives are, for whoever watches over it: one that hangs is found by that.

use std::{
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

/// Counts a rank's collectives.
#[derive(Debug)]
pub struct Meter {
    began: Instant,
    entered: AtomicU64,
    is_waiting: AtomicBool,
    /// Nanoseconds from `began` to the end of the last collective, or to the beginning of the step.
    round_began: AtomicU64,
    slowest_round: AtomicU64,
}

/// What was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Collectives that the rank has entered.
    pub entered: u64,
    /// Whether it is in one, and so waits for others and not they for it.
    pub is_waiting: bool,
    /// Longest time between the ends of two collectives of the step.
    pub slowest_round: Duration,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            entered: AtomicU64::new(0),
            is_waiting: AtomicBool::new(false),
            round_began: AtomicU64::new(0),
            slowest_round: AtomicU64::new(0),
        }
    }
}

impl Meter {
    /// A step begins, of which the longest round is asked for.
    pub fn begin_step(&self) {
        self.round_began.store(self.now(), Relaxed);
        self.slowest_round.store(0, Relaxed);
    }

    /// What was counted until now.
    pub fn progress(&self) -> Progress {
        Progress {
            entered: self.entered.load(SeqCst),
            is_waiting: self.is_waiting.load(SeqCst),
            slowest_round: Duration::from_nanos(self.slowest_round.load(Relaxed)),
        }
    }

    pub(super) fn enter(&self) {
        self.entered.fetch_add(1, SeqCst);
        self.is_waiting.store(true, SeqCst);
    }

    /// A collective has ended well.
    pub(super) fn leave(&self) {
        self.is_waiting.store(false, SeqCst);
        let now = self.now();
        let round = now.saturating_sub(self.round_began.swap(now, Relaxed));
        self.slowest_round.fetch_max(round, Relaxed);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
