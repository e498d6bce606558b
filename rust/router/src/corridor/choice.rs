//! One choice of a request: its tokens so far, and their text.

use std::sync::Arc;

use orchestra_core::{
    TokenId,
    scheduler::WorkerId,
    step::{FinishReason, TokenLogprobs},
};
use tokio::time::Instant;

use super::{replay::Wait, tokenise::CheckedRequest};
use crate::{
    request::{Chunk, Finish},
    text::{detokenizer::Detokenizer, stop::StopStrings},
};

/// New tokens of a choice, as its worker sent them.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) token_ids: Vec<TokenId>,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) cached_tokens: u32,
    /// Of these, those that another worker gave.
    pub(super) fetched_tokens: u32,
    pub(super) finish: Option<FinishReason>,
}

/// The state of one choice.
pub(super) struct Choice {
    pub(super) index: usize,
    /// Every token so far; what a replay continues from.
    pub(super) output: Vec<TokenId>,
    /// Workers that failed this choice.
    pub(super) excluded: Vec<WorkerId>,
    /// Workers that took no work a moment ago.
    pub(super) refused: Vec<WorkerId>,
    /// When the first of these refusals came that no token came after.
    pub(super) refused_since: Option<Instant>,
    pub(super) num_replays: u32,
    /// Set while the choice waits for a worker to continue on.
    pub(super) wait: Option<Wait>,
    pub(super) is_finished: bool,
    /// Whether the sequence that runs now has given a token.
    pub(super) is_prefilled: bool,
    /// When its first token came.
    pub(super) first_token: Option<Instant>,
    cached_tokens: u32,
    detokenizer: Detokenizer,
    stop: StopStrings,
}

impl Choice {
    pub(super) fn new(request: &CheckedRequest, index: usize) -> Self {
        let tokenizer = Arc::clone(request.model.tokenizer());
        Self {
            index,
            output: Vec::new(),
            excluded: Vec::new(),
            refused: Vec::new(),
            refused_since: None,
            num_replays: 0,
            wait: None,
            is_finished: false,
            is_prefilled: false,
            first_token: None,
            cached_tokens: 0,
            detokenizer: Detokenizer::new(tokenizer, &request.prompt_token_ids),
            stop: StopStrings::new(&request.stop),
        }
    }

    /// Takes new tokens; the answer is what the client gets of them. `stop` is the list that the client gave.
    pub(super) fn take(&mut self, mut new: Output, stop: &[String]) -> Chunk {
        if self.output.is_empty() {
            self.cached_tokens = new.cached_tokens;
        }
        self.refused.clear();
        self.refused_since = None;
        let mut text = String::new();
        let stop_string = self
            .read(&mut new, &mut text)
            .map(|index| stop[index].clone());
        let reason = if stop_string.is_some() {
            Some(FinishReason::Stop)
        } else {
            new.finish
        };
        self.output.extend(&new.token_ids);
        Chunk {
            index: self.index as u32,
            text,
            token_ids: new.token_ids,
            logprobs: new.logprobs,
            finish: reason.map(|reason| self.finish(reason, stop_string)),
        }
    }

    /// Where it cannot go now.
    pub(super) fn barred(&self) -> Vec<WorkerId> {
        [&self.excluded[..], &self.refused].concat()
    }

    /// Appends the new tokens' text to `text`. Where a stop string ends it, the tokens after that are cut off `new`, and
    /// the answer is its index.
    fn read(&mut self, new: &mut Output, text: &mut String) -> Option<usize> {
        let num_tokens = new.token_ids.len();
        let mut piece = String::new();
        for (index, &token_id) in new.token_ids.iter().enumerate() {
            // The token that ends a sequence is a sign, not text, also where it has some.
            let is_end = new.finish == Some(FinishReason::Stop) && index + 1 == num_tokens;
            if !is_end {
                self.detokenizer.push(token_id, &mut piece);
            }
            if let Some(found) = self.stop.push(&piece, text) {
                new.token_ids.truncate(index + 1);
                new.logprobs.truncate(index + 1);
                return Some(found.index);
            }
            piece.clear();
        }
        if new.finish.is_some() {
            self.detokenizer.finish(&mut piece);
            let found = self.stop.push(&piece, text);
            self.stop.finish(text);
            return found.map(|found| found.index);
        }
        None
    }

    fn finish(&mut self, reason: FinishReason, stop_string: Option<String>) -> Finish {
        self.is_finished = true;
        Finish {
            reason,
            stop_string,
            completion_tokens: self.output.len() as u32,
            cached_tokens: self.cached_tokens,
        }
    }
}
