//! A stream of events from an engine to a client: as the engine wrote them, whole, and what one read gave in one write.

mod elsewhere;
mod pause;
mod respond;
mod silence;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use orchestra_core::{ErrorCode, step::FinishReason};
use tokio::time::Instant;

pub(super) use self::respond::respond;
use self::{pause::Offered, respond::error_event, silence::Silence};
use super::{
    answer::GiveUp,
    attempts::Attempts,
    events::{self, Events},
    memory::Memory,
    run::{Failure, FailureKind, Run},
    splice::{self, Splice, Spliced},
};
use crate::{error::ApiError, observe::Stage};

/// The event that ends a stream.
const DONE_EVENT: &[u8] = b"data: [DONE]\n\n";

/// A stream on its way.
pub(super) struct EventStream {
    pub(super) attempts: Attempts,
    pub(super) run: Option<Run>,
    events: Events,
    pub(super) memory: Memory,
    silence: Silence,
    /// The client has the first event.
    has_begun: bool,
    /// Why the engine's stream broke, behind events that are good.
    broken: Option<Failure>,
    /// Joins a continuation to what was there before.
    splice: Option<Splice>,
    /// The last words on usage have to be ours.
    owes_usage: bool,
    /// The present part of the answer may be stopped for more urgent requests.
    offered: Option<Offered>,
    num_pauses: u32,
    is_over: bool,
}

impl EventStream {
    pub(super) fn new(attempts: Attempts, run: Run) -> Self {
        let limits = &attempts.admitted.state.engines.limits;
        let mut stream = Self {
            events: Events::default(),
            memory: Memory::new(attempts.admitted.request.checked.num_choices),
            silence: Silence::new(limits.ttft_timeout),
            run: Some(run),
            has_begun: false,
            broken: None,
            splice: None,
            owes_usage: false,
            offered: None,
            num_pauses: 0,
            is_over: false,
            attempts,
        };
        stream.offer();
        stream
    }

    /// The next events for the client; `None` behind the last.
    async fn next(&mut self) -> Result<Option<Bytes>, GiveUp> {
        while !self.is_over {
            let read = match self.broken.take() {
                Some(failure) => Err(failure),
                None => self.read().await?,
            };
            match read {
                Ok(events) if events.is_empty() => {}
                Ok(events) => {
                    self.count_first();
                    return Ok(Some(events));
                }
                Err(failure) => {
                    let missing = if self.attempts.admitted.held.withdraw() {
                        self.pause().await?
                    } else if self.memory.is_complete() {
                        self.fail_run(&failure);
                        Some(self.complete())
                    } else {
                        self.go_on_elsewhere(failure).await?
                    };
                    if let Some(events) = missing {
                        return Ok(Some(events));
                    }
                }
            }
        }
        Ok(None)
    }

    /// What the engine sends next, or how it failed. An error where the request as a whole is over.
    async fn read(&mut self) -> Result<Result<Bytes, Failure>, GiveUp> {
        let Some(run) = &mut self.run else {
            return Ok(Err(FailureKind::Broken.into()));
        };
        let lost = run.lost.clone();
        let shutdown = self.attempts.admitted.state.tasks.shutdown_token().clone();
        let deadline = self.attempts.admitted.deadline;
        let is_more = tokio::select! {
            biased;
            read = run.read(&mut self.events.buffer) => match read {
                Ok(is_more) => is_more,
                Err(error) => return Ok(Err(error.into())),
            },
            () = self.silence.over(deadline) => {
                if Instant::now() >= deadline {
                    let message = "the request's time ran out";
                    return Err(GiveUp::Ours(ApiError::new(ErrorCode::DeadlineExceeded, message)));
                }
                return Ok(Err(FailureKind::Timeout.into()));
            }
            () = lost.cancelled() => return Ok(Err(run.loss().into())),
            () = shutdown.cancelled() => {
                let message = "the router is shutting down";
                return Err(GiveUp::Ours(ApiError::new(ErrorCode::ShuttingDown, message)));
            }
        };
        run.hear();
        let limits = &self.attempts.admitted.state.engines.limits;
        self.silence.begin(limits.stall_timeout);
        let taken = if is_more { self.take() } else { self.end() };
        if let Some(run) = &mut self.run {
            run.produced(self.memory.num_tokens());
        }
        self.looked(taken.is_ok());
        Ok(taken)
    }

