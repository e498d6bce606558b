//! What a request has used, as OpenAI counts it.

use orchestra_core::TokenId;
use serde::Serialize;

use crate::request::Finish;

/// Counts as choices end.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    prompt_tokens: u64,
    completion_tokens: u64,
    /// Choices per prompt.
    n: u32,
    /// Per prompt, the fewest tokens that the cache gave one of its choices: the later ones find what the first
    /// has just computed, which says nothing about the cache.
    cached_tokens: Vec<Option<u32>>,
}

impl Tally {
    /// Starts counting: each prompt counts once, however many choices it has.
    pub(super) fn new(prompts: &[&[TokenId]], n: u32) -> Self {
        Self {
            prompt_tokens: prompts.iter().map(|prompt| prompt.len() as u64).sum(),
            completion_tokens: 0,
            n,
            cached_tokens: vec![None; prompts.len()],
        }
    }

    /// Takes in the end of choice `index`.
    pub(super) fn finished(&mut self, index: u32, finish: &Finish) {
        self.completion_tokens += u64::from(finish.completion_tokens);
        if let Some(fewest) = self.cached_tokens.get_mut((index / self.n) as usize) {
            let cached = finish.cached_tokens;
            *fewest = Some(fewest.map_or(cached, |fewest| fewest.min(cached)));
        }
    }

    /// OpenAI's `usage`.
    pub(super) fn usage(&self) -> Usage {
        let cached_tokens = self
            .cached_tokens
            .iter()
            .flatten()
            .copied()
            .map(u64::from)
            .sum();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// OpenAI's `usage` object.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}
