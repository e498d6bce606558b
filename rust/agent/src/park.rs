//! Waiting for a future on a thread that is no part of the runtime: the engine's own.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Instant,
};

struct Unparker(Thread);

impl Wake for Unparker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Sleeps until the future is done or `deadline` has passed; `None` says the latter. The future may wait for channels
/// and tokens, not for a runtime's timers or sockets.
pub(crate) fn wait_until<F: Future>(future: F, deadline: Instant) -> Option<F::Output> {
    let waker = Waker::from(Arc::new(Unparker(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn a_wake_from_another_thread_ends_the_wait() {
        let (sender, receiver) = oneshot::channel();
        let waker = thread::spawn(move || sender.send(7));
        let far = Instant::now() + Duration::from_secs(60);
        assert_eq!(wait_until(receiver, far), Some(Ok(7)));
        assert_eq!(waker.join().unwrap(), Ok(()));
    }

    #[test]
    fn a_deadline_ends_the_wait_and_a_ready_future_beats_it() {
        let (_sender, receiver) = oneshot::channel::<u32>();
        assert_eq!(wait_until(receiver, Instant::now()), None);
        assert_eq!(wait_until(async { 7 }, Instant::now()), Some(7));
    }
}
