//! Admission: a request waits for a seat and for a worker with room, in the core's queue (`docs/admission.md`).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use orchestra_core::{
    ErrorCode, RejectReason,
    scheduler::{RouteRequest, SchedulerError},
};
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use rustc_hash::FxHashMap;
use tokio::{
    sync::Semaphore,
    time::{self, Instant},
};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::{
    place::{is_away, retry_after_ms},
    tokenise::{CheckedRequest, Tokenised},
};
use crate::{
    caller::Caller,
    error::ApiError,
    metrics::{InFlight, Metrics},
    state::RouterState,
    tenants::Tenant,
    workers::queue::{Admitted, Outcome},
};

/// Whether requests are taken, and which are here.
pub(crate) struct Admission {
    is_draining: AtomicBool,
    /// One token per request that waits or runs.
    present: TaskTracker,
    /// Requests that are here of each tenant with a limit on them; never 0.
    by_tenant: Mutex<FxHashMap<Arc<str>, u32>>,
    pub(super) requests_waiting: Gauge,
    /// A place for each that may wait for a lost worker to come back.
    expecting: Semaphore,
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

/// A request is here until this drops; a drain waits for it, and its tenant's limit counts it.
pub(super) struct Presence {
    _token: TaskTrackerToken,
    _counted: Option<Counted>,
}

/// A request of a tenant whose requests are counted.
struct Counted {
    admission: Arc<Admission>,
    tenant: Arc<str>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut by_tenant = self.admission.by_tenant.lock();
        if let Some(count) = by_tenant.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                by_tenant.remove(&self.tenant);
            }
        }
    }
}

impl Admission {
    pub(crate) fn new(metrics: &Metrics, max_queued_requests: usize) -> Arc<Self> {
        Arc::new(Self {
            is_draining: AtomicBool::new(false),
            present: TaskTracker::new(),
            by_tenant: Mutex::default(),
            requests_waiting: metrics.requests_waiting.clone(),
            expecting: Semaphore::new(max_queued_requests.min(Semaphore::MAX_PERMITS)),
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

    /// Counts a request of the tenant, where that has a limit; with the limit where it is reached.
    fn count(self: &Arc<Self>, tenant: &Tenant) -> Result<Option<Counted>, u32> {
        let Some(limit) = tenant.max_concurrent_requests else {
            return Ok(None);
        };
        let mut by_tenant = self.by_tenant.lock();
        let count = by_tenant.entry(Arc::clone(&tenant.name)).or_default();
        if *count >= limit {
            return Err(limit);
        }
        *count += 1;
        Ok(Some(Counted {
            admission: Arc::clone(self),
            tenant: Arc::clone(&tenant.name),
        }))
    }
}

impl RouterState {
    /// Waits for a seat, and for a worker with room, at most until the instant.
    pub(super) async fn acquire(&self, route: &RouteRequest<'_>, until: Instant) -> Outcome {
        let outcome = self.acquire_or_expect(route, until).await;
        match &outcome {
            Ok(_) => self.metrics.admission.admitted(route.class),
            Err(SchedulerError::Displaced { .. }) => self.metrics.admission.displaced(route.class),
            Err(_) => {}
        }
        outcome
    }

    /// Where the model has no worker, but lost one a moment ago, waits for one to come and asks again. So wait at most as
    /// many as may wait in the queue, and all for as long as a request that had begun there.
    async fn acquire_or_expect(&self, route: &RouteRequest<'_>, until: Instant) -> Outcome {
        // From before the first look: no arrival is missed.
        let mut arrivals = self.workers.arrivals();
        let mut place = None;
        loop {
            let error = match self.workers.acquire(route, until).await {
                Err(error) if is_away(&error) => error,
                outcome => return outcome,
            };
            let wait = self.settings().limits.replay_wait;
            let Some(expected_by) = self.models.expected_by(route.model, wait) else {
                return Err(error);
            };
            if place.is_none() {
                place = Some(
                    self.admission
                        .expecting
                        .try_acquire()
                        .map_err(|_| error.clone())?,
                );
            }
            let shutdown = self.tasks.shutdown_token();
            tokio::select! {
                biased;
                () = arrivals.changed() => {}
                () = time::sleep_until(until) => return Err(SchedulerError::DeadlineExceeded),
                () = time::sleep_until(expected_by) => return Err(error),
                () = shutdown.cancelled() => return Err(error),
            }
        }
    }

    /// Counts a request of a tenant in, for a model. Refused once a drain has begun, and where the tenant has as many
    /// here as it may.
    pub(super) fn enter(&self, tenant: &Tenant, model: &str) -> Result<Presence, ApiError> {
        // The token first: a drain that begins between the two waits for this one.
        let token = self.admission.present.token();
        if self.admission.is_draining() {
            return Err(RejectReason::ShuttingDown.into());
        }
        let counted = self.admission.count(tenant).map_err(|limit| {
            let message =
                format!("the tenant has {limit} requests here, its max_concurrent_requests");
            let after = retry_after_ms(self.workers.queue_wait(model));
            ApiError::new(ErrorCode::QueueFull, message).retry_after_ms(after)
        })?;
        Ok(Presence {
            _token: token,
            _counted: counted,
        })
    }
}

impl Caller {
    /// By when the first token of a request is wanted that came then and may take until the deadline.
    pub(super) fn first_token_by(&self, arrived: Instant, deadline: Instant) -> Instant {
        let asked = self.ttft_timeout.map(|timeout| arrived + timeout);
        asked.map_or(deadline, |asked| asked.min(deadline))
    }

    /// What a request for room says of who asks.
    pub(super) fn terms(&self) -> RouteRequest<'_> {
        RouteRequest {
            tenant: &self.tenant.name,
            class: self.class(),
            queue_limit: self.tenant.max_queued_requests,
            ..RouteRequest::default()
        }
    }
}

impl Tokenised {
    /// Waits for a seat, and for a worker with room for the first choice.
    pub(super) async fn admit(self) -> Result<Ticket, ApiError> {
        let Self { request, presence } = self;
        let state = Arc::clone(&request.state);
        let waiting = InFlight::new(&state.admission.requests_waiting);
        let entered = Instant::now();
        let until = request
            .caller
            .first_token_by(request.arrived, request.deadline);
        let route = RouteRequest {
            deadline: Some(state.clock.at(until)),
            ..request.route(&request.prompt_token_ids, 0, &[])
        };
        state.workers.explain_to(&request.record, &route);
        match state.acquire(&route, until).await {
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
