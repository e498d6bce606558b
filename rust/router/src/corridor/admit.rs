//! Admission: a request waits for a seat and for a worker with room, in the core's queue (`docs/admission.md`).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use orchestra_core::RejectReason;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::tokenise::{CheckedRequest, Tokenised};
use crate::{
    error::ApiError,
    metrics::{InFlight, Metrics},
    workers::queue::Admitted,
};

/// Whether requests are taken, and which are here.
pub(crate) struct Admission {
    is_draining: AtomicBool,
    /// One token per request that waits or runs.
    present: TaskTracker,
    pub(super) requests_waiting: Gauge,
}

/// A request that may start: it has a seat, and room for its first choice.
pub(super) struct Ticket {
    pub(super) request: CheckedRequest,
    pub(super) admitted: Admitted,
    pub(super) presence: Presence,
    /// In `requests_waiting` until dispatch.
    pub(super) waiting: InFlight,
    pub(super) entered: Instant,
}

/// A request is here until this drops; a drain waits for it.
pub(super) struct Presence {
    _token: TaskTrackerToken,
}

impl Admission {
    pub(crate) fn new(metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self {
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

    /// Returns when no request waits or runs any more.
    pub(crate) async fn drained(&self) {
        self.present.wait().await;
    }

    /// Counts a request in. Refused once a drain has begun.
    pub(super) fn enter(&self) -> Result<Presence, RejectReason> {
        // The token first: a drain that begins between the two waits for this one.
        let token = self.present.token();
        self.check()?;
        Ok(Presence { _token: token })
    }

    /// Refuses what [`Self::enter`] would refuse now.
    pub(super) fn check(&self) -> Result<(), RejectReason> {
        if self.is_draining() {
            return Err(RejectReason::ShuttingDown);
        }
        Ok(())
    }
}

impl Tokenised {
    /// Waits for a seat, and for a worker with room for the first choice.
    pub(super) async fn admit(self) -> Result<Ticket, ApiError> {
        let request = self.0;
        let state = Arc::clone(&request.state);
        let presence = state.admission.enter()?;
        let waiting = InFlight::new(&state.admission.requests_waiting);
        let entered = Instant::now();
        let route = request.route(&request.prompt_token_ids, 0, &[]);
        state.workers.explain_to(&request.record, &route);
        let admitted = state.workers.acquire(&route, request.deadline).await;
        match admitted {
            Ok(admitted) => Ok(Ticket {
                request,
                admitted,
                presence,
                waiting,
                entered,
            }),
            Err(error) => Err(request.placement_error(&error)),
        }
    }
}
