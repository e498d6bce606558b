//! Placement: which worker runs each choice, with room reserved on it.
//!
//! The first choice was placed when the request was admitted; its other choices follow at once. They go before all that
//! wait, because a request that held some of its choices and waited for the others could wait for its like.

use std::{borrow::Cow, time::Duration};

use orchestra_core::{
    ErrorCode, TokenId,
    scheduler::{RouteRequest, SchedulerError, WorkerId},
};
use tokio::time::Instant;

use super::{
    admit::{Presence, Ticket},
    tokenise::CheckedRequest,
};
use crate::{
    error::ApiError,
    metrics::InFlight,
    workers::{
        Placement,
        queue::{Admitted, Seat},
    },
};

/// When a request that was refused may try again: not sooner, so that clients do not hammer, nor later, since a
/// prediction for longer is worth little. Also what is said where nothing is known.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// A request with a worker for each of its choices.
pub(super) struct Placed {
    pub(super) request: CheckedRequest,
    pub(super) placements: Vec<Placement>,
    pub(super) seat: Seat,
    pub(super) presence: Presence,
    /// In `requests_waiting` until dispatch.
    pub(super) waiting: InFlight,
    pub(super) entered: Instant,
}

impl Ticket {
    /// Places the further choices.
    pub(super) fn place(self) -> Result<Placed, ApiError> {
        let Self {
            request,
            admitted: Admitted { reserved, seat },
            presence,
            waiting,
            entered,
        } = self;
        let workers = &request.state.workers;
        let first = match workers.placement(reserved) {
            // Its worker went in this moment.
            Err(SchedulerError::UnknownWorker) => request.place(&[], &[]),
            first => first,
        };
        let further = (1..request.n).map(|_| request.place(&[], &[]));
        let placements = [first].into_iter().chain(further).collect();
        match placements {
            Ok(placements) => Ok(Placed {
                request,
                placements,
                seat,
                presence,
                waiting,
                entered,
            }),
            Err(error) => Err(request.placement_error(&error)),
        }
    }
}

impl CheckedRequest {
    /// Chooses a worker for a choice that has produced `output` so far, before all that wait.
    pub(super) fn place(
        &self,
        output: &[TokenId],
        exclude: &[WorkerId],
    ) -> Result<Placement, SchedulerError> {
        let token_ids = self.token_ids_with(output);
        let route = self.route(&token_ids, output.len(), exclude);
        let workers = &self.state.workers;
        workers.explain_to(&self.record, &route);
        workers.placement(workers.accompany(&route)?)
    }

    /// The prompt, and what came after it so far.
    pub(super) fn token_ids_with(&self, output: &[TokenId]) -> Cow<'_, [TokenId]> {
        if output.is_empty() {
            Cow::Borrowed(&self.prompt_token_ids)
        } else {
            Cow::Owned([&self.prompt_token_ids, output].concat())
        }
    }

    /// What is asked of a worker: these tokens, of which the last `num_output` are output.
    pub(super) fn route<'a>(
        &'a self,
        token_ids: &'a [TokenId],
        num_output: usize,
        exclude: &'a [WorkerId],
    ) -> RouteRequest<'a> {
        RouteRequest {
            model: &self.model.name,
            token_ids,
            max_tokens: self.sampling.max_tokens.saturating_sub(num_output as u32),
            salt: &self.cache_salt,
            exclude,
            ..self.caller.terms()
        }
    }

    /// Why there is no worker, in the client's words.
    pub(super) fn placement_error(&self, error: &SchedulerError) -> ApiError {
        placement_error(error, self.prompt_field)
    }
}

/// When to come again, milliseconds: when there will be a place in the queue, where that is known.
pub(super) fn retry_after_ms(predicted: Option<Duration>) -> u64 {
    let predicted = predicted.unwrap_or(RETRY_AFTER_MIN);
    predicted
        .clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
        .as_millis() as u64
}

/// Whether the model, which is known, has no worker that takes requests now.
pub(super) const fn is_away(error: &SchedulerError) -> bool {
    matches!(
        error,
        SchedulerError::ModelNotFound
            | SchedulerError::NoWorkers { .. }
            | SchedulerError::UnknownWorker
    )
}

/// Why there is no worker for a request with its prompt in this field, in the client's words.
pub(super) fn placement_error(error: &SchedulerError, prompt_field: &str) -> ApiError {
    match error {
        SchedulerError::ContextTooLong { .. } | SchedulerError::KvTooLarge { .. } => ApiError {
            param: Some(prompt_field.to_owned()),
            ..ApiError::new(ErrorCode::ContextTooLong, error.to_string())
        },
        // The model is known, so its workers are away.
        SchedulerError::ModelNotFound
        | SchedulerError::NoWorkers { .. }
        | SchedulerError::UnknownWorker => ApiError::new(
            ErrorCode::NoWorkers,
            "no worker of this model takes requests now",
        )
        .retry_after_ms(retry_after_ms(None)),
        SchedulerError::DeadlineExceeded => ApiError::new(
            ErrorCode::DeadlineExceeded,
            "the request's time ran out in the queue",
        ),
        SchedulerError::NotServed { .. } | SchedulerError::DeadlineHopeless { .. } => {
            ApiError::new(error.code(), error.to_string())
        }
        SchedulerError::LimitReached { .. }
        | SchedulerError::QueueFull { .. }
        | SchedulerError::Displaced { .. } => {
            let after = retry_after_ms(error.retry_after());
            ApiError::new(ErrorCode::QueueFull, error.to_string()).retry_after_ms(after)
        }
        SchedulerError::InvalidField { .. }
        | SchedulerError::DuplicateName { .. }
        | SchedulerError::GangTooLarge { .. }
        | SchedulerError::NoGpuRoom { .. }
        | SchedulerError::PipelineTooLarge { .. }
        | SchedulerError::NoStageRoom { .. }
        | SchedulerError::TooManyBlocks { .. } => {
            ApiError::new(ErrorCode::Internal, "the request could not be placed")
        }
    }
}
