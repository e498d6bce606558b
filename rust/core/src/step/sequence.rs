//! One request's tokens, and what it holds while it runs.

use std::{ops::Range, sync::Arc};

use super::{
    block_pool::Chain,
    host_tier::Swapped,
    moves::HoldId,
    plan::{FinishReason, Request, SequenceStart},
};
use crate::{
    hash::{BlockHash, HashSeed},
    ids::{BlockId, RequestId, TokenId},
    sampling::SamplingParams,
    time::Time,
};

/// Hashes one full block given the hash of the block before it.
pub(super) type HashBlock = fn(u64, &[TokenId]) -> BlockHash;

/// A request that has not ended. It holds no block and no sampler slot: only a [`Running`] one does.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: RequestId,
    pub(super) arrived_at: Time,
    /// The prompt, then the output.
    pub(super) token_ids: Vec<TokenId>,
    pub(super) num_prompt_tokens: usize,
    pub(super) sampling: Arc<SamplingParams>,
    pub(super) hash_seed: HashSeed,
    /// One for each full block of `token_ids`; empty where there is no prefix cache.
    pub(super) block_hashes: Vec<BlockHash>,
    /// Prompt tokens that came from the prefix cache when the request first ran.
    pub(super) num_cached_tokens: u32,
    /// Those of them whose KV another worker brought.
    pub(super) num_fetched_tokens: u32,
    /// Blocks that another worker brought.
    pub(super) fetched_blocks: Range<usize>,
    /// Steps that the request was held back to share a prefix.
    pub(super) num_prefix_waits: u32,
    /// Blocks that were noted for writing through.
    pub(super) num_noted_blocks: usize,
    /// Set where only the prompt's KV is wanted.
    pub(super) prefill_only: Option<PrefillOnly>,
}

/// How far the KV of a prefill-only request has been announced to whom it is for.
#[derive(Debug, Default)]
pub(super) struct PrefillOnly {
    pub(super) num_filled_blocks: usize,
    /// What keeps the blocks that the step completes which executes.
    pub(super) hold: Option<HoldId>,
}

impl Sequence {
    pub(super) fn new(request: Request, arrived_at: Time) -> Self {
        let num_prompt_tokens = request.prompt_token_ids.len();
        let mut token_ids = request.prompt_token_ids;
        token_ids.extend(request.output_token_ids);
        Self {
            id: request.id,
            arrived_at,
            token_ids,
            num_prompt_tokens,
            sampling: Arc::new(request.sampling),
            hash_seed: request.hash_seed,
            block_hashes: Vec::new(),
            num_cached_tokens: 0,
            num_fetched_tokens: 0,
            fetched_blocks: 0..0,
            num_prefix_waits: 0,
            num_noted_blocks: 0,
            prefill_only: None,
        }
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Notes what the cache gives to a request that first runs.
    pub(super) fn note_cached(&mut self, num_blocks: usize, block_size: usize) {
        let tokens = |blocks: usize| (blocks * block_size).min(self.num_prompt_tokens) as u32;
        let fetched = &self.fetched_blocks;
        let end = fetched.end.min(num_blocks);
        self.num_fetched_tokens = tokens(end) - tokens(fetched.start.min(end));
        self.num_cached_tokens = tokens(num_blocks);
    }

    /// Hashes the full blocks that have no hash yet.
    pub(super) fn hash_full_blocks(&mut self, block_size: usize, hash_block: HashBlock) {
        let done = self.block_hashes.len();
        // Most tokens fill no block.
        if self.token_ids.len() < (done + 1) * block_size {
            return;
        }
        let mut parent = self
            .block_hashes
            .last()
            .map_or(self.hash_seed.0, |hash| hash.0);
        for tokens in self.token_ids[done * block_size..].chunks_exact(block_size) {
            let hash = hash_block(parent, tokens);
            parent = hash.0;
            self.block_hashes.push(hash);
        }
    }

    /// The first `num_blocks` full blocks, fewer where there are fewer.
    pub(super) fn chain(&self, num_blocks: usize) -> Chain<'_> {
        let num_blocks = num_blocks.min(self.block_hashes.len());
        Chain {
            seed: self.hash_seed,
            hashes: &self.block_hashes[..num_blocks],
            token_ids: &self.token_ids,
        }
    }

    /// The blocks that may come from the cache: never the one with the last token, because that token has to be
    /// computed for the next one to be drawn.
    pub(super) fn matchable(&self, block_size: usize) -> Chain<'_> {
        self.chain((self.num_tokens() - 1) / block_size)
    }

    /// Whether, and why, the request ends with its last token.
    pub(super) fn finish_reason(&self, eos_token_ids: &[TokenId]) -> Option<FinishReason> {
        let last = self.token_ids.last()?;
        let is_eos = !self.sampling.ignore_eos && eos_token_ids.contains(last);
        if is_eos || self.sampling.stop_token_ids.contains(last) {
            return Some(FinishReason::Stop);
        }
        let num_output_tokens = self.num_tokens() - self.num_prompt_tokens;
        (num_output_tokens >= self.sampling.max_tokens as usize).then_some(FinishReason::Length)
    }

    /// What the sampler has to know when the sequence enters `slot`.
    pub(super) fn start_in(&self, slot: u32) -> SequenceStart {
        let (mut prompt, mut output) = (Vec::new(), Vec::new());
        if self.sampling.has_penalties() {
            let (prompt_tokens, output_tokens) = self.token_ids.split_at(self.num_prompt_tokens);
            prompt = prompt_tokens.to_vec();
            output = output_tokens.to_vec();
        }
        SequenceStart {
            slot,
            sampling: Arc::clone(&self.sampling),
            prompt_token_ids: prompt,
            output_token_ids: output,
        }
    }
}

