//! A stream of events from an engine to a client: as the engine wrote them, whole, and what one read gave in one write.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    time::Duration,
};

use async_stream::stream;
use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
};
use bytes::{Bytes, BytesMut};
use futures_core::Stream;
use futures_util::{FutureExt as _, future::BoxFuture};
use orchestra_core::{ErrorCode, step::FinishReason};
use tokio::time::{self, Instant, Sleep, timeout};

use super::{
    answer::GiveUp,
    attempts::Attempts,
    events::{self, Events},
    memory::Memory,
    run::{Failure, FailureKind, Reply, Run},
};
use crate::{
    error::ApiError,
    respond::{ErrorBody, json_body, log},
};

/// A comment: clients skip it, proxies see that the stream is alive.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");
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
    is_over: bool,
}

impl EventStream {
    pub(super) fn new(attempts: Attempts, run: Run) -> Self {
        let limits = &attempts.admitted.state.engines.limits;
        Self {
            events: Events::default(),
            memory: Memory::new(attempts.admitted.request.checked.num_choices),
            silence: Silence::new(limits.ttft_timeout),
            run: Some(run),
            has_begun: false,
            broken: None,
            is_over: false,
            attempts,
        }
    }

    /// Answers with the stream, once its first event is there: what fails before that has a status of its own. Where it
    /// takes longer than the keep-alive interval, the status goes out then.
    pub(super) async fn respond(
        mut self,
        keep_alive: Duration,
    ) -> Result<Response<Body>, ApiError> {
        let mut first: BoxFuture<'static, First> = Box::pin(async move {
            let events = self.next().await;
            (self, events)
        });
        let first = match timeout(keep_alive, first.as_mut()).await {
            Ok((stream, Err(reason))) => return stream.attempts.give_up(reason),
            Ok(ready) => std::future::ready(ready).boxed(),
            Err(_) => first,
        };
        let mut response = Response::new(Body::from_stream(write(first, keep_alive)));
        let headers = response.headers_mut();
        let media_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, media_type);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Asks nginx not to collect the stream before it passes it on.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
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
                Err(failure) => self.go_on_elsewhere(failure).await?,
            }
        }
        Ok(None)
    }

    /// What the engine sends next, or how it failed. An error where the request as a whole is over.
    async fn read(&mut self) -> Result<Result<Bytes, Failure>, GiveUp> {
        let Some(run) = &mut self.run else {
            return Ok(Err(FailureKind::Broken.into()));
        };
        let worker = run.worker.clone();
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
            () = worker.engine.removed.cancelled() => return Ok(Err(FailureKind::Removed.into())),
            () = shutdown.cancelled() => {
                let message = "the router is shutting down";
                return Err(GiveUp::Ours(ApiError::new(ErrorCode::ShuttingDown, message)));
            }
        };
        run.hear();
        let limits = &self.attempts.admitted.state.engines.limits;
        self.silence.begin(limits.stall_timeout);
        Ok(if is_more { self.take() } else { self.end() })
    }

    /// Looks at the events that have come. Those before one that is no event are good.
    fn take(&mut self) -> Result<Bytes, Failure> {
        let metrics = &self.attempts.admitted.state.metrics;
        let mut except = 0;
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
        }
        if self.events.is_too_large() {
            self.broken = Some(FailureKind::Garbage.into());
        }
        let events = self.events.take(except);
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
        self.is_over = true;
        self.finish();
        Ok(Bytes::from_static(DONE_EVENT))
    }

    /// Every choice has ended.
    fn finish(&mut self) {
        if let Some(mut run) = self.run.take() {
            run.succeed();
            run.account(&self.attempts.admitted.request, self.memory.usage);
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
        }
        let num_tokens: u32 = self
            .memory
            .choices
            .iter()
            .map(|choice| choice.num_tokens)
            .sum();
        let reported = self.memory.usage.map(|usage| usage.completion_tokens);
        metrics
            .generation_tokens
            .inc_by(reported.unwrap_or(num_tokens).into());
    }

    fn count_first(&mut self) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let admitted = &self.attempts.admitted;
        let elapsed = admitted.request.arrived.elapsed().as_secs_f64();
        admitted.state.metrics.time_to_first_token.observe(elapsed);
        if let Some(run) = &self.run {
            run.reserved.prefill().done();
        }
    }

    /// The engine failed in mid-stream: another takes over, or the request is given up.
    async fn go_on_elsewhere(&mut self, failure: Failure) -> Result<(), GiveUp> {
        let Some(mut run) = self.run.take() else {
            let message = "the engine failed and no other could continue the request";
            return Err(GiveUp::Ours(ApiError::new(
                ErrorCode::WorkerFailed,
                message,
            )));
        };
        run.fail(&failure);
        let (worker, url) = (run.worker_id(), run.worker.engine.config.url.clone());
        drop(run);
        self.events = Events::default();
        if self.has_begun {
            let message = "the engine failed in mid-stream";
            return Err(GiveUp::Ours(ApiError::new(
                ErrorCode::WorkerFailed,
                message,
            )));
        }
        self.attempts.failed(failure, worker, url)?;
        self.memory = Memory::new(self.attempts.admitted.request.checked.num_choices);
        match self.attempts.exchange().await? {
            Reply::Events(run) => {
                let limits = &self.attempts.admitted.state.engines.limits;
                self.silence.begin(limits.ttft_timeout);
                self.run = Some(run);
                Ok(())
            }
            Reply::Whole(answer) => {
                let message = format!("the engine answered with status {}", answer.status);
                Err(GiveUp::Ours(ApiError::new(
                    ErrorCode::WorkerFailed,
                    message,
                )))
            }
        }
    }

    /// The error as the last event. No `[DONE]` follows it: a client must not take it for an end.
    fn fail(&mut self, reason: GiveUp) -> Bytes {
        self.is_over = true;
        let error = reason.into_error();
        log(&error);
        self.count_unfinished(FinishReason::Error);
        let mut event = BytesMut::from(&b"data: "[..]);
        event.extend_from_slice(&json_body(&ErrorBody::from(&error)));
        event.extend_from_slice(b"\n\n");
        event.freeze()
    }

    fn count_unfinished(&mut self, reason: FinishReason) {
        let metrics = &self.attempts.admitted.state.metrics;
        for choice in self
            .memory
            .choices
            .iter_mut()
            .filter(|choice| !choice.is_finished)
        {
            choice.is_finished = true;
            metrics.finished(reason);
        }
    }
}

