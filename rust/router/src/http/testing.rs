//! What the tests of this module share: a vocabulary of letters and a request whose pieces are given.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::Stream;
use orchestra_core::{
    TokenId,
    step::{FinishReason, TokenLogprobs},
};

use super::{choices::Source, logprobs::Vocabulary};
use crate::{
    error::ApiError,
    request::{Chunk, Finish},
};

/// Token 0 is "a", token 1 is "b", and so on.
pub(super) struct Letters;

impl Vocabulary for Letters {
    fn text(&self, token_id: TokenId) -> String {
        String::from_utf8_lossy(self.bytes(token_id)).into_owned()
    }

    fn bytes(&self, token_id: TokenId) -> &[u8] {
        let letter = token_id as usize;
        &b"abcdefghijklmnopqrstuvwxyz"[letter..=letter]
    }
}

/// A request that produces what it is given, all of it at once.
pub(super) struct Script {
    pub(super) prompts: Vec<Vec<TokenId>>,
    pub(super) items: VecDeque<Result<Chunk, ApiError>>,
}

impl Source for Script {
    fn prompts(&self) -> Vec<&[TokenId]> {
        self.prompts.iter().map(Vec::as_slice).collect()
    }

    fn vocabulary(&self) -> &dyn Vocabulary {
        &Letters
    }
}

impl Stream for Script {
    type Item = Result<Chunk, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.items.pop_front())
    }
}

/// A piece of text with one token per letter, each with log-probability -1 where `with_logprobs`.
pub(super) fn piece(index: u32, text: &str, with_logprobs: bool) -> Chunk {
    let token_ids: Vec<TokenId> = text.bytes().map(|byte| u32::from(byte - b'a')).collect();
    let logprobs = token_ids.iter().map(|&id| TokenLogprobs {
        chosen: -1.0,
        top: vec![(id, -1.0)],
    });
    let logprobs = if with_logprobs {
        logprobs.collect()
    } else {
        Vec::new()
    };
    Chunk {
        index,
        text: text.to_owned(),
        token_ids,
        logprobs,
        finish: None,
    }
}

/// The last piece of a choice.
pub(super) fn last(index: u32, reason: FinishReason, completion_tokens: u32) -> Chunk {
    let finish = Finish {
        reason,
        stop_string: None,
        completion_tokens,
        cached_tokens: 16,
    };
    Chunk {
        index,
        finish: Some(finish),
        ..Chunk::default()
    }
}
