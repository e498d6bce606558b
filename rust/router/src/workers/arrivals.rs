//! News that there may be a worker where there was none.
//!
//! [`tokio::sync::watch`] says the same, but wakes those who wait in an order that it draws. Here it is the order in which
//! they began to wait: fair, and in a simulation the same each time.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Notify;

/// Where the news comes in.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    count: AtomicU64,
    waiting: Notify,
}

impl Arrivals {
    /// There may be a worker: all who wait for one hear of it.
    pub(super) fn announce(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
        self.waiting.notify_waiters();
    }

    /// Hears of what comes from now on.
    pub(super) fn listen(self: &Arc<Self>) -> Listener {
        Listener {
            heard: self.count.load(Ordering::Acquire),
            arrivals: Arc::clone(self),
        }
    }
}

/// Somebody who may wait for a worker.
#[derive(Debug)]
pub(crate) struct Listener {
    arrivals: Arc<Arrivals>,
    heard: u64,
}

impl Listener {
    /// What came so far is known.
    pub(crate) fn mark_unchanged(&mut self) {
        self.heard = self.arrivals.count.load(Ordering::Acquire);
    }

    /// Returns when there is news, at once where it came before. Dropping the future loses nothing.
    pub(crate) async fn changed(&mut self) {
        loop {
            let mut news = pin!(self.arrivals.waiting.notified());
            // In the list before the look, so that nothing comes in between.
            news.as_mut().enable();
            let count = self.arrivals.count.load(Ordering::Acquire);
            if count != self.heard {
                self.heard = count;
                return;
            }
            news.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn news_is_heard_once_by_whoever_listened_before() {
        let arrivals = Arc::new(Arrivals::default());
        let mut early = arrivals.listen();
        assert!(early.changed().now_or_never().is_none());
        arrivals.announce();
        arrivals.announce();
        let mut late = arrivals.listen();
        assert!(early.changed().now_or_never().is_some());
        assert!(early.changed().now_or_never().is_none());
        assert!(late.changed().now_or_never().is_none());
        arrivals.announce();
        late.mark_unchanged();
        assert!(late.changed().now_or_never().is_none());
    }

    #[tokio::test]
    async fn who_waits_longest_hears_first() {
        const LISTENERS: usize = 40;
        let arrivals = Arc::new(Arrivals::default());
        let heard = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..LISTENERS)
            .map(|number| {
                let (mut listener, heard) = (arrivals.listen(), Arc::clone(&heard));
                #[expect(clippy::disallowed_methods, reason = "the test waits for its tasks")]
                tokio::spawn(async move {
                    listener.changed().await;
                    heard.lock().push(number);
                })
            })
            .collect();
        // One turn of the only thread: all of them wait now.
        tokio::task::yield_now().await;
        arrivals.announce();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*heard.lock(), (0..LISTENERS).collect::<Vec<_>>());
    }
}
