//! One attached worker as requests see it: where sequences are started and ended, and where its tokens go.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use orchestra_core::{
    ErrorCode, TokenId,
    scheduler::{WorkerId, WorkerSpec},
    step::{FinishReason, TokenLogprobs},
};
use orchestra_proto::v1::{self, router_message::Message};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Placement,
    outbox::Outbox,
    queue::{Prefill, Reserved},
    stopping::{Progress, Stop, Stoppable},
};

/// Longest error text taken over from a worker, characters.
const ERROR_CHARS_MAX: usize = 256;
/// Below every log-probability that a model gives, and a number in JSON, which has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// What happens to one sequence.
#[derive(Debug)]
pub(crate) struct SequenceEvent {
    /// Index of the choice that the sequence runs for.
    pub(crate) choice: usize,
    pub(crate) kind: EventKind,
}

#[derive(Debug)]
pub(crate) enum EventKind {
    /// New tokens; with `finish` the last ones. They follow the tokens before without gap or repeat.
    Output {
        token_ids: Vec<TokenId>,
        logprobs: Vec<TokenLogprobs>,
        cached_tokens: u32,
        finish: Option<FinishReason>,
    },
    /// The worker ended it with an error.
    Failed { code: ErrorCode, message: String },
    /// The worker is gone.
    Lost,
    /// The whole request was stopped for a more urgent one.
    Stopped,
}

/// Where the tokens of one sequence go, and what they must look like.
///
/// The channel has room for everything that the sequence may produce, so a slow reader holds nobody up.
#[derive(Debug)]
pub(crate) struct Sink {
    pub(crate) choice: usize,
    pub(crate) events: mpsc::Sender<SequenceEvent>,
    /// Index that the next token must have.
    pub(crate) next_index: u32,
    /// The same, for those who look on.
    pub(crate) progress: Arc<AtomicU32>,
    pub(crate) max_tokens: u32,
    pub(crate) has_logprobs: bool,
}

/// The worker broke the protocol: its stream is closed, and its sequences go elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("it sent an output with neither tokens nor an end")]
    Empty,
    #[error("its tokens have a gap or a repeat")]
    Index,
    #[error("it sent more tokens than were asked for")]
    TooMany,
    #[error("it sent a token outside the vocabulary")]
    Vocabulary,
    #[error("its log-probabilities do not match its tokens")]
    Logprobs,
}

/// An attached worker.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) worker: WorkerId,
    pub(crate) spec: WorkerSpec,
    pub(crate) is_draining: AtomicBool,
    /// Cancelled when a newer stream of the same worker takes over.
    pub(crate) replaced: CancellationToken,
    /// Cancelled when an operator lets the worker go.
    pub(super) removed: CancellationToken,
    vocab_size: u32,
    outbox: Arc<Outbox>,
    next_sequence: AtomicU64,
    /// `None` once the worker is gone.
    sequences: Mutex<Option<FxHashMap<u64, Sink>>>,
}

impl Session {
    pub(super) fn new(
        worker: WorkerId,
        spec: WorkerSpec,
        vocab_size: u32,
        outbox: Arc<Outbox>,
    ) -> Self {
        Self {
            worker,
            spec,
            is_draining: AtomicBool::new(false),
            replaced: CancellationToken::new(),
            removed: CancellationToken::new(),
            vocab_size,
            outbox,
            next_sequence: AtomicU64::new(1),
            sequences: Mutex::new(Some(FxHashMap::default())),
        }
    }

    /// Hands each output to its sequence. Outputs of sequences that ended here a moment ago are dropped.
    pub(super) fn deliver(&self, batch: v1::TokenBatch) -> Result<(), Violation> {
        let mut sequences = self.sequences.lock();
        let Some(sequences) = sequences.as_mut() else {
            return Ok(());
        };
        for output in batch.outputs {
            let sequence_id = output.sequence_id;
            let Some(sink) = sequences.get_mut(&sequence_id) else {
                continue;
            };
            let is_last = sink.deliver(output, self.vocab_size)?;
            if is_last {
                sequences.remove(&sequence_id);
            }
        }
        Ok(())
    }

    /// Tells every sequence that the worker is gone; from now on none can be started.
    pub(super) fn lose_sequences(&self) {
        let sequences = self.sequences.lock().take().unwrap_or_default();
        for sink in sequences.into_values() {
            sink.send(EventKind::Lost);
        }
    }

    /// A newer stream of this worker has taken over.
    pub(super) fn replace(&self) {
        self.replaced.cancel();
        self.lose_sequences();
    }

    /// Sequences that run on the worker.
    pub(super) fn num_sequences(&self) -> usize {
        self.sequences.lock().as_ref().map_or(0, FxHashMap::len)
    }

    /// Forgets a sequence and tells the worker, unless it had ended.
    fn end(&self, sequence_id: u64) {
        let mut sequences = self.sequences.lock();
        let was_running = sequences
            .as_mut()
            .is_some_and(|all| all.remove(&sequence_id).is_some());
        drop(sequences);
        if was_running {
            self.outbox.push_abort(sequence_id);
        }
    }
}

