//! Token replay: a choice whose worker is lost goes on elsewhere, from its prompt and the tokens so far, with the same
//! seed. The client sees a pause.
//!
//! Tokens are delivered once and in order: the events of a sequence and the news of its loss come through one channel,
//! so whatever the lost worker sent is taken in before the replay begins, and the new worker's tokens have to continue
//! at exactly that index.
//!
//! A worker that *refuses* a choice of a request which has begun (its queue is full) is asked again after a pause, for as long as
//! a choice waits for a worker: what a client has half of is not given up because everybody is busy.

use std::time::Duration;

use orchestra_core::ErrorCode;
use tokio::time::Instant;

use super::{choice::Choice, stream::Running};
use crate::error::ApiError;

/// When a request may be sent again that the workers refused.
const RETRY_AFTER_MS: u64 = 1000;
/// How long a worker that refused is left alone.
const PAUSE: Duration = Duration::from_millis(100);

/// A choice waits for a worker to continue on.
#[derive(Debug)]
pub(super) struct Wait {
    until: Instant,
    /// When those that refused are asked again.
    again: Option<Instant>,
    /// What the client is told when none comes.
    error: ApiError,
}

impl Wait {
    /// For a worker to come, until then.
    pub(super) const fn until(until: Instant, error: ApiError) -> Self {
        Self {
            until,
            again: None,
            error,
        }
    }
}

/// Why a sequence ended before its time.
#[derive(Debug)]
pub(super) enum Interruption {
    /// The worker is gone.
    Lost,
    /// The worker refused or failed the sequence.
    Failed { code: ErrorCode, message: String },
}

impl Interruption {
    /// What the client is told where no worker continues.
    fn into_error(self) -> ApiError {
        let (code, message) = match self {
            Self::Lost => (ErrorCode::WorkerFailed, String::new()),
            Self::Failed { code, message } => (code, message),
        };
        let error = match code {
            ErrorCode::QueueFull => ApiError::new(code, "the workers' queues are full"),
            ErrorCode::NoWorkers | ErrorCode::ShuttingDown => {
                ApiError::new(ErrorCode::NoWorkers, "no worker could take the request")
            }
            ErrorCode::WorkerFailed | ErrorCode::Internal => {
                let message = "the worker failed and no other could continue the request";
                ApiError::new(ErrorCode::WorkerFailed, message)
            }
            _ => ApiError::new(code, message),
        };
        if error.code.retryable() {
            error.retry_after_ms(RETRY_AFTER_MS)
        } else {
            error
        }
    }

    /// Whether another worker may do better with the same sequence.
    const fn may_replay(&self) -> bool {
        match self {
            Self::Lost => true,
            Self::Failed { code, .. } => {
                code.retryable() || matches!(code, ErrorCode::WorkerFailed | ErrorCode::Internal)
            }
        }
    }

    /// Whether the worker is well and only has no place now.
    const fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Failed {
                code: ErrorCode::QueueFull | ErrorCode::PreemptedOut,
                ..
            }
        )
    }

    /// How long to wait where there is no other worker. One that left is likely to come back, and one that failed or
    /// shuts down is about to leave; one that stays and refuses is not worth a wait.
    const fn patience(&self, limit: Duration) -> Duration {
        match self {
            Self::Lost
            | Self::Failed {
                code: ErrorCode::WorkerFailed | ErrorCode::ShuttingDown,
                ..
            } => limit,
            Self::Failed { .. } => Duration::ZERO,
        }
    }
}

impl Running {
    /// Continues a choice elsewhere, lets it wait, or gives up with the error for the client.
    pub(super) fn interrupt(
        &mut self,
        index: usize,
        interruption: Interruption,
    ) -> Result<(), ApiError> {
        let settings = self.request.state.settings();
        let limits = &settings.limits;
        // Any choice counts: what the client has of the others would be lost too.
        let has_begun = self.choices.iter().any(|choice| !choice.output.is_empty());
        let choice = &mut self.choices[index];
        let worker = self.held.end(index);
        let now = Instant::now();
        let (until, again) = if has_begun && interruption.is_refusal() {
            choice.refused.extend(worker);
            // Bounded by time: however often it is asked for, nothing is computed for it meanwhile.
            let since = *choice.refused_since.get_or_insert(now);
            (since + limits.replay_wait, Some(now + PAUSE))
        } else {
            choice.excluded.extend(worker);
            choice.num_replays += 1;
            (now + interruption.patience(limits.replay_wait), None)
        };
        tracing::debug!(
            ?interruption,
            replays = choice.num_replays,
            "sequence interrupted"
        );
        if !interruption.may_replay() || choice.num_replays > limits.max_replays {
            return Err(interruption.into_error());
        }
        choice.wait = Some(Wait {
            until,
            again,
            error: interruption.into_error(),
        });
        if self.held.is_stopped() {
            // It goes on with the others, once their turn has come.
            return Ok(());
        }
        self.resume_waiting();
        self.check_patience()
    }

    /// Tries to continue every choice that waits for a worker.
    pub(super) fn resume_waiting(&mut self) {
        // Before looking: an arrival from now on wakes again.
        self.arrivals.mark_unchanged();
        for choice in self
            .choices
            .iter_mut()
            .filter(|choice| choice.wait.is_some())
        {
            let placed = self.request.place(&choice.output, &choice.barred());
            let started =
                placed.and_then(|placement| choice.start(&self.request, &self.events, placement));
            match started {
                Ok(sequence) => {
                    self.held.resume(choice.index, sequence);
                    choice.wait = None;
                }
                Err(error) => {
                    tracing::debug!(%error, "no worker to continue on");
                    if let Some(wait) = choice.wait.as_mut().filter(|_| !choice.refused.is_empty())
                    {
                        wait.again.get_or_insert_with(|| Instant::now() + PAUSE);
                    }
                }
            }
        }
        self.offer();
    }

    /// When to look after the choices that wait; `None` where none does.
    pub(super) fn patience_until(&self) -> Option<Instant> {
        self.choices
            .iter()
            .filter_map(|choice| choice.wait.as_ref())
            .map(|wait| wait.again.map_or(wait.until, |again| again.min(wait.until)))
            .min()
    }

    /// Lets the workers that refused be asked again, where their pause is over.
    pub(super) fn ask_again(&mut self) {
        let now = Instant::now();
        for choice in &mut self.choices {
            if let Some(wait) = &mut choice.wait
                && wait.again.is_some_and(|again| again <= now)
            {
                wait.again = None;
                choice.refused.clear();
            }
        }
        self.resume_waiting();
    }

    /// The error of a choice that has waited long enough.
    pub(super) fn check_patience(&self) -> Result<(), ApiError> {
        let now = Instant::now();
        let mut waits = self
            .choices
            .iter()
            .filter_map(|choice: &Choice| choice.wait.as_ref());
        match waits.find(|wait| wait.until <= now) {
            Some(wait) => Err(wait.error.clone()),
            None => Ok(()),
        }
    }
}