    /// Looks at the events that have come. Those before one that is no event are good.
    fn take(&mut self) -> Result<Bytes, Failure> {
        let metrics = &self.attempts.admitted.state.metrics;
        let mut except = 0;
        let mut spliced = BytesMut::new();
        while let Some(event) = self.events.next() {
            let Some(data) = events::data(event) else {
                continue;
            };
            let is_done = &*data == events::DONE;
            let is_good = if is_done {
                self.memory.is_complete()
            } else {
                self.memory.take(&data, metrics).is_ok()
            };
            if !is_good {
                except = event.len();
                self.broken = Some(FailureKind::Garbage.into());
                break;
            }
            if is_done {
                self.is_over = true;
                break;
            }
            if let Some(splice) = &mut self.splice {
                match splice.event(&data) {
                    Spliced::Data(event) => splice::write(&event, &mut spliced),
                    Spliced::Nothing => {}
                    Spliced::Stopped(event) => {
                        splice::write(&event, &mut spliced);
                        self.owes_usage = true;
                        break;
                    }
                }
            }
        }
        if self.events.is_too_large() {
            self.broken = Some(FailureKind::Garbage.into());
        }
        let mut events = self.events.take(except);
        if self.owes_usage {
            self.memory.finish(FinishReason::Stop, metrics);
            spliced.extend_from_slice(&self.complete());
            return Ok(spliced.freeze());
        }
        if self.splice.is_some() {
            if self.is_over {
                spliced.extend_from_slice(DONE_EVENT);
            }
            events = spliced.freeze();
        }
        if self.is_over {
            self.finish();
        }
        match self.broken.take() {
            Some(failure) if events.is_empty() => Err(failure),
            failure => {
                self.broken = failure;
                Ok(events)
            }
        }
    }

    /// The engine's stream ended without saying so. It is complete where every choice is.
    fn end(&mut self) -> Result<Bytes, Failure> {
        if !self.memory.is_complete() {
            return Err(FailureKind::Broken.into());
        }
        Ok(self.complete())
    }

    /// The end of a stream that has all of its choices, in our words: the usage where a continuation owes it, `[DONE]`.
    fn complete(&mut self) -> Bytes {
        let mut events = BytesMut::new();
        let request = &self.attempts.admitted.request;
        if self.owes_usage && request.checked.include_usage {
            let usage = self
                .splice
                .as_ref()
                .and_then(|it| it.usage_event(self.memory.num_tokens()));
            if let Some(usage) = usage {
                splice::write(&usage, &mut events);
            }
        }
        events.extend_from_slice(DONE_EVENT);
        self.is_over = true;
        self.finish();
        events.freeze()
    }

    /// Every choice has ended.
    fn finish(&mut self) {
        if let Some(mut run) = self.run.take() {
            run.succeed();
            run.account(&self.attempts.admitted.request, self.memory.usage);
            run.produced(self.memory.num_tokens());
            // The rest of the answer is the end of its framing, which mostly came with the last event.
            if matches!(
                run.read(&mut BytesMut::new()).now_or_never(),
                Some(Ok(false))
            ) {
                run.put_back();
            }
        }
        let admitted = &self.attempts.admitted;
        let metrics = &admitted.state.metrics;
        let elapsed = admitted.request.arrived.elapsed().as_secs_f64();
        metrics.e2e_request_latency.observe(elapsed);
        if let Some(usage) = &self.memory.usage {
            metrics.prompt_tokens.inc_by(usage.prompt_tokens.into());
            let cached = usage
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens);
            metrics
                .prefix_cache_hit_tokens
                .inc_by(cached.unwrap_or(0).into());
            let record = &admitted.request.record;
            record.prompt(usage.prompt_tokens as usize);
            record.cached(0, cached.unwrap_or(0));
        }
        // The usage of a continuation is of its own part.
        let reported = self.memory.usage.filter(|_| self.splice.is_none());
        let reported = reported.map(|usage| usage.completion_tokens);
        let completion_tokens = reported.unwrap_or(self.memory.num_tokens());
        metrics.generation_tokens.inc_by(completion_tokens.into());
        let request = &admitted.request;
        request
            .record
            .finished(FinishReason::Stop, completion_tokens);
        request.output_ended(&admitted.state, completion_tokens);
    }

    fn count_first(&mut self) {
        if let Some(run) = &mut self.run {
            run.prefilled();
        }
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let admitted = &self.attempts.admitted;
        let elapsed = admitted.request.arrived.elapsed().as_secs_f64();
        admitted.state.metrics.time_to_first_token.observe(elapsed);
        admitted.request.record.reached(Stage::FirstToken);
    }

    /// The error as the last event.
    fn fail(&mut self, reason: GiveUp) -> Bytes {
        self.is_over = true;
        let metrics = &self.attempts.admitted.state.metrics;
        let error = reason.into_error();
        let record = &self.attempts.admitted.request.record;
        record.failed(error.code);
        for choice in self.memory.choices.iter().filter(|it| !it.is_finished) {
            record.finished(FinishReason::Error, choice.num_tokens);
        }
        self.memory.finish(FinishReason::Error, metrics);
        error_event(&error)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if self.has_begun {
            let metrics = &self.attempts.admitted.state.metrics;
            self.memory.finish(FinishReason::Abort, metrics);
        }
    }
}
