//! Time as the core sees it: passed in, counted from the router's start.

use orchestra_core::Time;
use tokio::time::Instant;

/// The router's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    started: Instant,
}

impl Clock {
    /// A clock that begins now.
    pub(crate) fn start() -> Self {
        Self {
            started: Instant::now(),
        }
    }

    pub(crate) fn now(self) -> Time {
        self.at(Instant::now())
    }

    /// An instant in the core's time; what was before the start is the start.
    pub(crate) fn at(self, instant: Instant) -> Time {
        let since = instant.saturating_duration_since(self.started);
        Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}
