//! What one step is told to do, and what it answers: flat arrays, so that the runner builds tensors without a
//! loop per token.

use std::sync::Arc;

use super::moves::HoldId;
use crate::{
    hash::{BlockHash, HashSeed},
    ids::{BlockId, RequestId, TokenId},
    sampling::SamplingParams,
};

/// A sequence to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique among the requests that the scheduler holds.
    pub id: RequestId,
    /// The prompt; at least one token.
    pub prompt_token_ids: Vec<TokenId>,
    /// Tokens already generated elsewhere, when a request is replayed. They count against `max_tokens`.
    pub output_token_ids: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Start of the request's hash chain.
    pub hash_seed: HashSeed,
}

/// Stands in a plan for a token that is not known: the one that was last drawn for its slot, by a step in flight.
pub const PENDING_TOKEN: TokenId = TokenId::MAX;

/// One step's work. `T` tokens of `S` sequences run; `N` of the sequences draw a token.
///
/// Sequences that decode (one token) come first, then those that prefill.
///
/// The runner keeps the block tables, one row per slot. A plan brings only what changes of them, because the
/// tables of 256 long contexts are half a megabyte and a step adds a few dozen blocks. So every plan has to be
/// executed, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Counts up from 1.
    pub step_id: u64,
    /// `[T]` token ids, sequence after sequence. [`PENDING_TOKEN`] in sequences of one token, where steps are planned
    /// ahead.
    pub token_ids: Vec<TokenId>,
    /// `[T]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[T]` where each token's KV goes: `block_id * block_size + offset`.
    pub slot_mapping: Vec<u32>,
    /// `[S + 1]` first token of each sequence in the arrays above; the last entry is `T`.
    pub query_start: Vec<u32>,
    /// `[S]` tokens of KV that each sequence has after this step.
    pub context_lens: Vec<u32>,
    /// `[S]` the slot of each sequence, `0..max_num_seqs`: its row of the runner's block tables, and its sampler's.
    pub slots: Vec<u32>,
    /// Most blocks that a sequence of this step has.
    pub block_table_width: u32,
    /// `[U]` entries of the block tables that change before anything is computed: the slot of each.
    pub update_slots: Vec<u32>,
    /// `[U]` which block of the sequence, counted from its first token.
    pub update_columns: Vec<u32>,
    /// `[U]` the block's id.
    pub update_blocks: Vec<u32>,
    /// Blocks to copy to host memory, before everything else.
    pub swap_out: BlockCopies,
    /// Blocks to copy from host memory, after those and before anything is computed.
    pub swap_in: BlockCopies,
    /// `[N]` who draws a token.
    pub samples: Vec<Sample>,
    /// Sequences that take a slot with this step, before anything is drawn.
    pub starts: Vec<SequenceStart>,
    /// Blocks of prefill-only requests that are complete once the step is.
    pub filled: Vec<FilledBlocks>,
}

/// Blocks that a step completes for another worker: layer by layer, they may be read from when the layer's KV is
/// written until the hold is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilledBlocks {
    /// Whose prompt it is.
    pub request_id: RequestId,
    /// Which block of the prompt the first of them is.
    pub first_block: u32,
    /// Keeps them, and those before them, also where the request ends.
    pub hold: HoldId,
    /// The blocks.
    pub blocks: Vec<BlockId>,
}

/// KV to copy between a block of the device and one of host memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockCopies {
    /// `[C]` blocks of the device.
    pub blocks: Vec<u32>,
    /// `[C]` blocks of host memory.
    pub host_blocks: Vec<u32>,
}

impl BlockCopies {
    pub(super) fn push(&mut self, block: BlockId, host_block: u32) {
        self.blocks.push(block.0);
        self.host_blocks.push(host_block);
    }
}

/// One sequence that draws a token in this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Whose token it is.
    pub request_id: RequestId,
    /// Row of the sequence in the plan, `0..S`.
    pub sequence_index: u32,
    /// Its slot, which holds its parameters and token history.
    pub slot: u32,
    /// Position that the new token will have in its sequence.
    pub position: u32,
    /// Alternatives to return; `None` where no log-probabilities are wanted.
    pub logprobs: Option<u32>,
}

/// A sequence's parameters enter a slot: when it starts, and again after each preemption.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceStart {
    /// The slot, free until now.
    pub slot: u32,
    /// How tokens are drawn.
    pub sampling: Arc<SamplingParams>,
    /// The prompt, where penalties need it; else empty.
    pub prompt_token_ids: Vec<TokenId>,
    /// The output so far, where penalties need it; else empty.
    pub output_token_ids: Vec<TokenId>,
}

/// What the model drew in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// The plan that this answers.
    pub step_id: u64,
    /// `[N]` drawn tokens, in the order of `StepPlan::samples`.
    pub token_ids: Vec<TokenId>,
    /// `[N]` log-probabilities, or empty where no sample of the plan wanted any.
    pub logprobs: Vec<Option<TokenLogprobs>>,
}

/// Log-probabilities (natural, at temperature 1, before penalties and filters) of one drawn token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// The drawn token's.
    pub chosen: f32,
    /// The most likely tokens and theirs, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-sequence token or a stop token.
    Stop,
    /// `max_tokens` or the context length.
    Length,
    /// The client or an operator ended it.
    Abort,
    /// It failed.
    Error,
}

impl FinishReason {
    /// The reason as metrics and logs spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// One new token of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenUpdate {
    /// Whose token it is.
    pub request_id: RequestId,
    /// The token.
    pub token_id: TokenId,
    /// Its index in the output, counted from the output's very first token.
    pub output_index: u32,
    /// Its log-probabilities, where asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Set on the request's last token.
    pub finish_reason: Option<FinishReason>,
    /// Prompt tokens that the prefix cache gave when the request first ran.
    pub num_cached_tokens: u32,
    /// Those of them whose KV another worker brought.
    pub num_fetched_tokens: u32,
}

/// A change of what the replica's prefix cache holds, for the routers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks became reusable; hashes of one chain, in order.
    Stored(Vec<BlockHash>),
    /// Blocks are in host memory now, and no longer on the device if they were.
    Kept(Vec<BlockHash>),
    /// Blocks are gone, from wherever they were.
    Removed(Vec<BlockHash>),
    /// The whole cache is gone.
    Cleared,
}
