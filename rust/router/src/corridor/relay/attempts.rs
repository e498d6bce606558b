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
    answer::GiveUp,
    run::{Failure, FailureKind, Reply, Run},
};
use crate::{
    engines::{EngineUrl, engine::Engine},
    error::ApiError,
};

/// How long to wait before an engine is asked again that has just failed: there is no other.
const SAME_ENGINE_PAUSE: Duration = Duration::from_millis(50);

/// How long until engines are asked again that would not continue an answer.
const REFUSED_PAUSE: Duration = Duration::from_millis(250);

/// What goes to an engine; `None` where it has no means to do what is asked.
type BodyFor<'a> = &'a (dyn Fn(&Engine) -> Option<Bytes> + Send + Sync);

/// The attempts of one request.
pub(super) struct Attempts {
    pub(super) admitted: Admitted,
    /// Engines that failed it.
    excluded: Vec<WorkerId>,
    num_sent: u32,
    /// Engines that have no means to continue the answer, in this round.
    num_unfit: u32,
    /// Times that the answer was, or was to be, continued.
    num_resumptions: u32,
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
            num_sent: 0,
            num_unfit: 0,
            num_resumptions: 0,
            last: None,
        }
    }

    /// Sends the client's own body to one engine after another, until one answers.
    pub(super) async fn exchange(&mut self) -> Result<Reply, GiveUp> {
        let body = self.admitted.request.body.clone();
        self.exchange_bodies(&|_| Some(body.clone())).await
    }

    /// The same with a body for each engine, where that has one.
    async fn exchange_bodies(&mut self, body_for: BodyFor<'_>) -> Result<Reply, GiveUp> {
        loop {
            let run = self.begin().await?;
            let Some(body) = body_for(&run.worker.engine) else {
                self.excluded.push(run.worker_id());
                self.num_unfit += 1;
                continue;
            };
            self.num_sent += 1;
            let url = run.worker.engine.config.url.clone();
            match run.exchange(&self.admitted, &body).await {
                Ok(reply) => return Ok(reply),
                Err((failure, worker)) => self.failed(failure, worker, url)?,
            }
        }
    }

    /// Sends the request on in mid-stream. A client waits for the rest of its answer, so this one does not give up where
    /// nobody takes it at the moment: it tries again, for as long as `replay_wait` says.
    pub(super) async fn resume(&mut self, body_for: BodyFor<'_>) -> Result<Reply, GiveUp> {
        let limits = self.admitted.state.settings().limits.clone();
        self.num_resumptions += 1;
        if self.num_resumptions > limits.max_replays {
            let message = "the engines failed, as often as a request may be continued";
            return Err(GiveUp::Ours(ApiError::new(
                ErrorCode::WorkerFailed,
                message,
            )));
        }
        self.send_on(body_for, limits.replay_wait).await
    }

    /// The request was stopped after so many tokens of its output: waits for its turn, then sends it on.
    pub(super) async fn take_turn(
        &mut self,
        num_output_tokens: u32,
        body_for: BodyFor<'_>,
    ) -> Result<Reply, GiveUp> {
        self.excluded.clear();
        self.last = None;
        let rejoined = self.admitted.rejoin(num_output_tokens).await;
        rejoined.map_err(GiveUp::Ours)?;
        let wait = self.admitted.state.settings().limits.replay_wait;
        self.send_on(body_for, wait).await
    }

    /// Sends the request on to whoever takes it within `wait`.
    async fn send_on(&mut self, body_for: BodyFor<'_>, wait: Duration) -> Result<Reply, GiveUp> {
        let state = Arc::clone(&self.admitted.state);
        let until = (Instant::now() + wait).min(self.admitted.deadline);
        let mut arrivals = state.workers.arrivals();
        loop {
            arrivals.mark_unchanged();
            (self.num_sent, self.num_unfit) = (0, 0);
            let reason = match self.exchange_bodies(body_for).await {
                Ok(reply) => return Ok(reply),
                Err(reason) => reason,
            };
            if Instant::now() >= until {
                return Err(reason);
            }
            if self.num_unfit > 0 && self.num_sent == 0 {
                return Err(GiveUp::NotContinuable);
            }
            tokio::select! {
                biased;
                () = state.tasks.shutdown_token().cancelled() => return Err(reason),
                () = arrivals.changed() => {}
                () = time::sleep_until(until.min(Instant::now() + REFUSED_PAUSE)) => {}
            }
            self.excluded.clear();
        }
    }

    /// Places the request on an engine that takes it.
    async fn begin(&mut self) -> Result<Run, GiveUp> {
        let mut is_again = false;
        loop {
            match self.admitted.place(&self.excluded) {
                Ok((worker, reserved)) => {
                    let id = worker.id;
                    if let Some(run) = Run::begin(&self.admitted, worker, reserved) {
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

    /// The engine failed in mid-stream.
    pub(super) fn exclude(&mut self, worker: WorkerId) {
        self.excluded.push(worker);
    }

    /// Takes a failure in: another attempt may follow, or this was the last.
    pub(super) fn failed(
        &mut self,
        failure: Failure,
        worker: WorkerId,
        url: EngineUrl,
    ) -> Result<(), GiveUp> {
        let state = Arc::clone(&self.admitted.state);
        tracing::debug!(%url, failure = failure.kind.as_str(), attempts = self.num_sent, "engine failed a request");
        self.excluded.push(worker);
        if Instant::now() >= self.admitted.deadline {
            let message = "the request's time ran out";
            return Err(GiveUp::Ours(ApiError::new(
                ErrorCode::DeadlineExceeded,
                message,
            )));
        }
        // An engine that is gone takes no harm from retries, and what ran on it is owed one. So is a client that has the
        // beginning of its answer.
        let is_owed = self.num_resumptions > 0
            || matches!(
                failure.kind,
                FailureKind::Connect | FailureKind::Broken | FailureKind::Removed
            );
        if self.num_sent >= state.engines.limits.max_attempts {
            return Err(give_up(failure, url));
        }
        if !is_owed && !state.engines.take_retry(state.clock.now()) {
            state.metrics.engines.budget_exhausted();
            return Err(give_up(failure, url));
        }
        state.metrics.engines.retried(failure.kind.as_str());
        self.last = Some((failure, url));
        Ok(())
    }

    /// An answer in one piece.
    pub(super) fn finish(&self, reply: Reply) -> Result<Response<Body>, ApiError> {
        let Reply::Whole(answer) = reply else {
            let message = "the engine answered with a stream that nobody asked for";
            return Err(ApiError::new(ErrorCode::WorkerFailed, message));
        };
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
        self.admitted.request.record.finished(reason, 0);
        Ok(answer.into_response())
    }

    /// No answer of any engine.
    pub(super) fn give_up(&self, reason: GiveUp) -> Result<Response<Body>, ApiError> {
        match reason {
            GiveUp::Ours(error) => Err(error),
            GiveUp::NotContinuable => Err(reason.into_error()),
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
