//! Where what a sequence's worker sends goes: the tokens of a request's own sequence to the request, the end of a helper's to
//! whoever it helps.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use orchestra_core::{
    ErrorCode, TokenId,
    step::{FinishReason, TokenLogprobs},
};
use orchestra_proto::v1;
use tokio::sync::mpsc;

use super::moves::PrefillSink;

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
        /// Of these, those that another worker gave.
        fetched_tokens: u32,
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
pub(crate) struct TokenSink {
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
    #[error("it drew tokens where only a prompt was to be computed, or the other way round")]
    Prefill,
    #[error(
        "its message to another worker is larger than 1 MiB, or for a name of more than 128 bytes"
    )]
    PeerMessage,
}

/// Where a sequence's outputs go.
#[derive(Debug)]
pub(super) enum Sink {
    /// To a request.
    Tokens(TokenSink),
    /// Nowhere: there are none, only an end.
    Prefill(Box<PrefillSink>),
}

/// What an output was.
pub(super) enum Delivered {
    /// Not the last one.
    More,
    /// The last one.
    End,
    /// The end of a helper's sequence, which has computed all, or has not.
    HelperEnd { is_done: bool },
}

/// What is left to do once a sequence has ended, under no lock.
pub(super) struct HelperEnd {
    pub(super) sink: Box<PrefillSink>,
    pub(super) is_done: bool,
}

impl HelperEnd {
    pub(super) fn tell(self) {
        if self.is_done {
            self.sink.done();
        } else {
            self.sink.failed();
        }
    }
}

impl Sink {
    /// Checks an output and passes it on.
    pub(super) fn deliver(
        &mut self,
        output: v1::SequenceOutput,
        vocab_size: u32,
    ) -> Result<Delivered, Violation> {
        match self {
            Self::Tokens(sink) => {
                let is_last = sink.deliver(output, vocab_size)?;
                Ok(if is_last {
                    Delivered::End
                } else {
                    Delivered::More
                })
            }
            Self::Prefill(_) if !output.token_ids.is_empty() => Err(Violation::Prefill),
            Self::Prefill(_) => match output.finish_reason() {
                v1::FinishReason::Prefilled => Ok(Delivered::HelperEnd { is_done: true }),
                v1::FinishReason::Abort | v1::FinishReason::Error => {
                    Ok(Delivered::HelperEnd { is_done: false })
                }
                v1::FinishReason::Stop | v1::FinishReason::Length => Err(Violation::Prefill),
                v1::FinishReason::Unspecified => Err(Violation::Empty),
            },
        }
    }

    /// The worker is gone. Not to be called under a lock.
    pub(super) fn lose(self) {
        match self {
            Self::Tokens(sink) => sink.send(EventKind::Lost),
            Self::Prefill(sink) => sink.failed(),
        }
    }
}

impl TokenSink {
    /// Checks an output and passes it on; `true` where it was the last one.
    fn deliver(&mut self, output: v1::SequenceOutput, vocab_size: u32) -> Result<bool, Violation> {
        let finish = match output.finish_reason() {
            v1::FinishReason::Unspecified => None,
            v1::FinishReason::Stop => Some(FinishReason::Stop),
            v1::FinishReason::Length => Some(FinishReason::Length),
            // An abort that nobody here asked for, or the sink would be gone. Tokens that come with a failure are not
            // passed on; they are drawn again, alike, when the request is continued elsewhere.
            v1::FinishReason::Abort | v1::FinishReason::Error => {
                self.send(failure(output.error));
                return Ok(true);
            }
            v1::FinishReason::Prefilled => return Err(Violation::Prefill),
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
            fetched_tokens: output.fetched_tokens,
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
