//! Which engine a request goes to, and which one next.
//!
//! A retry needs three things: an attempt that is left, room in the budget of the whole pool, and time. It goes to another
//! engine while there is one. Where the request is given up, the client gets the last engine's own words, if it had any.

use std::{sync::Arc, time::Duration};

use axum::{body::Body, http::Response};
use bytes::Bytes;
use orchestra_core::{ErrorCode, scheduler::WorkerId, step::FinishReason};
use tokio::time::{self, Instant};

use super::{
    admit::Admitted,
    answer::{GiveUp, Whole},
    run::{Failure, FailureKind, Reply, Run},
};
use crate::{engines::EngineUrl, error::ApiError};

/// How long to wait before an engine is asked again that has just failed: there is no other.
const SAME_ENGINE_PAUSE: Duration = Duration::from_millis(50);

/// The attempts of one request.
pub(super) struct Attempts {
    pub(super) admitted: Admitted,
    /// Engines that failed it.
    excluded: Vec<WorkerId>,
    pub(super) num_attempts: u32,
    /// How the last one failed, and where.
    last: Option<(Failure, EngineUrl)>,
}

impl Attempts {
    pub(super) fn new(admitted: Admitted) -> Self {
        let now = admitted.state.clock.now();
        admitted.state.engines.count_request(now);
        Self {
            admitted,
            excluded: Vec::new(),
            num_attempts: 0,
            last: None,
        }
    }

    /// Sends the client's own body to one engine after another, until one answers.
    pub(super) async fn exchange(&mut self) -> Result<Reply, GiveUp> {
        let body = self.admitted.request.body.clone();
        self.exchange_body(&body).await
    }

    /// The same with another body.
    pub(super) async fn exchange_body(&mut self, body: &Bytes) -> Result<Reply, GiveUp> {
        loop {
            let run = self.begin().await?;
            let url = run.worker.engine.config.url.clone();
            match run.exchange(&self.admitted, body).await {
                Ok(reply) => return Ok(reply),
                Err((failure, worker)) => self.failed(failure, worker, url)?,
            }
        }
    }

    /// Places the request on an engine that takes it.
    async fn begin(&mut self) -> Result<Run, GiveUp> {
        let mut is_again = false;
        loop {
            match self.admitted.place(&self.excluded) {
                Ok((worker, reserved)) => {
                    let id = worker.id;
                    if let Some(run) = Run::begin(&self.admitted.state, worker, reserved) {
                        self.num_attempts += 1;
                        return Ok(run);
                    }
                    // Another request is on trial there.
                    self.excluded.push(id);
                }
                // The only engine there is may do better in a moment, unless it has said that it will not.
                Err(_) if !is_again && self.last_was_cut_off() => {
                    is_again = true;
                    self.excluded.clear();
                    time::sleep(SAME_ENGINE_PAUSE).await;
                }
                Err(error) => {
                    return Err(match self.last.take() {
                        Some((failure, url)) => give_up(failure, url),
                        None => GiveUp::Ours(self.admitted.request.placement_error(&error)),
                    });
                }
            }
        }
    }

    fn last_was_cut_off(&self) -> bool {
        let last = self.last.as_ref();
        last.is_some_and(|(failure, _)| {
            matches!(
                failure.kind,
                FailureKind::Connect | FailureKind::Broken | FailureKind::Garbage
            )
        })
    }

    /// Takes a failure in: another attempt may follow, or this was the last.
    pub(super) fn failed(
        &mut self,
        failure: Failure,
        worker: WorkerId,
        url: EngineUrl,
    ) -> Result<(), GiveUp> {
        let state = Arc::clone(&self.admitted.state);
        tracing::debug!(%url, failure = failure.kind.as_str(), attempts = self.num_attempts, "engine failed a request");
        self.excluded.push(worker);
        if Instant::now() >= self.admitted.deadline {
            let message = "the request's time ran out";
            return Err(GiveUp::Ours(ApiError::new(
                ErrorCode::DeadlineExceeded,
                message,
            )));
        }
        let may_retry = self.num_attempts < state.engines.limits.max_attempts
            && state.engines.take_retry(state.clock.now());
        if !may_retry {
            return Err(give_up(failure, url));
        }
        self.last = Some((failure, url));
        Ok(())
    }

    /// An answer in one piece.
    pub(super) fn finish(&self, answer: Whole) -> Response<Body> {
        let metrics = &self.admitted.state.metrics;
        let elapsed = self.admitted.request.arrived.elapsed().as_secs_f64();
        metrics.e2e_request_latency.observe(elapsed);
        let reason = if answer.status < 300 {
            FinishReason::Stop
        } else {
            FinishReason::Error
        };
        for _ in 0..self.admitted.request.checked.num_choices {
            metrics.finished(reason);
        }
        answer.into_response()
    }

    /// No answer of any engine.
    pub(super) fn give_up(&self, reason: GiveUp) -> Result<Response<Body>, ApiError> {
        match reason {
            GiveUp::Ours(error) => Err(error),
            theirs @ GiveUp::Theirs(..) => {
                for _ in 0..self.admitted.request.checked.num_choices {
                    self.admitted.state.metrics.finished(FinishReason::Error);
                }
                Ok(theirs.into_response())
            }
        }
    }
}

fn give_up(failure: Failure, url: EngineUrl) -> GiveUp {
    let ours = |code, message: &str| GiveUp::Ours(ApiError::new(code, message));
    match (failure.answer, failure.kind) {
        // Our key was refused, or the engine does not know the route: nothing that the client could mend.
        (Some(answer), _) if matches!(answer.status, 401 | 403 | 405) || answer.status < 200 => {
            ours(
                ErrorCode::WorkerFailed,
                "the engine refuses this router's requests",
            )
        }
        (Some(answer), _) => GiveUp::Theirs(answer, url),
        (None, FailureKind::Connect | FailureKind::Removed) => GiveUp::Ours(
            ApiError::new(
                ErrorCode::NoWorkers,
                "no engine of this model can be reached",
            )
            .retry_after_ms(1000),
        ),
        (None, FailureKind::Timeout) => {
            ours(ErrorCode::WorkerFailed, "the engine did not answer in time")
        }
        (None, FailureKind::Broken | FailureKind::Garbage | FailureKind::Status) => ours(
            ErrorCode::WorkerFailed,
            "the engine failed and no other could take the request",
        ),
    }
}
