//! A request on one engine: from the placement to the end of its answer, or to its failure.

use std::{future::poll_fn, sync::Arc};

use axum::http::{HeaderMap, HeaderValue, header};
use bytes::{Bytes, BytesMut};
use orchestra_core::{scheduler::WorkerId, step::FinishReason};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use super::{admit::Admitted, answer::Whole, events::Usage, held::Held, read::RelayRequest};
use crate::{
    engines::{
        Completed, EngineWorker, Verdict,
        engine::{Outgoing, SendError},
        wire::{Head, WireError},
    },
    metrics::{ABANDONED, ANSWERED, STOPPED},
    state::RouterState,
    workers::queue::Reserved,
};

/// The longest answer that is taken in whole.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// What an engine answered.
pub(super) enum Reply {
    /// All of it, and it is an answer.
    Whole(Whole),
    /// The beginning of a stream of events.
    Events(Run),
}

/// Why an engine gave no answer.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    /// Its own words.
    pub(super) answer: Option<Box<Whole>>,
}

/// The kinds of failures, as metrics name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FailureKind {
    /// It could not be reached.
    Connect,
    /// The connection broke, or ended before the answer did.
    Broken,
    /// It was silent for too long.
    Timeout,
    /// It answered with an error of its own.
    Status,
    /// Its answer is not what was asked for.
    Garbage,
    /// It was taken off the router.
    Removed,
}

impl FailureKind {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Broken => "broken",
            Self::Timeout => "timeout",
            Self::Status => "status",
            Self::Garbage => "garbage",
            Self::Removed => "removed",
        }
    }

    const fn verdict(self) -> Verdict {
        match self {
            Self::Connect | Self::Broken => Verdict::Unreachable,
            Self::Timeout | Self::Status | Self::Garbage => Verdict::Failed,
            Self::Removed => Verdict::Nothing,
        }
    }
}

impl From<FailureKind> for Failure {
    fn from(kind: FailureKind) -> Self {
        Self { kind, answer: None }
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Unreachable => FailureKind::Connect.into(),
            SendError::Wire(error) => error.into(),
        }
    }
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Io(_) | WireError::Closed => FailureKind::Broken.into(),
            WireError::Malformed(_) => FailureKind::Garbage.into(),
        }
    }
}

/// A request on an engine. Dropping it closes the connection, which tells the engine, and gives its room back.
pub(super) struct Run {
    state: Arc<RouterState>,
    pub(super) worker: Arc<EngineWorker>,
    pub(super) reserved: Reserved,
    /// The connection is in it, where others can take it away.
    held: Arc<Held>,
    /// Cancelled when it has to leave the engine.
    pub(super) lost: CancellationToken,
    is_prefilled: bool,
    /// Output tokens of the answer that came from others.
    tokens_before: u32,
    verdict: Verdict,
    /// As metrics name it.
    outcome: &'static str,
}

impl Run {
    /// Begins on the engine that was chosen; `None` where that takes no requests in this moment.
    pub(super) fn begin(
        admitted: &Admitted,
        worker: Arc<EngineWorker>,
        reserved: Reserved,
    ) -> Option<Self> {
        let state = &admitted.state;
        if !state.engine_begin(&worker.engine) {
            return None;
        }
        worker.engine.series.running.inc();
        let lost = worker.engine.lost();
        Some(Self {
            lost,
            state: Arc::clone(state),
            worker,
            reserved,
            held: Arc::clone(&admitted.held),
            is_prefilled: false,
            tokens_before: 0,
            verdict: Verdict::Nothing,
            outcome: ABANDONED,
        })
    }

    pub(super) fn worker_id(&self) -> WorkerId {
        self.worker.id
    }

    /// The engine did what it should.
    pub(super) fn succeed(&mut self) {
        (self.verdict, self.outcome) = (Verdict::Fine, ANSWERED);
    }

    /// The answer is complete: what was cached is compared with what was taken to be.
    pub(super) fn account(&self, request: &RelayRequest, usage: Option<Usage>) {
        let details = usage.and_then(|usage| usage.prompt_tokens_details);
        let completed = Completed {
            prompt_tokens: usage.map_or(request.key.len() as u32, |usage| usage.prompt_tokens),
            predicted: self.reserved.predicted_cached_tokens(),
            reported: details.and_then(|details| details.cached_tokens),
            has_usage: usage.is_some(),
        };
        self.worker
            .caching
            .completed(completed, self.state.clock.now());
    }

    /// What an answer in one piece cost. Of a stream, its events say it.
    fn count(&self, request: &RelayRequest, usage: Usage) {
        let details = usage.prompt_tokens_details;
        let cached = details.and_then(|details| details.cached_tokens);
        let cached = cached.unwrap_or(0);
        let metrics = &self.state.metrics;
        metrics.prompt_tokens.inc_by(usage.prompt_tokens.into());
        metrics.prefix_cache_hit_tokens.inc_by(cached.into());
        metrics
            .generation_tokens
            .inc_by(usage.completion_tokens.into());
        let record = &request.record;
        record.prompt(usage.prompt_tokens as usize);
        record.cached(0, cached);
        record.finished(FinishReason::Stop, usage.completion_tokens);
        request.output_ended(&self.state, usage.completion_tokens);
    }

