//! The pieces of all prompts of one HTTP request, as one stream.
//!
//! Choice `j` of prompt `i` has index `i * n + j`, as OpenAI numbers them. Dropping the stream aborts what is left.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::{Stream, future::BoxFuture};
use futures_util::{StreamExt as _, stream::Fuse};
use orchestra_core::{ErrorCode, TokenId, step::TokenLogprobs};

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
    streams: Vec<Fuse<TokenStream>>,
    /// Choices per prompt.
    n: u32,
    /// Where the next poll begins, so that no prompt starves another.
    next: usize,
    /// What came while other prompts were on their way in: at most their whole output.
    early: VecDeque<Chunk>,
}

impl Choices {
    /// Sends every prompt down the corridor; returns once all run. Where one is refused, all are.
    pub(super) async fn open(
        state: &Arc<RouterState>,
        inputs: Vec<GenerateInput>,
    ) -> Result<Self, ApiError> {
        let n = inputs.first().map_or(1, |input| input.n);
        let prompts = inputs.into_iter().map(|input| {
            let state = Arc::clone(state);
            Prompt::Opening(Box::pin(async move {
                let opened = generate(&state, input).await;
                opened.inspect_err(|error| state.metrics.rejected(error.code))
            }))
        });
        let mut prompts: Vec<Prompt> = prompts.collect();
        let mut early = VecDeque::new();
        poll_fn(|cx| poll_open(&mut prompts, n, &mut early, cx)).await?;
        let streams = prompts.into_iter().filter_map(|prompt| match prompt {
            Prompt::Opening(_) => None,
            Prompt::Running(stream) => Some(stream),
        });
        Ok(Self {
            streams: streams.collect(),
            n,
            next: 0,
            early,
        })
    }
}

/// A prompt on its way through the corridor.
enum Prompt {
    Opening(BoxFuture<'static, Result<TokenStream, ApiError>>),
    Running(Fuse<TokenStream>),
}

/// Ready once every prompt runs. Those that run are read meanwhile: one that nobody reads keeps its seat, and the
/// others might be waiting for it.
fn poll_open(
    prompts: &mut [Prompt],
    n: u32,
    early: &mut VecDeque<Chunk>,
    cx: &mut Context<'_>,
) -> Poll<Result<(), ApiError>> {
    let mut are_all_open = true;
    for prompt in &mut *prompts {
        if let Prompt::Opening(opening) = prompt {
            match opening.as_mut().poll(cx) {
                Poll::Ready(opened) => *prompt = Prompt::Running(opened?.fuse()),
                Poll::Pending => are_all_open = false,
            }
        }
    }
    if are_all_open {
        return Poll::Ready(Ok(()));
    }
    for (index, prompt) in prompts.iter_mut().enumerate() {
        let Prompt::Running(stream) = prompt else {
            continue;
        };
        while let Poll::Ready(Some(chunk)) = stream.poll_next_unpin(cx) {
            early.push_back(renumber(chunk?, index, n));
        }
    }
    Poll::Pending
}

fn renumber(mut chunk: Chunk, prompt: usize, n: u32) -> Chunk {
    chunk.index += prompt as u32 * n;
    chunk
}

impl Source for Choices {
    fn prompts(&self) -> Vec<&[TokenId]> {
        let prompts = self
            .streams
            .iter()
            .map(|stream| stream.get_ref().prompt_token_ids());
        prompts.collect()
    }

    fn vocabulary(&self) -> &dyn Vocabulary {
        self.streams[0].get_ref().model()
    }
}

impl Stream for Choices {
    type Item = Result<Chunk, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(chunk) = this.early.pop_front() {
            return Poll::Ready(Some(Ok(chunk)));
        }
        let count = this.streams.len();
        for prompt in (this.next..count).chain(0..this.next) {
            if let Poll::Ready(Some(item)) = this.streams[prompt].poll_next_unpin(cx) {
                this.next = (prompt + 1) % count;
                return Poll::Ready(Some(item.map(|chunk| renumber(chunk, prompt, this.n))));
            }
        }
        if this.streams.iter().all(Fuse::is_done) {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }
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
