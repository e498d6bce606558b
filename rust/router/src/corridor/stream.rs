//! The stream of a running request: events of its sequences in, chunks for the client out.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use futures_util::stream;
use orchestra_core::{ErrorCode, SamplingParams, TokenId, step::FinishReason};
use tokio::{
    sync::{mpsc, oneshot},
    time::{self, Instant},
};

use super::{
    choice::{Choice, Output},
    held::Held,
    pause::turn_of,
    replay::Interruption,
    tokenise::CheckedRequest,
};
use crate::{
    error::ApiError,
    models::ModelEntry,
    request::Chunk,
    workers::{
        arrivals::Listener,
        queue::Waiting,
        sink::{EventKind, SequenceEvent},
    },
};

/// What a request produces: chunks of its choices in any interleaving, one with `finish` per choice; or an error, which
/// is then the last item. Dropping it ends every sequence on its worker at once.
pub struct TokenStream {
    request: Arc<CheckedRequest>,
    chunks: Pin<Box<dyn Stream<Item = Result<Chunk, ApiError>> + Send>>,
}

impl TokenStream {
    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        self.request.prompt_token_ids.len() as u32
    }

    /// The prompt, with the special tokens that the tokeniser or the template added.
    pub fn prompt_token_ids(&self) -> &[TokenId] {
        &self.request.prompt_token_ids
    }

    /// The model that answers.
    pub fn model(&self) -> &ModelEntry {
        &self.request.model
    }

    /// The sampling in effect: the client's over the model's over the defaults. The seed is the first choice's.
    pub fn sampling(&self) -> &SamplingParams {
        &self.request.sampling
    }
}

impl Stream for TokenStream {
    type Item = Result<Chunk, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.chunks.as_mut().poll_next(cx)
    }
}

/// A request whose sequences run.
pub(super) struct Running {
    pub(super) request: Arc<CheckedRequest>,
    pub(super) choices: Vec<Choice>,
    /// Kept for replays.
    pub(super) events: mpsc::Sender<SequenceEvent>,
    pub(super) arrivals: Listener,
    pub(super) held: Arc<Held>,
    /// Where the request was stopped: its place in the queue.
    pub(super) turn: Option<Waiting>,
    /// How often it gave way to more urgent ones.
    pub(super) num_pauses: u32,
    pub(super) inbox: mpsc::Receiver<SequenceEvent>,
    /// Why the guard of `held` ended the request.
    over: oneshot::Receiver<ApiError>,
    has_failed: bool,
}

impl Running {
    pub(super) fn new(
        request: CheckedRequest,
        choices: Vec<Choice>,
        held: Arc<Held>,
        (events, inbox): (mpsc::Sender<SequenceEvent>, mpsc::Receiver<SequenceEvent>),
    ) -> Self {
        let state = &request.state;
        let (stream, over) = oneshot::channel();
        let shutdown = state.tasks.shutdown_token().clone();
        state
            .tasks
            .spawn(Arc::clone(&held).guard(stream, request.deadline, shutdown));
        Self {
            choices,
            events,
            arrivals: state.workers.arrivals(),
            held,
            turn: None,
            num_pauses: 0,
            inbox,
            over,
            has_failed: false,
            request: Arc::new(request),
        }
    }

    /// The chunks as a stream that owns the request.
    pub(super) fn stream(self) -> TokenStream {
        let request = Arc::clone(&self.request);
        let chunks = stream::unfold(Some(Box::new(self)), |running| async move {
            let mut running = running?;
            let chunk = running.next().await;
            running.has_failed = chunk.is_err();
            if let Err(error) = &chunk {
                running.request.record.failed(error.code);
            }
            let is_last = chunk.is_err() || running.choices.iter().all(|choice| choice.is_finished);
            Some((chunk, (!is_last).then_some(running)))
        });
        TokenStream {
            request,
            chunks: Box::pin(chunks),
        }
    }

