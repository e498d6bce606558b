//! The only place that spawns. Every task is joined at shutdown, and CPU work has its own bounded seats.

use std::{sync::Arc, thread};

use orchestra_core::ErrorCode;
use tokio::{sync::Semaphore, task};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::error::ApiError;

/// The router's background tasks. Clones share them.
#[derive(Clone, Debug)]
pub struct Tasks {
    tracker: TaskTracker,
    shutdown: CancellationToken,
    /// One seat per core: more tokenisers at once would only slow each other and the event loop. `None`: there is one
    /// thread for everything.
    blocking_seats: Option<Arc<Semaphore>>,
}

impl Default for Tasks {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            tracker: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            blocking_seats: Some(Arc::new(Semaphore::new(cores))),
        }
    }
}

impl Tasks {
    /// Tasks that never leave the thread of their runtime, so that a simulation has one order of events.
    pub fn on_one_thread() -> Self {
        Self {
            blocking_seats: None,
            ..Self::default()
        }
    }

    /// Runs `task` until it ends. It has to end soon after [`Self::shutdown_token`] is cancelled.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the module that owns every task"
        )]
        tokio::spawn(self.tracker.track_future(task));
    }

    /// Runs work that takes more than about half a millisecond off the event loop. Where the caller goes away, work
    /// that has not begun is not begun.
    pub async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let failed = || ApiError::new(ErrorCode::Internal, "a background computation failed");
        let Some(seats) = &self.blocking_seats else {
            return Ok(work());
        };
        let seat = Arc::clone(seats)
            .acquire_owned()
            .await
            .map_err(|_| failed())?;
        let work = move || {
            let result = work();
            drop(seat);
            result
        };
        task::spawn_blocking(work).await.map_err(|_| failed())
    }

    /// Cancelled when shutdown begins in earnest, after the drain.
    pub fn shutdown_token(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Cancels the token and waits for every task to end.
    pub async fn shut_down(&self) {
        self.shutdown.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}
