//! A number in shared memory that one process counts up and others wait for: they spin a while, then sleep in the kernel.

use std::{
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, SeqCst},
    },
    time::{Duration, Instant},
};

use rustix::thread::futex;

/// How long a sleeper sleeps before it looks at what no counter tells it.
pub(crate) const NAP: Duration = Duration::from_millis(5);
/// Looks at a counter between two looks at the clock.
const SPINS_PER_LOOK: u32 = 32;

/// The number, which wraps, and how many sleep until it changes. Zeros are one.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Counter {
    number: AtomicU32,
    sleepers: AtomicU32,
}

impl Counter {
    /// The number, and with it all that was written before it was published.
    pub(crate) fn get(&self) -> u32 {
        self.number.load(Acquire)
    }

    /// Publishes a number, and wakes who sleeps.
    pub(crate) fn publish(&self, number: u32) {
        // In one order with `sleepers`: either the sleeper sees the new number, or it is seen here.
        self.number.store(number, SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            self.wake();
        }
    }

    /// Wakes who sleeps: there is something else to look at.
    pub(crate) fn wake(&self) {
        let woken = futex::wake(&self.number, futex::Flags::empty(), i32::MAX as u32);
        debug_assert!(woken.is_ok(), "the word is there");
    }

    /// Looks for so long whether the number is the one that is waited for; returns whether it is.
    pub(crate) fn spin(&self, limit: Duration, is_there: impl Fn(u32) -> bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < limit {
            for _ in 0..SPINS_PER_LOOK {
                if is_there(self.get()) {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
    }

    /// Runs what sleeps: looks at the number by `look`, and if it is not the one, takes a `nap`.
    pub(crate) fn asleep<T>(&self, sleep: impl FnOnce() -> T) -> T {
        self.sleepers.fetch_add(1, SeqCst);
        let slept = sleep();
        self.sleepers.fetch_sub(1, SeqCst);
        slept
    }

    /// The number, in one order with being asleep.
    pub(crate) fn look(&self) -> u32 {
        self.number.load(SeqCst)
    }

    /// Sleeps for so long, or until another number than the one that was seen is published.
    pub(crate) fn nap(&self, seen: u32, limit: Duration) {
        let limit = futex::Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        // Woken, interrupted, too late or for nothing: who called looks again in any case.
        let _ = futex::wait(&self.number, futex::Flags::empty(), seen, Some(&limit));
    }
}
