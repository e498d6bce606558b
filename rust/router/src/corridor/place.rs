//! Placement: which worker runs a choice, with room reserved on it.

use std::borrow::Cow;

use orchestra_core::{
    ErrorCode, TokenId,
    scheduler::{RouteRequest, SchedulerError, WorkerId},
};

use super::{admit::Ticket, tokenise::CheckedRequest};
use crate::{error::ApiError, workers::Placement};

/// When a request that found no worker may try again.
const RETRY_AFTER_MS: u64 = 1000;

/// A request with a worker for each of its choices.
pub(super) struct Placed {
    pub(super) ticket: Ticket,
    pub(super) placements: Vec<Placement>,
}

impl Ticket {
    /// Chooses a worker for each choice.
    pub(super) fn place(self) -> Result<Placed, ApiError> {
        let request = &self.request;
        let placements = (0..request.n)
            .map(|_| request.place(&[], &[]))
            .collect::<Result<_, _>>();
        match placements {
            Ok(placements) => Ok(Placed {
                ticket: self,
                placements,
            }),
            Err(error) => Err(request.placement_error(&error)),
        }
    }
}

impl CheckedRequest {
    /// Chooses a worker for a choice that has produced `output` so far.
    pub(super) fn place(
        &self,
        output: &[TokenId],
        exclude: &[WorkerId],
    ) -> Result<Placement, SchedulerError> {
        let token_ids: Cow<'_, [TokenId]> = if output.is_empty() {
            Cow::Borrowed(&self.prompt_token_ids)
        } else {
            Cow::Owned([&self.prompt_token_ids, output].concat())
        };
        let route = RouteRequest {
            model: &self.model.name,
            token_ids: &token_ids,
            max_tokens: self.sampling.max_tokens.saturating_sub(output.len() as u32),
            salt: &self.cache_salt,
            exclude,
            ..RouteRequest::default()
        };
        let workers = &self.state.workers;
        if self.record.wants_explanation() {
            self.record.explained(workers.explain(&route));
        }
        workers.place(&route, self.state.now())
    }

    /// Why there is no worker, in the client's words.
    pub(super) fn placement_error(&self, error: &SchedulerError) -> ApiError {
        match error {
            SchedulerError::ContextTooLong { .. } | SchedulerError::KvTooLarge { .. } => ApiError {
                param: Some(self.prompt_field.to_owned()),
                ..ApiError::new(ErrorCode::ContextTooLong, error.to_string())
            },
            // The model is known, so its workers are away.
            SchedulerError::ModelNotFound
            | SchedulerError::NoWorkers { .. }
            | SchedulerError::UnknownWorker => ApiError::new(
                ErrorCode::NoWorkers,
                "no worker of this model takes requests now",
            )
            .retry_after_ms(RETRY_AFTER_MS),
            SchedulerError::NotServed { .. }
            | SchedulerError::DeadlineExceeded
            | SchedulerError::DeadlineHopeless { .. } => {
                ApiError::new(error.code(), error.to_string())
            }
            SchedulerError::LimitReached { .. }
            | SchedulerError::QueueFull { .. }
            | SchedulerError::Displaced { .. } => {
                ApiError::new(ErrorCode::QueueFull, error.to_string())
                    .retry_after_ms(RETRY_AFTER_MS)
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
}
