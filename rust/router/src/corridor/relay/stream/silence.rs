//! How long an engine has been silent.

use std::{pin::Pin, time::Duration};

use tokio::time::{self, Instant, Sleep};

/// Times a silence. Events only move the time; the timer looks when it fires, so that a busy stream
/// does not pay for it with each event.
pub(super) struct Silence {
    timer: Pin<Box<Sleep>>,
    until: Instant,
}

impl Silence {
    pub(super) fn new(limit: Duration) -> Self {
        let until = Instant::now() + limit;
        Self {
            timer: Box::pin(time::sleep_until(until)),
            until,
        }
    }

    pub(super) fn begin(&mut self, limit: Duration) {
        self.until = Instant::now() + limit;
        if self.until < self.timer.deadline() {
            self.timer.as_mut().reset(self.until);
        }
    }

    /// Returns when the silence is too long, or the deadline has come.
    pub(super) async fn over(&mut self, deadline: Instant) {
        loop {
            self.timer.as_mut().await;
            let until = self.until.min(deadline);
            if until <= Instant::now() {
                return;
            }
            self.timer.as_mut().reset(until);
        }
    }
}