/// A stream, and its first events.
type First = (EventStream, Result<Option<Bytes>, GiveUp>);

/// The body of the answer. The wait for events is never broken off for a comment: it may be on its way to an engine.
fn write(
    mut first: BoxFuture<'static, First>,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream! {
        let (mut stream, mut events) = loop {
            match timeout(keep_alive, first.as_mut()).await {
                Ok(first) => break first,
                Err(_) => yield Ok(KEEP_ALIVE),
            }
        };
        loop {
            match events {
                Ok(Some(events)) => yield Ok(events),
                Ok(None) => return,
                Err(reason) => {
                    yield Ok(stream.fail(reason));
                    return;
                }
            }
            let mut next = pin!(stream.next());
            events = loop {
                match timeout(keep_alive, next.as_mut()).await {
                    Ok(events) => break events,
                    Err(_) => yield Ok(KEEP_ALIVE),
                }
            };
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if self.has_begun {
            self.count_unfinished(FinishReason::Abort);
        }
    }
}

/// How long an engine has been silent. Events only move the time; the timer looks when it fires, so that a busy stream
/// does not pay for it with each event.
struct Silence {
    timer: Pin<Box<Sleep>>,
    until: Instant,
}

impl Silence {
    fn new(limit: Duration) -> Self {
        let until = Instant::now() + limit;
        Self {
            timer: Box::pin(time::sleep_until(until)),
            until,
        }
    }

    fn begin(&mut self, limit: Duration) {
        self.until = Instant::now() + limit;
        if self.until < self.timer.deadline() {
            self.timer.as_mut().reset(self.until);
        }
    }

    /// Returns when the silence is too long, or the deadline has come.
    async fn over(&mut self, deadline: Instant) {
        loop {
            self.timer.as_mut().await;
            let until = self.until.min(deadline);
            if until <= Instant::now() {
                return;
            }
            self.timer.as_mut().reset(until);
        }
    }
}
