//! Admission and placement of a request for foreign engines: the same queue and the same scheduler as the corridor's.

use std::sync::Arc;

use orchestra_core::{
    ErrorCode,
    scheduler::{RouteRequest, SchedulerError, WorkerId},
};
use tokio::time::Instant;

use super::read::RelayRequest;
use crate::{
    corridor::{admit::Presence, place},
    engines::EngineWorker,
    error::ApiError,
    metrics::InFlight,
    observe::Stage,
    state::RouterState,
    workers::queue::{self, Reserved, Seat},
};

/// Output tokens that are reserved where the client sets no limit.
const MAX_TOKENS_UNKNOWN: u32 = 256;

/// A request that has a seat.
pub(super) struct Admitted {
    pub(super) state: Arc<RouterState>,
    pub(super) request: Arc<RelayRequest>,
    pub(super) deadline: Instant,
    /// Room on the engine that is to be tried first.
    first: Option<Reserved>,
    _seat: Seat,
    _presence: Presence,
    _running: InFlight,
}

impl RelayRequest {
    /// Waits for a seat, and for an engine with room.
    pub(super) async fn admit(self, state: &Arc<RouterState>) -> Result<Admitted, ApiError> {
        self.record.model(&self.model.name);
        let caller = &self.caller;
        self.record.caller(&caller.tenant.name, caller.class());
        self.record.reached(Stage::Tokenised);
        let limit = state.settings().limits.request_timeout;
        let timeout = self.caller.timeout.map_or(limit, |asked| asked.min(limit));
        let deadline = self.arrived + timeout;
        let presence = state.enter(&self.caller.tenant, &self.model.name)?;
        let waiting = InFlight::new(&state.admission.requests_waiting);
        let until = self.caller.first_token_by(self.arrived, deadline);
        let route = RouteRequest {
            deadline: Some(state.clock.at(until)),
            ..self.route(&[])
        };
        state.workers.explain_to(&self.record, &route);
        let admitted = state.acquire(&route, until).await;
        let queue::Admitted { reserved, seat } =
            admitted.map_err(|error| self.placement_error(&error))?;
        drop(waiting);
        self.record.reached(Stage::Admitted);
        let queue_time = self.arrived.elapsed().as_secs_f64();
        state.metrics.request_queue_time.observe(queue_time);
        Ok(Admitted {
            request: Arc::new(self),
            deadline,
            first: Some(reserved),
            _seat: seat,
            _presence: presence,
            _running: InFlight::new(&state.metrics.requests_running),
            state: Arc::clone(state),
        })
    }

    /// What is asked of an engine.
    fn route<'a>(&'a self, exclude: &'a [WorkerId]) -> RouteRequest<'a> {
        RouteRequest {
            model: &self.model.name,
            token_ids: &self.key,
            max_tokens: self.checked.max_tokens.unwrap_or(MAX_TOKENS_UNKNOWN),
            salt: &self.checked.cache_salt,
            exclude,
            ..self.caller.terms()
        }
    }

    /// Why there is no engine, in the client's words.
    pub(super) fn placement_error(&self, error: &SchedulerError) -> ApiError {
        let prompt_field = self.route.prompt_field();
        let error = place::placement_error(error, prompt_field);
        match error.code {
            ErrorCode::NoWorkers => ApiError {
                message: "no engine of this model takes requests now".to_owned(),
                ..error
            },
            _ => error,
        }
    }
}

impl Admitted {
    /// An engine with room reserved on it: the one that the queue gave, then others, which are not waited for.
    pub(super) fn place(
        &mut self,
        exclude: &[WorkerId],
    ) -> Result<(Arc<EngineWorker>, Reserved), SchedulerError> {
        let workers = &self.state.workers;
        let first = self.first.take();
        let is_fit = |first: &Reserved| !exclude.contains(&first.worker());
        let reserved = if let Some(first) = first.filter(is_fit) {
            first
        } else {
            let route = self.request.route(exclude);
            workers.explain_to(&self.request.record, &route);
            workers.accompany(&route)?
        };
        let worker = self.state.engines.worker(reserved.worker());
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        let record = &self.request.record;
        let choice = (0, !exclude.is_empty());
        record.placed(choice, &worker.name, reserved.predicted_cached_tokens());
        record.reached(Stage::Dispatched);
        Ok((worker, reserved))
    }
}
