//! At most one in a while.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

/// Lets one pass, and no other until a pause is over.
#[derive(Debug)]
pub(super) struct Throttle {
    began: Instant,
    pause: Duration,
    /// Microseconds since `began` from which on the next may pass.
    next: AtomicU64,
}

impl Throttle {
    pub(super) fn new(pause: Duration) -> Self {
        Self {
            began: Instant::now(),
            pause,
            next: AtomicU64::new(0),
        }
    }

    /// Whether this one may pass; if so the pause begins.
    pub(super) fn may_pass(&self) -> bool {
        let now = self.began.elapsed();
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (now, then) = (micros(now), micros(now + self.pause));
        let is_due = |next: u64| (next <= now).then_some(then);
        let passed = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_due);
        passed.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_passes_in_each_pause() {
        let throttle = Throttle::new(Duration::from_millis(100));
        assert!(throttle.may_pass());
        assert!(!throttle.may_pass());
        tokio::time::advance(Duration::from_millis(99)).await;
        assert!(!throttle.may_pass());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(throttle.may_pass() && !throttle.may_pass());
    }
}
