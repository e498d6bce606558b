//! Admission and placement of a request for foreign engines: the same seats and the same scheduler as the corridor's.

use std::sync::Arc;

use orchestra_core::{
    ErrorCode, RejectReason,
    scheduler::{RouteRequest, SchedulerError, WorkerId},
};
use tokio::time::Instant;

use super::read::RelayRequest;
use crate::{
    corridor::admit::Seat, engines::EngineWorker, error::ApiError, metrics::InFlight,
    state::RouterState, workers::Reserved,
};

/// Output tokens that are reserved where the client sets no limit.
const MAX_TOKENS_UNKNOWN: u32 = 256;
/// When a request that found no engine may try again.
const RETRY_AFTER_MS: u64 = 1000;

/// A request that has a seat.
pub(super) struct Admitted {
    pub(super) state: Arc<RouterState>,
    pub(super) request: Arc<RelayRequest>,
    pub(super) deadline: Instant,
    _seat: Seat,
    _running: InFlight,
}

impl RelayRequest {
    /// Waits for a seat.
    pub(super) async fn admit(self, state: &Arc<RouterState>) -> Result<Admitted, ApiError> {
        let deadline = self.arrived + state.settings().limits.request_timeout;
        let waiting = InFlight::new(&state.metrics.requests_waiting);
        let seat = match state.admission.seat(deadline).await {
            Ok(seat) => seat,
            Err(RejectReason::DeadlineExceeded) => {
                let message = "the request's time ran out in the queue";
                return Err(ApiError::new(ErrorCode::DeadlineExceeded, message));
            }
            Err(reason) => return Err(reason.into()),
        };
        drop(waiting);
        let queue_time = self.arrived.elapsed().as_secs_f64();
        state.metrics.request_queue_time.observe(queue_time);
        Ok(Admitted {
            request: Arc::new(self),
            deadline,
            _seat: seat,
            _running: InFlight::new(&state.metrics.requests_running),
            state: Arc::clone(state),
        })
    }
}

impl Admitted {
    /// Chooses an engine and reserves room on it.
    pub(super) fn place(
        &self,
        exclude: &[WorkerId],
    ) -> Result<(Arc<EngineWorker>, Reserved), SchedulerError> {
        let request = &self.request;
        let route = RouteRequest {
            model: &request.model.name,
            token_ids: &request.key,
            max_tokens: request.checked.max_tokens.unwrap_or(MAX_TOKENS_UNKNOWN),
            salt: &request.checked.cache_salt,
            exclude,
            ..RouteRequest::default()
        };
        let (worker, reserved) = self.state.workers.reserve(&route, self.state.now())?;
        let worker = self.state.engines.worker(worker);
        Ok((worker.ok_or(SchedulerError::UnknownWorker)?, reserved))
    }
}

/// Why there is no engine, in the client's words.
pub(super) fn placement_error(error: &SchedulerError) -> ApiError {
    match error {
        SchedulerError::ContextTooLong { .. } | SchedulerError::KvTooLarge { .. } => ApiError::new(
            ErrorCode::ContextTooLong,
            "the request is too large for every engine of the model",
        ),
        error if error.code() == ErrorCode::QueueFull => {
            ApiError::new(ErrorCode::QueueFull, error.to_string()).retry_after_ms(RETRY_AFTER_MS)
        }
        _ => ApiError::new(
            ErrorCode::NoWorkers,
            "no engine of this model takes requests now",
        )
        .retry_after_ms(RETRY_AFTER_MS),
    }
}
