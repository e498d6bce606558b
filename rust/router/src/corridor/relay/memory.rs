//! What a client has been sent of a stream: enough to say when it is complete, and to continue it elsewhere.

use orchestra_core::step::FinishReason;

use super::{
    events::{Logprobs, Piece, PieceChoice, Usage},
    read::Route,
};
use crate::metrics::Metrics;

/// Text that is remembered for all choices of a request; a longer answer is not continued elsewhere.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// A stream so far.
#[derive(Debug)]
pub(super) struct Memory {
    /// Names of the answer, which a continuation keeps.
    pub(super) identity: Option<Identity>,
    pub(super) choices: Vec<ChoiceMemory>,
    pub(super) usage: Option<Usage>,
    /// Tokens before the present part of the answer, which its usage does not count.
    tokens_before: u32,
    text_bytes: usize,
}

/// How an answer calls itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

/// One choice so far.
#[derive(Debug, Default)]
pub(super) struct ChoiceMemory {
    /// Of the message or of the completion.
    pub(super) text: String,
    /// Of the tokens, where the engine gives all of them.
    pub(super) token_ids: Option<Vec<u32>>,
    /// Tokens, counted by their ids, log-probabilities or the usage, or else by the pieces that brought text.
    pub(super) num_tokens: u32,
    /// Those of them that were counted by pieces alone, of which one may hold several tokens.
    pub(super) num_guessed: u32,
    /// It has things besides text, which no engine takes back in: calls of tools, reasoning, a refusal.
    pub(super) has_more_than_text: bool,
    pub(super) has_logprobs: bool,
    pub(super) is_finished: bool,
}

/// A piece of an answer that cannot be one.
#[derive(Debug)]
pub(super) struct NoPiece;

impl Memory {
    pub(super) fn new(num_choices: u32) -> Self {
        let choice = || ChoiceMemory {
            token_ids: Some(Vec::new()),
            ..ChoiceMemory::default()
        };
        Self {
            identity: None,
            choices: (0..num_choices).map(|_| choice()).collect(),
            usage: None,
            tokens_before: 0,
            text_bytes: 0,
        }
    }

    /// Whether every choice has ended.
    pub(super) fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.is_finished)
    }

    /// Whether the client has nothing yet that an engine would have to go on from.
    pub(super) fn is_empty(&self) -> bool {
        let is_empty = |choice: &ChoiceMemory| {
            choice.text.is_empty() && !choice.has_more_than_text && !choice.is_finished
        };
        self.choices.iter().all(is_empty)
    }

    /// Whether it was too long to be remembered.
    fn is_too_long(&self) -> bool {
        self.text_bytes > TEXT_BYTES_MAX
    }

    /// Whether it is text of one choice as far as it is known, and nothing that no engine takes back in.
    pub(super) fn is_plain(&self, route: Route) -> bool {
        let [choice] = &self.choices[..] else {
            return false;
        };
        let has_positions = route == Route::Completions && choice.has_logprobs;
        !choice.has_more_than_text && !has_positions && !self.is_too_long()
    }

    /// Output tokens of all choices.
    pub(super) fn num_tokens(&self) -> u32 {
        self.choices.iter().map(|choice| choice.num_tokens).sum()
    }

    /// Somebody counted the tokens of the only choice.
    pub(super) fn recount(&mut self, num_tokens: u32) {
        if let [choice] = &mut self.choices[..] {
            choice.num_tokens = num_tokens;
            choice.num_guessed = 0;
        }
    }

    /// The answer goes on, on another engine.
    pub(super) fn begin_part(&mut self) {
        self.tokens_before = self.num_tokens();
    }

    /// Every choice that has not ended ends so.
    pub(super) fn finish(&mut self, reason: FinishReason, metrics: &Metrics) {
        for choice in self.choices.iter_mut().filter(|choice| !choice.is_finished) {
            choice.is_finished = true;
            metrics.finished(reason);
        }
    }

    /// Takes the data of an event in. What is no piece of an answer, or is an error, is refused.
    pub(super) fn take(&mut self, data: &[u8], metrics: &Metrics) -> Result<(), NoPiece> {
        // A list would do for a struct, field by field.
        if !data.trim_ascii_start().starts_with(b"{") {
            return Err(NoPiece);
        }
        let piece: Piece<'_> = serde_json::from_slice(data).map_err(|_| NoPiece)?;
        if piece.error.is_some() {
            return Err(NoPiece);
        }
        if self.identity.is_none() {
            self.identity = Some(Identity {
                id: piece
                    .id
                    .as_ref()
                    .map_or_else(String::new, |id| id.0.clone().into_owned()),
                created: piece.created.unwrap_or(0),
                model: piece
                    .model
                    .as_ref()
                    .map_or_else(String::new, |model| model.0.clone().into_owned()),
            });
        }
        for choice in piece.choices.into_iter().flatten() {
            let memory = self.choices.get_mut(choice.index as usize).ok_or(NoPiece)?;
            let is_long = self.text_bytes > TEXT_BYTES_MAX;
            self.text_bytes += memory.take(&choice, is_long);
            if let Some(reason) = &choice.finish_reason
                && !std::mem::replace(&mut memory.is_finished, true)
            {
                metrics.finished(finish_reason(&reason.0));
            }
        }
        if let Some(usage) = piece.usage {
            self.usage = Some(usage);
            if let [choice] = &mut self.choices[..] {
                choice.num_tokens = self.tokens_before + usage.completion_tokens;
                choice.num_guessed = 0;
            }
        }
        Ok(())
    }
}