    /// The answer goes on here, behind so many output tokens of other engines.
    pub(super) const fn begins_behind(&mut self, num_tokens: u32) {
        self.tokens_before = num_tokens;
    }

    /// The answer has so many output tokens now. Its tenant is charged for those of this engine.
    pub(super) const fn produced(&mut self, num_tokens: u32) {
        let own = num_tokens.saturating_sub(self.tokens_before);
        self.reserved.set_num_output_tokens(own);
    }

    /// It was stopped for a more urgent request, which is no fault of the engine's.
    pub(super) fn stop(&mut self) {
        (self.verdict, self.outcome) = (Verdict::Nothing, STOPPED);
    }

    /// An event came, so the prompt is computed.
    pub(super) fn prefilled(&mut self) {
        if !std::mem::replace(&mut self.is_prefilled, true) {
            self.reserved.prefill().done();
        }
    }

    /// Why it has to leave the engine.
    pub(super) fn loss(&self) -> FailureKind {
        if self.worker.engine.removed.is_cancelled() {
            FailureKind::Removed
        } else {
            FailureKind::Timeout
        }
    }

    /// The engine did not.
    pub(super) fn fail(&mut self, failure: &Failure) {
        (self.verdict, self.outcome) = (failure.kind.verdict(), failure.kind.as_str());
    }

    /// Sends the request and reads the answer: all of it, or where it is a stream its head.
    pub(super) async fn exchange(
        mut self,
        admitted: &Admitted,
        body: &Bytes,
    ) -> Result<Reply, (Failure, WorkerId)> {
        let limits = &self.state.engines.limits;
        let limit = if admitted.request.checked.stream {
            limits.ttft_timeout
        } else {
            limits.answer_timeout
        };
        let until = (Instant::now() + limit).min(admitted.deadline);
        let lost = self.lost.clone();
        let answered = tokio::select! {
            biased;
            answered = time::timeout_at(until, self.answer(admitted, body)) => {
                answered.unwrap_or_else(|_| Err(FailureKind::Timeout.into()))
            }
            () = lost.cancelled() => Err(self.loss().into()),
        };
        match answered {
            Ok(Some(whole)) => Ok(Reply::Whole(whole)),
            Ok(None) => Ok(Reply::Events(self)),
            Err(failure) => {
                self.fail(&failure);
                Err((failure, self.worker_id()))
            }
        }
    }

    /// `None` where the answer is a stream that was asked for.
    async fn answer(
        &mut self,
        admitted: &Admitted,
        body: &Bytes,
    ) -> Result<Option<Whole>, Failure> {
        let request = &admitted.request;
        let outgoing = Outgoing {
            method: "POST",
            path: request.route.path(),
            headers: request.outward.lines(),
            body,
        };
        let engine = &self.worker.engine;
        let connect_timeout = self.state.engines.limits.connect_timeout;
        let (head, connection) = engine.send(&outgoing, connect_timeout).await?;
        engine.hear(self.state.clock.now());
        self.held.connect(connection);
        let is_fine = (200..300).contains(&head.status);
        if is_fine && request.checked.stream && is_event_stream(&head.headers) {
            return Ok(None);
        }
        let whole = self.read_whole(head).await?;
        let (is_json, usage) = whole.read();
        if is_fine && !is_json {
            return Err(FailureKind::Garbage.into());
        }
        // A request that this engine refuses is refused by the next one too. What says that the engine is ill, or is not
        // the one that it was, is not.
        if matches!(whole.status, 401 | 403..=405 | 408 | 429 | 500..) || whole.status < 200 {
            return Err(Failure {
                kind: FailureKind::Status,
                answer: Some(Box::new(whole)),
            });
        }
        self.succeed();
        self.account(request, usage);
        if let Some(usage) = usage {
            self.count(request, usage);
            self.produced(usage.completion_tokens);
        }
        Ok(Some(whole))
    }

    async fn read_whole(&mut self, head: Head) -> Result<Whole, Failure> {
        let mut body = BytesMut::with_capacity(head.length.unwrap_or(0).min(1 << 20) as usize);
        while self.read(&mut body).await? {
            if body.len() > ANSWER_BYTES_MAX {
                return Err(FailureKind::Garbage.into());
            }
        }
        self.put_back();
        Ok(Whole {
            status: head.status,
            headers: head.headers,
            body: body.freeze(),
        })
    }

    /// Appends what comes next of the answer; false at its end. Dropping the future loses nothing.
    pub(super) async fn read(&mut self, out: &mut BytesMut) -> Result<bool, WireError> {
        poll_fn(|cx| self.held.poll_read(cx, out)).await
    }

    /// The engine sent something in time.
    pub(super) fn hear(&self) {
        self.worker.engine.hear(self.state.clock.now());
    }

    /// The answer was read to its end: the connection may carry the next request.
    pub(super) fn put_back(&mut self) {
        if let Some(connection) = self.held.disconnect() {
            self.worker.engine.put_back(connection);
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.held.withdraw();
        drop(self.held.disconnect());
        let engine = &self.worker.engine;
        engine.series.running.dec();
        self.state.engine_end(engine, self.verdict);
        self.state.metrics.engines.attempt(self.outcome);
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let media_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    media_type.is_some_and(|media_type| media_type.starts_with(b"text/event-stream"))
}