impl Placement {
    /// Starts a sequence on the chosen worker; `sequence_id` and epoch are filled in. `None` where the worker is gone or
    /// takes no work: the room on it is given back, and the caller tries another.
    pub(crate) fn start(self, mut start: v1::StartSequence, sink: Sink) -> Option<RunningSequence> {
        let Self { session, reserved } = self;
        let sequence_id = session.next_sequence.fetch_add(1, Ordering::Relaxed);
        start.sequence_id = sequence_id;
        start.weights_epoch = session.spec.weights_epoch;
        let progress = Progress {
            first_index: sink.next_index,
            next_index: Arc::clone(&sink.progress),
        };
        // Registered first: the worker may answer before this function returns.
        session.sequences.lock().as_mut()?.insert(sequence_id, sink);
        let running = RunningSequence {
            session,
            sequence_id,
            reserved,
            progress,
            is_prefilled: false,
        };
        if running.session.outbox.push(Message::Start(start)) {
            return Some(running);
        }
        // Not `end`: the worker never heard of it.
        running
            .session
            .sequences
            .lock()
            .as_mut()
            .map(|all| all.remove(&sequence_id));
        None
    }
}

/// A sequence on a worker. Dropping it ends the sequence there and gives its room back.
pub(crate) struct RunningSequence {
    session: Arc<Session>,
    sequence_id: u64,
    reserved: Reserved,
    progress: Progress,
    is_prefilled: bool,
}

impl RunningSequence {
    pub(crate) fn worker(&self) -> WorkerId {
        self.session.worker
    }

    pub(crate) const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Offers its room to more urgent requests; `work` is what it belongs to, and all that stops with it.
    pub(crate) fn offer(
        &self,
        prompt_tokens: u32,
        work: Weak<dyn Stop>,
        together: Arc<[Progress]>,
    ) {
        self.reserved.offer(Stoppable {
            work,
            prompt_tokens,
            progress: self.progress.clone(),
            together,
        });
    }

    /// A token came, so the prompt is computed; with the first one there is somebody to tell.
    pub(crate) fn prefilled(&mut self) -> Option<Prefill> {
        let was_prefilled = std::mem::replace(&mut self.is_prefilled, true);
        (!was_prefilled).then(|| self.reserved.prefill())
    }
}

impl Drop for RunningSequence {
    fn drop(&mut self) {
        self.session.end(self.sequence_id);
        let produced = self.progress.num_output_tokens();
        self.reserved.set_num_output_tokens(produced);
    }
}

impl Sink {
    /// Checks an output and passes it on; `true` where it was the last one.
    fn deliver(&mut self, output: v1::SequenceOutput, vocab_size: u32) -> Result<bool, Violation> {
        let finish = match output.finish_reason() {
            v1::FinishReason::Unspecified => None,
            v1::FinishReason::Stop => Some(FinishReason::Stop),
            v1::FinishReason::Length => Some(FinishReason::Length),
            // An abort that nobody here asked for, or the sink would be gone. Tokens that come with a failure are not
            // passed on; they are drawn again, alike, when the request is continued elsewhere. Nobody was asked to
            // compute a prompt only.
            v1::FinishReason::Abort | v1::FinishReason::Error | v1::FinishReason::Prefilled => {
                self.send(failure(output.error));
                return Ok(true);
            }
        };
        self.check(&output, finish.is_some(), vocab_size)?;
        self.next_index += output.token_ids.len() as u32;
        self.progress.store(self.next_index, Ordering::Relaxed);
        let logprobs = if self.has_logprobs {
            output.logprobs
        } else {
            Vec::new()
        };
        self.send(EventKind::Output {
            token_ids: output.token_ids,
            logprobs: logprobs.iter().map(logprobs_of).collect(),
            cached_tokens: output.cached_tokens,
            finish,
        });
        Ok(finish.is_some())
    }

    fn check(
        &self,
        output: &v1::SequenceOutput,
        is_last: bool,
        vocab_size: u32,
    ) -> Result<(), Violation> {
        let count = output.token_ids.len();
        if count == 0 {
            return if is_last {
                Ok(())
            } else {
                Err(Violation::Empty)
            };
        }
        if output.first_index != self.next_index {
            return Err(Violation::Index);
        }
        if self.next_index as usize + count > self.max_tokens as usize {
            return Err(Violation::TooMany);
        }
        if output.token_ids.iter().any(|&id| id >= vocab_size) {
            return Err(Violation::Vocabulary);
        }
        if self.has_logprobs && output.logprobs.len() != count {
            return Err(Violation::Logprobs);
        }
        Ok(())
    }

    fn send(&self, kind: EventKind) {
        // Each output has a token or is the last, so the channel has room for all of them. It is closed where the
        // request has just ended.
        let _ = self.events.try_send(SequenceEvent {
            choice: self.choice,
            kind,
        });
    }
}

fn failure(error: Option<v1::SequenceError>) -> EventKind {
    let error = error.unwrap_or_default();
    EventKind::Failed {
        code: ErrorCode::parse(&error.code).unwrap_or(ErrorCode::WorkerFailed),
        message: error.message.chars().take(ERROR_CHARS_MAX).collect(),
    }
}

fn logprobs_of(wire: &v1::TokenLogprobs) -> TokenLogprobs {
    // `max` takes the number where the other is not one.
    let logprob = |token: &v1::TokenLogprob| token.logprob.max(LOGPROB_MIN);
    TokenLogprobs {
        chosen: wire.chosen.as_ref().map_or(LOGPROB_MIN, logprob),
        top: wire
            .top
            .iter()
            .map(|token| (token.token_id, logprob(token)))
            .collect(),
    }
}
