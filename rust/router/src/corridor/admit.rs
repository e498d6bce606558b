//! Admission: how many requests run, how many may wait, and for how long.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use orchestra_core::{ErrorCode, RejectReason};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{self, Instant},
};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::tokenise::{CheckedRequest, Tokenised};
use crate::{
    error::ApiError,
    metrics::{InFlight, Metrics},
    state::CorridorLimits,
};

/// Seats for running requests, and the queue before them: first come, first served.
pub(crate) struct Admission {
    seats: Arc<Semaphore>,
    queued: AtomicUsize,
    max_queued: usize,
    is_draining: AtomicBool,
    /// One token per request that is queued or seated.
    present: TaskTracker,
    requests_waiting: Gauge,
}

/// A request that has a seat.
pub(super) struct Ticket {
    pub(super) request: CheckedRequest,
    pub(super) seat: Seat,
    /// In `requests_waiting` until dispatch.
    pub(super) waiting: InFlight,
    pub(super) admitted: Instant,
}

/// One of the seats for running requests, given back on drop.
pub(super) struct Seat {
    _permit: OwnedSemaphorePermit,
    _present: TaskTrackerToken,
}

impl Admission {
    pub(crate) fn new(limits: &CorridorLimits, metrics: &Metrics) -> Arc<Self> {
        let seats = limits.max_concurrent_requests.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            seats: Arc::new(Semaphore::new(seats)),
            queued: AtomicUsize::new(0),
            max_queued: limits.max_queued_requests,
            is_draining: AtomicBool::new(false),
            present: TaskTracker::new(),
            requests_waiting: metrics.requests_waiting.clone(),
        })
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    pub(crate) fn begin_drain(&self) {
        self.is_draining.store(true, Ordering::Release);
        self.present.close();
    }

    /// Returns when no request is queued or seated any more.
    pub(crate) async fn drained(&self) {
        self.present.wait().await;
    }

    /// Refuses what [`Self::seat`] would refuse now. Costs nothing, so it comes before work on the request.
    pub(super) fn check(&self) -> Result<(), RejectReason> {
        if self.is_draining() {
            return Err(RejectReason::ShuttingDown);
        }
        let queued = self.queued.load(Ordering::Relaxed);
        if self.seats.available_permits() == 0 && queued >= self.max_queued {
            return Err(RejectReason::QueueFull {
                current: queued,
                limit: self.max_queued,
            });
        }
        Ok(())
    }

    /// Waits for a seat, at most until `deadline`. Dropping the future leaves the queue at once.
    pub(super) async fn seat(&self, deadline: Instant) -> Result<Seat, RejectReason> {
        let present = self.present.token();
        self.check()?;
        let permit = if let Ok(permit) = Arc::clone(&self.seats).try_acquire_owned() {
            permit
        } else {
            let _place = self.enter_queue()?;
            let acquired = Arc::clone(&self.seats).acquire_owned();
            match time::timeout_at(deadline, acquired).await {
                Ok(Ok(permit)) => permit,
                // The semaphore is never closed, so it is time that ran out.
                Ok(Err(_)) | Err(_) => return Err(RejectReason::DeadlineExceeded),
            }
        };
        Ok(Seat {
            _permit: permit,
            _present: present,
        })
    }

    fn enter_queue(&self) -> Result<QueuePlace<'_>, RejectReason> {
        let queued = self.queued.fetch_add(1, Ordering::Relaxed);
        let place = QueuePlace(&self.queued);
        if queued >= self.max_queued {
            drop(place);
            return Err(RejectReason::QueueFull {
                current: queued,
                limit: self.max_queued,
            });
        }
        Ok(place)
    }
}

/// One more in the queue until it drops.
struct QueuePlace<'a>(&'a AtomicUsize);

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Tokenised {
    /// Waits for a seat.
    pub(super) async fn admit(self) -> Result<Ticket, ApiError> {
        let request = self.0;
        let admission = Arc::clone(&request.state.admission);
        let waiting = InFlight::new(&admission.requests_waiting);
        let admitted = Instant::now();
        match admission.seat(request.deadline).await {
            Ok(seat) => Ok(Ticket {
                request,
                seat,
                waiting,
                admitted,
            }),
            Err(RejectReason::DeadlineExceeded) => Err(ApiError::new(
                ErrorCode::DeadlineExceeded,
                "the request's time ran out in the queue",
            )),
            Err(reason) => Err(reason.into()),
        }
    }
}