impl ChoiceMemory {
    /// The answer is how many bytes of text came.
    fn take(&mut self, piece: &PieceChoice<'_>, is_long: bool) -> usize {
        let delta = piece.delta.as_ref();
        let text = delta
            .and_then(|delta| delta.content.as_ref())
            .or(piece.text.as_ref());
        let text = text.map_or("", |text| &*text.0);
        if let Some(delta) = delta {
            let is_some = |text: &Option<super::events::Text<'_>>| {
                text.as_ref().is_some_and(|text| !text.0.is_empty())
            };
            self.has_more_than_text |= is_some(&delta.reasoning_content)
                || is_some(&delta.reasoning)
                || is_some(&delta.refusal)
                || delta
                    .tool_calls
                    .as_ref()
                    .is_some_and(|calls| !calls.is_empty())
                || delta.function_call.is_some();
        }
        self.has_logprobs |= piece.logprobs.is_some();
        match (&piece.token_ids, &mut self.token_ids) {
            (Some(new), Some(known)) => known.extend_from_slice(new),
            (None, known) if !text.is_empty() => *known = None,
            _ => {}
        }
        let by_ids = piece.token_ids.as_ref().map(|new| new.len() as u32);
        let by_logprobs = piece.logprobs.as_ref().and_then(Logprobs::num_tokens);
        let by_text = u32::from(!text.is_empty());
        let counted = by_ids.or(by_logprobs);
        self.num_tokens += counted.unwrap_or(by_text);
        if counted.is_none() {
            self.num_guessed += by_text;
        }
        if !is_long {
            self.text.push_str(text);
        }
        text.len()
    }
}

/// An engine's reason as metrics count it.
fn finish_reason(reason: &str) -> FinishReason {
    match reason {
        "length" => FinishReason::Length,
        "abort" => FinishReason::Abort,
        "error" => FinishReason::Error,
        _ => FinishReason::Stop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remember(events: &[&str]) -> Memory {
        let mut memory = Memory::new(1);
        for event in events {
            memory.take(event.as_bytes(), &Metrics::new()).unwrap();
        }
        memory
    }

    #[test]
    fn tokens_are_counted_by_the_best_that_is_said() {
        let piece = r#"{"choices": [{"index": 0, "delta": {"content": "a b"}}]}"#;
        let by_ids = r#"{"choices": [{"index": 0, "text": "a b", "token_ids": [1, 2]}]}"#;
        let by_logprobs = r#"{"choices": [{"index": 0, "delta": {"content": "a b"}, "logprobs": {"content": [{}, {}]}}]}"#;
        let by_usage = r#"{"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": {"completion_tokens": 7}}"#;
        for (events, num_tokens, is_guessed) in [
            (&[piece, piece][..], 2, true),
            (&[by_ids, by_ids], 4, false),
            (&[by_logprobs], 2, false),
            (&[piece, by_usage], 7, false),
            (&[by_usage, piece], 8, true),
        ] {
            let memory = remember(events);
            let choice = &memory.choices[0];
            assert_eq!(
                (choice.num_tokens, choice.num_guessed > 0),
                (num_tokens, is_guessed),
                "{events:?}"
            );
        }
        assert_eq!(remember(&[by_ids]).choices[0].token_ids, Some(vec![1, 2]));
        assert_eq!(remember(&[by_ids, piece]).choices[0].token_ids, None);
    }

    #[test]
    fn the_usage_of_a_second_part_counts_that_part() {
        let by_usage = r#"{"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": {"completion_tokens": 3}}"#;
        let mut memory = remember(&[by_usage]);
        memory.begin_part();
        memory.take(by_usage.as_bytes(), &Metrics::new()).unwrap();
        assert_eq!(memory.num_tokens(), 6);
    }

    #[test]
    fn what_is_no_piece_is_refused() {
        for odd in [
            "[]",
            "1",
            "",
            "{\"error\": {}}",
            "{\"choices\": [{\"index\": 1}]}",
            "{\"choices\": 1}",
        ] {
            assert!(
                Memory::new(1)
                    .take(odd.as_bytes(), &Metrics::new())
                    .is_err(),
                "{odd}"
            );
        }
    }
}
