//! Admission and placement of a request for foreign engines: the same queue and the same scheduler as the corridor's.

use std::sync::Arc;

use orchestra_core::{
    ErrorCode,
    scheduler::{RouteRequest, SchedulerError, WorkerId},
};
use tokio::time::{self, Instant};

use super::{held::Held, read::RelayRequest};
use crate::{
    corridor::{admit::Presence, place},
    engines::EngineWorker,
    error::ApiError,
    metrics::InFlight,
    observe::Stage,
    state::RouterState,
    workers::queue::{self, Entered, Reserved},
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
    pub(super) held: Arc<Held>,
    _presence: Presence,
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
            held: Held::new(seat, InFlight::new(&state.metrics.requests_running)),
            _presence: presence,
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

    /// Its answer ended by itself, after so many tokens of all choices: what may wait is planned with that.
    pub(super) fn output_ended(&self, state: &RouterState, num_tokens: u32) {
        let of_each = num_tokens / self.checked.num_choices.max(1);
        state.workers.output_ended(&self.model.name, of_each);
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
    /// Back to the queue with a request that was stopped after so many tokens of its output; returns when its turn has
    /// come. Where no engine takes requests at all it has no seat: whoever continues it waits for an engine.
    pub(super) async fn rejoin(&mut self, num_output_tokens: u32) -> Result<(), ApiError> {
        let request = Arc::clone(&self.request);
        let route = request.route(&[]);
        let left = route.max_tokens.saturating_sub(num_output_tokens);
        let route = RouteRequest {
            max_tokens: left.max(1),
            ..route
        };
        let workers = &self.state.workers;
        workers.explain_to(&request.record, &route);
        let outcome = match workers.rejoin(&route) {
            Ok(Entered::Admitted(admitted)) => Ok(admitted),
            Ok(Entered::Waiting(waiting)) => tokio::select! {
                biased;
                outcome = waiting => outcome,
                () = time::sleep_until(self.deadline) => Err(SchedulerError::DeadlineExceeded),
                () = self.state.tasks.shutdown_token().cancelled() => {
                    let message = "the router is shutting down";
                    return Err(ApiError::new(ErrorCode::ShuttingDown, message));
                }
            },
            Err(error) => Err(error),
        };
        match outcome {
            Ok(queue::Admitted { reserved, seat }) => {
                let running = InFlight::new(&self.state.metrics.requests_running);
                self.held.reseat(seat, running);
                self.first = Some(reserved);
                Ok(())
            }
            Err(error) if place::is_away(&error) => Ok(()),
            Err(error) => Err(request.placement_error(&error)),
        }
    }

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
        record.placed(
            choice,
            &worker.name,
            reserved.predicted_cached_tokens(),
            None,
        );
        record.reached(Stage::Dispatched);
        Ok((worker, reserved))
    }
}
