//! The pieces of all prompts of one HTTP request, as one stream.
//!
//! Choice `j` of prompt `i` has index `i * n + j`, as OpenAI numbers them. Dropping the stream aborts what is left.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use futures_util::{StreamExt as _, future::try_join_all};
use orchestra_core::{ErrorCode, TokenId, step::TokenLogprobs};
use serde::Serialize;

use super::logprobs::Vocabulary;
use crate::{
    corridor::{TokenStream, generate},
    error::ApiError,
    request::{Chunk, Finish, GenerateInput},
    state::RouterState,
};

/// What the renderers need of a running request, so that tests can do without a corridor.
pub(super) trait Source: Stream<Item = Result<Chunk, ApiError>> + Send + Unpin {
    /// The prompts' tokens, in order; at least one.
    fn prompts(&self) -> Vec<&[TokenId]>;
    /// The model's tokens as text.
    fn vocabulary(&self) -> &dyn Vocabulary;
}

/// The running prompts.
pub(super) struct Choices {
    streams: Vec<TokenStream>,
    /// Choices per prompt.
    n: u32,
    /// Where the next poll begins, so that no prompt starves another.
    next: usize,
}

impl Choices {
    /// Sends every prompt down the corridor. Where one is refused, all are.
    pub(super) async fn open(
        state: &Arc<RouterState>,
        inputs: Vec<GenerateInput>,
    ) -> Result<Self, ApiError> {
        let n = inputs.first().map_or(1, |input| input.n);
        let refused = |error: ApiError| {
            state.metrics.rejected(error.code);
            error
        };
        let opening = inputs.into_iter().map(|input| generate(state, input));
        let streams = try_join_all(opening).await.map_err(refused)?;
        Ok(Self {
            streams,
            n,
            next: 0,
        })
    }
}

impl Source for Choices {
    fn prompts(&self) -> Vec<&[TokenId]> {
        self.streams
            .iter()
            .map(TokenStream::prompt_token_ids)
            .collect()
    }

    fn vocabulary(&self) -> &dyn Vocabulary {
        self.streams[0].model()
    }
}

impl Stream for Choices {
    type Item = Result<Chunk, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let count = this.streams.len();
        let mut is_over = true;
        for prompt in (this.next..count).chain(0..this.next) {
            match Pin::new(&mut this.streams[prompt]).poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    this.next = (prompt + 1) % count;
                    let first_index = prompt as u32 * this.n;
                    return Poll::Ready(Some(item.map(|mut chunk| {
                        chunk.index += first_index;
                        chunk
                    })));
                }
                Poll::Ready(None) => {}
                Poll::Pending => is_over = false,
            }
        }
        if is_over {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }
}

/// What a request has used, counted as its choices end.
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

/// All of one choice.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) text: String,
    pub(super) token_ids: Vec<TokenId>,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) finish: Option<Finish>,
}

/// Waits for the end of every choice; choice `i` is at `i`.
pub(super) async fn collect(
    source: &mut impl Source,
    count: usize,
) -> Result<Vec<Collected>, ApiError> {
    let mut choices: Vec<Collected> = (0..count).map(|_| Collected::default()).collect();
    while let Some(chunk) = source.next().await.transpose()? {
        let Some(choice) = choices.get_mut(chunk.index as usize) else {
            continue;
        };
        choice.text.push_str(&chunk.text);
        choice.token_ids.extend(chunk.token_ids);
        choice.logprobs.extend(chunk.logprobs);
        choice.finish = chunk.finish.or(choice.finish.take());
    }
    if choices.iter().any(|choice| choice.finish.is_none()) {
        return Err(ApiError::new(
            ErrorCode::Internal,
            "a choice ended without saying how",
        ));
    }
    Ok(choices)
}
