//! Waiting to within some 50 µs. The runtime's own timer counts whole milliseconds, which is too coarse for a latency
//! that is to be told apart to a tenth of one.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};

/// A kernel timer of the runtime that made it.
pub struct Timer {
    fd: AsyncFd<OwnedFd>,
}

impl Timer {
    /// A timer that nobody waits for yet.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            unsafe_code,
            reason = "tokio has no safe way to wait for a descriptor of one's own"
        )]
        // SAFETY: the descriptor is owned by the `AsyncFd` from here on, so that it stays open while it is registered.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self { fd })
    }

    /// Returns at `when`, at once where that has passed.
    pub async fn until(&self, when: Instant) -> io::Result<()> {
        let left = when.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &once(left))?;
        let read = self.fd.async_io(Interest::READABLE, |fd| {
            Ok(rustix::io::read(fd, &mut [0; 8])?)
        });
        read.await.map(drop)
    }
}

fn once(after: Duration) -> Itimerspec {
    let at = |duration: Duration| Timespec {
        tv_sec: duration.as_secs() as i64,
        tv_nsec: i64::from(duration.subsec_nanos()),
    };
    Itimerspec {
        it_interval: at(Duration::ZERO),
        it_value: at(after),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_timer_never_rings_early_and_can_be_set_again() {
        let timer = Timer::new().unwrap();
        for _ in 0..3 {
            let when = Instant::now() + Duration::from_millis(2);
            timer.until(when).await.unwrap();
            assert!(Instant::now() >= when);
        }
        timer.until(Instant::now()).await.unwrap();
    }
}
