//! A stream of events from an engine to a client: as the engine wrote them, whole, and what one read gave in one write.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::Arc,
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
    resume::Resumption,
    run::{Failure, FailureKind, Reply, Run},
    splice::{self, Splice, Spliced},
};
use crate::{
    engines::{EngineKind, engine::Engine},
    error::ApiError,
    observe::Stage,
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
    /// Joins a continuation to what was there before.
    splice: Option<Splice>,
    /// The last words on usage have to be ours.
    owes_usage: bool,
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
            splice: None,
            owes_usage: false,
            is_over: false,
            attempts,
        }
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
                Err(failure) if self.memory.is_complete() => {
                    self.fail_run(&failure);
                    return Ok(Some(self.complete()));
                }
                Err(failure) => {
                    if let Some(events) = self.go_on_elsewhere(failure).await? {
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
        let reported = self.memory.usage.map(|usage| usage.completion_tokens);
        let completion_tokens = reported.unwrap_or(self.memory.num_tokens());
        metrics.generation_tokens.inc_by(completion_tokens.into());
        let record = &admitted.request.record;
        record.finished(FinishReason::Stop, completion_tokens);
    }

    fn count_first(&mut self) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let admitted = &self.attempts.admitted;
        let elapsed = admitted.request.arrived.elapsed().as_secs_f64();
        admitted.state.metrics.time_to_first_token.observe(elapsed);
        admitted.request.record.reached(Stage::FirstToken);
        if let Some(run) = &self.run {
            run.reserved.prefill().done();
        }
    }

    /// The engine's connection is closed, and the failure counted against it.
    fn fail_run(&mut self, failure: &Failure) {
        if let Some(mut run) = self.run.take() {
            run.fail(failure);
            self.attempts.exclude(run.worker_id());
        }
        self.events = Events::default();
    }

    /// The engine failed in mid-stream: another takes over, or the request is given up. The answer is what the client gets
    /// at once, where it needs no other engine.
    async fn go_on_elsewhere(&mut self, failure: Failure) -> Result<Option<Bytes>, GiveUp> {
        let Some(worker) = self.run.as_ref().map(|run| Arc::clone(&run.worker)) else {
            return Err(GiveUp::NotContinuable);
        };
        self.fail_run(&failure);
        let reply = if self.has_begun {
            let kind = worker.engine.status.lock().kind;
            let resumed = self.resume(kind).await;
            let outcome = match &resumed {
                Ok(_) => "continued",
                Err(GiveUp::NotContinuable) => "not_continuable",
                Err(_) => "failed",
            };
            self.attempts
                .admitted
                .state
                .metrics
                .engines
                .replayed(outcome);
            match resumed? {
                Resumed::Ended(events) => return Ok(Some(events)),
                Resumed::Elsewhere(reply) => reply,
            }
        } else {
            let url = worker.engine.config.url.clone();
            self.attempts.failed(failure, worker.id, url)?;
            self.memory = Memory::new(self.attempts.admitted.request.checked.num_choices);
            self.attempts.exchange().await?
        };
        match reply {
            Reply::Events(run) => {
                let limits = &self.attempts.admitted.state.engines.limits;
                self.silence.begin(limits.ttft_timeout);
                self.run = Some(run);
                Ok(None)
            }
            Reply::Whole(answer) => Err(GiveUp::Theirs(answer, worker.engine.config.url.clone())),
        }
    }

    /// Sends the request on to another engine, with what the client has of the answer.
    async fn resume(&mut self, kind: EngineKind) -> Result<Resumed, GiveUp> {
        let request = &self.attempts.admitted.request;
        if self.memory.is_empty() {
            // Also where there are several choices: the other engine begins anew, and only the names stay.
            self.splice = Some(Splice::new(request.route, &self.memory, &[]));
            let body = request.body.clone();
            let reply = self.attempts.resume(&|_| Some(body.clone())).await?;
            return Ok(Resumed::Elsewhere(reply));
        }
        let resumption = Resumption::new(request, &self.memory).ok_or(GiveUp::NotContinuable)?;
        self.splice = Some(Splice::new(request.route, &self.memory, &resumption.stop));
        if resumption.tokens_left(kind) == Some(0) {
            return Ok(Resumed::Ended(self.end_at_limit()));
        }
        let body_for = |engine: &Engine| {
            let kind = engine.status.lock().kind;
            resumption.body(&engine.config, kind)
        };
        let reply = self.attempts.resume(&body_for).await?;
        Ok(Resumed::Elsewhere(reply))
    }

    /// The engine failed between the last token that there may be and the words that it was the last.
    fn end_at_limit(&mut self) -> Bytes {
        let mut events = BytesMut::new();
        if let Some(splice) = &self.splice {
            splice::write(&splice.last_event("length"), &mut events);
        }
        let metrics = &self.attempts.admitted.state.metrics;
        self.memory.finish(FinishReason::Length, metrics);
        self.owes_usage = true;
        events.extend_from_slice(&self.complete());
        events.freeze()
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

/// The last event of a stream that failed. No `[DONE]` follows it: a client must not take it for an end.
fn error_event(error: &ApiError) -> Bytes {
    log(error);
    let mut event = BytesMut::from(&b"data: "[..]);
    event.extend_from_slice(&json_body(&ErrorBody::from(error)));
    event.extend_from_slice(b"\n\n");
    event.freeze()
}

/// An answer that comes after the status of another one is out.
fn status_gone(answer: Result<Response<Body>, ApiError>) -> ApiError {
    match answer {
        Err(error) => error,
        Ok(response) => {
            let message = format!(
                "the engine answered with status {}",
                response.status().as_u16()
            );
            ApiError::new(ErrorCode::WorkerFailed, message)
        }
    }
}

/// Where a broken stream goes on.
enum Resumed {
    Elsewhere(Reply),
    /// It needs nobody: this is all that was missing.
    Ended(Bytes),
}

/// What became of a request for a stream by the time of its first event.
enum Opened {
    Stream(EventStream, Bytes),
    /// It got another answer, or none.
    Instead(Result<Response<Body>, ApiError>),
}

/// Answers with a stream, once its first event is there: what fails before that has a status of its own. Where it takes
/// longer than the keep-alive interval, the status goes out then.
pub(super) async fn respond(
    attempts: Attempts,
    keep_alive: Duration,
) -> Result<Response<Body>, ApiError> {
    let mut opening: BoxFuture<'static, Opened> = Box::pin(open(attempts));
    let opening = match timeout(keep_alive, opening.as_mut()).await {
        Ok(Opened::Instead(answer)) => return answer,
        Ok(opened) => std::future::ready(opened).boxed(),
        Err(_) => opening,
    };
    let mut response = Response::new(Body::from_stream(write(opening, keep_alive)));
    let headers = response.headers_mut();
    let media_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, media_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks nginx not to collect the stream before it passes it on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

async fn open(mut attempts: Attempts) -> Opened {
    let run = match attempts.exchange().await {
        Ok(Reply::Events(run)) => run,
        Ok(whole) => return Opened::Instead(attempts.finish(whole)),
        Err(reason) => return Opened::Instead(attempts.give_up(reason)),
    };
    let mut stream = EventStream::new(attempts, run);
    match stream.next().await {
        Ok(events) => Opened::Stream(stream, events.unwrap_or_default()),
        Err(reason) => Opened::Instead(stream.attempts.give_up(reason)),
    }
}

/// The body of the answer. The wait for events is never broken off for a comment: it may be on its way to an engine.
fn write(
    mut opening: BoxFuture<'static, Opened>,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream! {
        let opened = loop {
            match timeout(keep_alive, opening.as_mut()).await {
                Ok(opened) => break opened,
                Err(_) => yield Ok(KEEP_ALIVE),
            }
        };
        let (mut stream, events) = match opened {
            Opened::Stream(stream, events) => (stream, events),
            Opened::Instead(answer) => {
                yield Ok(error_event(&status_gone(answer)));
                return;
            }
        };
        let mut events = Ok(Some(events));
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
            let metrics = &self.attempts.admitted.state.metrics;
            self.memory.finish(FinishReason::Abort, metrics);
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