    /// The next chunk. To be called while a choice has not finished.
    async fn next(&mut self) -> Result<Chunk, ApiError> {
        loop {
            let patience = self.patience_until();
            let event = tokio::select! {
                biased;
                // What came in time is delivered, also where the client reads it late. This side holds a sender, so the
                // channel does not end.
                Some(event) = self.inbox.recv() => event,
                // The guard speaks before it goes, unless the runtime ends under it.
                over = &mut self.over => return Err(over.unwrap_or_else(|_| {
                    ApiError::new(ErrorCode::ShuttingDown, "the router is shutting down")
                })),
                outcome = turn_of(&mut self.turn), if self.turn.is_some() => {
                    self.turn = None;
                    self.go_on(outcome)?;
                    continue;
                }
                () = self.arrivals.changed(), if patience.is_some() => {
                    self.resume_waiting();
                    continue;
                }
                () = sleep_until(patience), if patience.is_some() => {
                    self.ask_again();
                    self.check_patience()?;
                    continue;
                }
            };
            if let Some(chunk) = self.take(event)? {
                return Ok(chunk);
            }
        }
    }

    /// Takes an event in; `None` where there is nothing for the client in it.
    fn take(&mut self, event: SequenceEvent) -> Result<Option<Chunk>, ApiError> {
        let choice = &mut self.choices[event.choice];
        match event.kind {
            // All of it, whichever of its choices have ended.
            EventKind::Stopped => {
                self.pause()?;
                Ok(None)
            }
            // A stop string ended the choice while more tokens were on their way.
            _ if choice.is_finished => Ok(None),
            EventKind::Output {
                token_ids,
                logprobs,
                cached_tokens,
                fetched_tokens,
                finish,
            } => {
                let output = Output {
                    token_ids,
                    logprobs,
                    cached_tokens,
                    fetched_tokens,
                    finish,
                };
                Ok(Some(self.take_output(event.choice, output)))
            }
            EventKind::Failed { code, message } => {
                self.interrupt(event.choice, Interruption::Failed { code, message })?;
                Ok(None)
            }
            EventKind::Lost => {
                self.interrupt(event.choice, Interruption::Lost)?;
                Ok(None)
            }
        }
    }

    fn take_output(&mut self, index: usize, output: Output) -> Chunk {
        let request = &self.request;
        let metrics = &request.state.metrics;
        let is_first_of_all = self
            .choices
            .iter()
            .all(|choice| choice.first_token.is_none());
        let choice = &mut self.choices[index];
        let now = Instant::now();
        if !std::mem::replace(&mut choice.is_prefilled, true) {
            self.held.prefilled(index, output.fetched_tokens);
        }
        if choice.first_token.is_none() {
            choice.first_token = Some(now);
            metrics
                .prefix_cache_hit_tokens
                .inc_by(output.cached_tokens.into());
            request.record.first_token(index, output.cached_tokens);
        }
        let chunk = choice.take(output, &request.stop);
        metrics
            .generation_tokens
            .inc_by(chunk.token_ids.len() as u64);
        if is_first_of_all {
            metrics
                .time_to_first_token
                .observe((now - request.arrived).as_secs_f64());
        }
        if let Some(finish) = &chunk.finish {
            self.held.end(index);
            let workers = &request.state.workers;
            workers.output_ended(&request.model.name, finish.completion_tokens);
            metrics.finished(finish.reason);
            request
                .record
                .finished(finish.reason, finish.completion_tokens);
            let since_first = choice
                .first_token
                .map_or(0.0, |first| (now - first).as_secs_f64());
            if finish.completion_tokens > 1 {
                let later_tokens = f64::from(finish.completion_tokens - 1);
                metrics
                    .time_per_output_token
                    .observe(since_first / later_tokens);
            }
            if self.choices.iter().all(|choice| choice.is_finished) {
                metrics
                    .e2e_request_latency
                    .observe((now - request.arrived).as_secs_f64());
            }
        }
        chunk
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The guard holds a share.
        self.held.release();
        let reason = if self.has_failed {
            FinishReason::Error
        } else {
            FinishReason::Abort
        };
        let request = &self.request;
        for choice in self.choices.iter().filter(|choice| !choice.is_finished) {
            request.state.metrics.finished(reason);
            request.record.finished(reason, choice.output.len() as u32);
        }
    }
}

/// Never, where there is nothing to wait for.
async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
