//! Finds workers that hang: their process lives, their stream is open, and nothing comes.

use std::time::Duration;

use crate::state::CorridorLimits;

/// Silence is counted in fifths of the heartbeat timeout.
const TICKS: u32 = 5;

/// Counts its own ticks instead of reading a clock. Where it is the router that stood still, few ticks pass, and the
/// worker is not blamed for messages that nobody read.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// Time between two calls of [`Self::tick`].
    pub(crate) period: Duration,
    hang_ticks: u32,
    silent_ticks: u32,
    stuck_ticks: u32,
    steps: u64,
    is_busy: bool,
}

/// What is wrong with a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hang {
    /// No message, not even a load report.
    Silent,
    /// It reports running sequences and finishes no step.
    Stuck,
}

impl Watchdog {
    pub(crate) fn new(limits: &CorridorLimits) -> Self {
        let period = (limits.heartbeat_timeout / TICKS).max(Duration::from_millis(1));
        let hang_ticks = limits
            .hang_timeout
            .as_millis()
            .div_ceil(period.as_millis().max(1));
        Self {
            period,
            hang_ticks: u32::try_from(hang_ticks).unwrap_or(u32::MAX).max(1),
            silent_ticks: 0,
            stuck_ticks: 0,
            steps: 0,
            is_busy: false,
        }
    }

    /// A message came.
    pub(crate) fn heard(&mut self) {
        self.silent_ticks = 0;
    }

    /// A load report came.
    pub(crate) fn reported(&mut self, steps: u64, num_running: u32) {
        if steps != self.steps || num_running == 0 {
            self.stuck_ticks = 0;
        }
        self.steps = steps;
        self.is_busy = num_running > 0;
    }

    /// One period passed.
    pub(crate) fn tick(&mut self) -> Option<Hang> {
        self.silent_ticks += 1;
        self.stuck_ticks = if self.is_busy {
            self.stuck_ticks.saturating_add(1)
        } else {
            0
        };
        if self.silent_ticks > TICKS {
            Some(Hang::Silent)
        } else if self.stuck_ticks > self.hang_ticks {
            Some(Hang::Stuck)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watchdog() -> Watchdog {
        let limits = CorridorLimits {
            heartbeat_timeout: Duration::from_millis(500),
            hang_timeout: Duration::from_secs(1),
            ..CorridorLimits::default()
        };
        Watchdog::new(&limits)
    }

    #[test]
    fn silence_is_noticed_and_a_message_ends_it() {
        let mut watchdog = watchdog();
        assert_eq!(watchdog.period, Duration::from_millis(100));
        for _ in 0..TICKS {
            assert_eq!(watchdog.tick(), None);
        }
        watchdog.heard();
        for _ in 0..TICKS {
            assert_eq!(watchdog.tick(), None);
        }
        assert_eq!(watchdog.tick(), Some(Hang::Silent));
    }

    #[test]
    fn only_a_busy_worker_without_steps_is_stuck() {
        let mut watchdog = watchdog();
        let mut run = |steps: fn(u64) -> u64, num_running| {
            (0..40).find_map(|tick| {
                watchdog.heard();
                watchdog.reported(steps(tick), num_running);
                watchdog.tick().map(|hang| (tick, hang))
            })
        };
        assert_eq!(run(|_| 7, 0), None);
        assert_eq!(run(|tick| tick, 3), None);
        // Ten periods of 100 ms, then the next one tells.
        assert_eq!(run(|_| 99, 3), Some((10, Hang::Stuck)));
    }
}