/// A sequence that has lost its blocks and waits to run again.
#[derive(Debug)]
pub(super) struct Preempted {
    pub(super) sequence: Sequence,
    /// What host memory keeps of it.
    pub(super) swapped: Option<Swapped>,
}

impl Preempted {
    /// Known tokens that will have to be computed, but for what the prefix cache has.
    pub(super) fn num_prefill_tokens(&self) -> usize {
        let kept = self.swapped.as_ref();
        self.sequence.num_tokens() - kept.map_or(0, |swapped| swapped.num_computed_tokens)
    }
}

/// A sequence that holds blocks and a sampler slot.
///
/// ```text
///   tokens   0 ........ cached ........ computed ..... in flight ..... known ..... pending
///   blocks   [ shared, complete ][ private, being written ]
/// ```
/// The block table covers all known tokens from the start. Pending ones there are only where steps are planned ahead.
/// The first `num_cached_blocks` blocks are in the prefix cache and never written; the sequence alone writes the
/// others.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) sequence: Sequence,
    /// Order of the first start; a preempted sequence keeps it.
    pub(super) seniority: u64,
    pub(super) slot: u32,
    /// Empty only while a preempted sequence waits to be taken out of the running ones.
    pub(super) block_table: Vec<BlockId>,
    pub(super) num_cached_blocks: usize,
    /// Leading blocks of the table that the runner has in its own.
    pub(super) num_sent_blocks: usize,
    pub(super) num_computed_tokens: usize,
    /// Tokens behind the computed ones that steps in flight compute.
    pub(super) num_in_flight_tokens: usize,
    /// Tokens behind the known ones that steps in flight draw. Counted only where steps are planned ahead.
    pub(super) num_pending_tokens: usize,
    /// Tokens behind those that the step computes which is being planned.
    pub(super) num_scheduled_tokens: usize,
    /// What host memory keeps, while a preempted sequence waits to be taken out of the running ones.
    pub(super) swapped: Option<Swapped>,
    /// Set with the last token, until the commit is through.
    pub(super) is_finished: bool,
}

impl Running {
    /// Known tokens whose KV is not computed. At least one: the last token drawn.
    pub(super) fn num_uncomputed_tokens(&self) -> usize {
        self.sequence.num_tokens() - self.num_computed_tokens
    }

    /// Whether more than the last token is not computed.
    pub(super) fn is_prefill(&self) -> bool {
        self.num_uncomputed_tokens() > 1 || self.sequence.prefill_only.is_some()
    }

    /// The position of the first token that no step in flight computes either.
    pub(super) fn next_position(&self) -> usize {
        self.num_computed_tokens + self.num_in_flight_tokens
    }

    /// Known and pending tokens that no step in flight computes. None while the sequence waits for its next token.
    pub(super) fn num_unplanned_tokens(&self) -> usize {
        self.sequence.num_tokens() + self.num_pending_tokens - self.next_position()
    }

    /// Whether the pending tokens, none of which may be a stop token, leave one more to draw.
    pub(super) fn may_draw_more(&self) -> bool {
        let sequence = &self.sequence;
        let num_tokens = sequence.num_tokens() + self.num_pending_tokens;
        let num_output_tokens = num_tokens - sequence.num_prompt_tokens;
        self.num_pending_tokens == 0 || num_output_tokens < sequence.sampling.max_tokens as usize
    }

    /// Whether the next step has to compute only the last token, to draw the next.
    pub(super) fn is_decode(&self) -> bool {
        self.num_unplanned_tokens() == 1 && self.sequence.prefill_only.is_none()
    }

    /// Whether every token but the last known one is computed, or will be by the steps in flight.
    pub(super) fn is_past_prefill(&self) -> bool {
        self.num_unplanned_tokens() <= 1 && self.sequence.prefill_only.is_none()
    }

    /// Whether the planned tokens are the last known ones, so that the step draws the next.
    pub(super) fn draws_token(&self) -> bool {
        self.num_scheduled_tokens == self.num_unplanned_tokens()
            && self.sequence.prefill_only.is_none()
    }

    /// Whether a step in flight computes some of its tokens.
    pub(super) fn is_in_flight(&self) -> bool {
        self.num_in_flight_tokens > 0
    }

    /// Whether the sequence has lost its blocks in the step that is being planned.
    pub(super) fn is_preempted(&self) -> bool {
        self.block_table.is_empty()
    }
}
