//! A step as the shards see it: the plan as flat arrays one behind the other, the answer as raw arrays too.
//!
//! `orchestra/worker/plan.py` reads the same. `T` tokens of `S` sequences run, `N` draw, `U` entries of the block tables
//! change, `C` blocks are copied out and `D` in. Everything is little-endian; all integers of a plan fit `int32` (the
//! settings are checked for it), so an array of `u32` has the bytes of the `int32` tensor that it becomes.
//!
//! ```text
//!   "plan" | block_table_width u32 | step_id u64
//!   num_top_logprobs i32: -1: no sample wants log-probabilities; else the most alternatives that one wants
//!   flags u32: 1: another worker waits for blocks that the step fills, layer by layer; 2: some tokens are pending
//!   bytes of starts u32 | length of each array u32
//!   token_ids [T], -1 for PENDING_TOKEN | positions [T] | slot_mapping [T]
//!   query_start [S + 1] | context_lens [S] | slots [S]
//!   update_slots [U] | update_columns [U] | update_blocks [U]
//!   swap_out: blocks [C] | host blocks [C]        device blocks, and where in host memory they go
//!   swap_in: blocks [D] | host blocks [D]         device blocks, and where in host memory they come from
//!   sample_sequences [N] | sample_slots [N] | sample_positions [N]
//!   starts: a msgpack list of maps, or nothing
//! ```
//!
//! A reader needs no more than the lengths to find everything, and looks for nothing that the head does not announce: a
//! step lasts but milliseconds, and its first instructions run on cold caches.

use orchestra_core::{
    SamplingParams, TokenId,
    step::{PENDING_TOKEN, Sample, SequenceStart, StepOutput, StepPlan, TokenLogprobs},
};
use serde::{Serialize, Serializer};

const _: () = assert!(
    cfg!(target_endian = "little"),
    "arrays travel in memory order"
);

/// With this a plan begins; other messages to the shards do not.
const MAGIC: [u8; 4] = *b"plan";

/// Flags of a plan.
const FILLS_BLOCKS: u32 = 1;
const HAS_PENDING: u32 = 2;

/// Bytes before the arrays.
const HEAD_BYTES: usize = 28 + 4 * NUM_ARRAYS;

const NUM_ARRAYS: usize = 16;

/// An array of four-byte numbers, written as `bin`.
struct Array<'a, T>(&'a [T]);

impl<T: bytemuck::NoUninit> Serialize for Array<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytemuck::cast_slice(self.0))
    }
}

/// One sequence that takes a sampler slot.
#[derive(Serialize)]
struct StartMap<'a> {
    slot: u32,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    seed: u64,
    /// `int32[B]`
    logit_bias_ids: OwnedArray<TokenId>,
    /// `float32[B]`
    logit_bias_values: OwnedArray<f32>,
    /// `int32[P]`, empty where no penalty needs it.
    prompt_token_ids: Array<'a, TokenId>,
    /// `int32[O]`, empty where no penalty needs it.
    output_token_ids: Array<'a, TokenId>,
}

struct OwnedArray<T>(Vec<T>);

impl<T: bytemuck::NoUninit> Serialize for OwnedArray<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Array(&self.0).serialize(serializer)
    }
}

impl<'a> From<&'a SequenceStart> for StartMap<'a> {
    fn from(start: &'a SequenceStart) -> Self {
        let sampling: &SamplingParams = &start.sampling;
        Self {
            slot: start.slot,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            logit_bias_ids: OwnedArray(sampling.logit_bias.iter().map(|&(id, _)| id).collect()),
            logit_bias_values: OwnedArray(
                sampling.logit_bias.iter().map(|&(_, bias)| bias).collect(),
            ),
            prompt_token_ids: Array(&start.prompt_token_ids),
            output_token_ids: Array(&start.output_token_ids),
        }
    }
}

/// The plan as one message.
///
/// # Errors
/// None that a plan can cause: the msgpack encoder's own, which a `Vec` never raises.
pub fn encode_plan(plan: &StepPlan) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let column = |pick: fn(&Sample) -> u32| plan.samples.iter().map(pick).collect::<Vec<u32>>();
    let sample_sequences = column(|sample| sample.sequence_index);
    let sample_slots = column(|sample| sample.slot);
    let sample_positions = column(|sample| sample.position);
    let arrays: [&[u32]; NUM_ARRAYS] = [
        &plan.token_ids,
        &plan.positions,
        &plan.slot_mapping,
        &plan.query_start,
        &plan.context_lens,
        &plan.slots,
        &plan.update_slots,
        &plan.update_columns,
        &plan.update_blocks,
        &plan.swap_out.blocks,
        &plan.swap_out.host_blocks,
        &plan.swap_in.blocks,
        &plan.swap_in.host_blocks,
        &sample_sequences,
        &sample_slots,
        &sample_positions,
    ];
    let starts = encode_starts(&plan.starts)?;
    let num_words: usize = arrays.iter().map(|array| array.len()).sum();
    let mut bytes = Vec::with_capacity(HEAD_BYTES + 4 * num_words + starts.len());
    let num_top_logprobs = num_top_logprobs(plan).map_or(-1, |most| most as i32);
    bytes.extend(MAGIC);
    bytes.extend(plan.block_table_width.to_le_bytes());
    bytes.extend(plan.step_id.to_le_bytes());
    bytes.extend(num_top_logprobs.to_le_bytes());
    bytes.extend(flags(plan).to_le_bytes());
    bytes.extend((starts.len() as u32).to_le_bytes());
    bytes.extend(arrays.iter().flat_map(|it| (it.len() as u32).to_le_bytes()));
    for array in arrays {
        bytes.extend_from_slice(bytemuck::cast_slice(array));
    }
    bytes.extend_from_slice(&starts);
    Ok(bytes)
}

fn flags(plan: &StepPlan) -> u32 {
    let mut flags = 0;
    if !plan.filled.is_empty() {
        flags |= FILLS_BLOCKS;
    }
    if plan.token_ids.contains(&PENDING_TOKEN) {
        flags |= HAS_PENDING;
    }
    flags
}

/// Nothing, of most steps.
fn encode_starts(starts: &[SequenceStart]) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    if starts.is_empty() {
        return Ok(Vec::new());
    }
    let starts: Vec<StartMap<'_>> = starts.iter().map(StartMap::from).collect();
    rmp_serde::to_vec_named(&starts)
}

/// Alternatives that the model has to return for each sample: the most that one wants, `None` where none wants
/// log-probabilities at all.
pub fn num_top_logprobs(plan: &StepPlan) -> Option<u32> {
    plan.samples
        .iter()
        .filter_map(|sample| sample.logprobs)
        .max()
}

/// What the shards answer: `N` samples, each with `K = num_top_logprobs` alternatives. Little-endian.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputBuffers<'a> {
    /// `int32[N]` drawn tokens.
    pub token_ids: &'a [u8],
    /// `float32[N]` their log-probabilities; empty where the plan wants none.
    pub chosen_logprobs: &'a [u8],
    /// `int32[N, K]` the most likely tokens, most likely first; empty where the plan wants none.
    pub top_ids: &'a [u8],
    /// `float32[N, K]` their log-probabilities.
    pub top_logprobs: &'a [u8],
}

/// A buffer that does not fit the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutputError {
    /// Wrong length.
    #[error("{field} must have {expected} bytes ({shape}), has {got}")]
    Length {
        /// The buffer.
        field: &'static str,
        /// What it holds.
        shape: &'static str,
        /// Bytes that the plan asks for.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// A token id outside the vocabulary.
    #[error("{field}[{index}] is outside the vocabulary of {vocab_size} tokens")]
    Vocabulary {
        /// The buffer.
        field: &'static str,
        /// Which entry.
        index: usize,
        /// Tokens that exist.
        vocab_size: u32,
    },
}

/// What a plan wants back: one entry per sample, as in [`Sample::logprobs`](orchestra_core::step::Sample::logprobs).
#[derive(Clone, Debug)]
pub struct Wanted {
    logprobs: Vec<Option<u32>>,
    num_top_logprobs: Option<u32>,
    vocab_size: u32,
}

impl Wanted {
    /// What `plan` wants from a model with `vocab_size` tokens.
    pub fn new(plan: &StepPlan, vocab_size: u32) -> Self {
        Self {
            logprobs: plan.samples.iter().map(|sample| sample.logprobs).collect(),
            num_top_logprobs: num_top_logprobs(plan),
            vocab_size,
        }
    }

    /// Reads the answer to step `step_id`.
    ///
    /// # Errors
    /// A buffer of the wrong length, or with a token outside the vocabulary; the error names it.
    pub fn decode(
        &self,
        step_id: u64,
        buffers: &OutputBuffers<'_>,
    ) -> Result<StepOutput, OutputError> {
        let num_samples = self.logprobs.len();
        let token_ids = self.token_ids("token_ids", "int32[N]", buffers.token_ids, num_samples)?;
        let num_top = self.num_top_logprobs.unwrap_or(0) as usize;
        let num_chosen = if self.num_top_logprobs.is_some() {
            num_samples
        } else {
            0
        };

        let chosen = checked(
            "chosen_logprobs",
            "float32[N]",
            buffers.chosen_logprobs,
            num_chosen,
        )?;
        let num_entries = num_samples * num_top;
        let top_ids = self.token_ids("top_ids", "int32[N, K]", buffers.top_ids, num_entries)?;
        let top = checked(
            "top_logprobs",
            "float32[N, K]",
            buffers.top_logprobs,
            num_entries,
        )?;
        let top: Vec<(TokenId, f32)> = top_ids
            .into_iter()
            .zip(words(top).map(f32::from_le_bytes))
            .collect();

        let logprobs = words(chosen)
            .map(f32::from_le_bytes)
            .zip(&self.logprobs)
            .enumerate()
            .map(|(row, (chosen, wanted))| {
                let from = row * num_top;
                wanted.map(|count| TokenLogprobs {
                    chosen,
                    top: top
                        .iter()
                        .skip(from)
                        .take(count as usize)
                        .copied()
                        .collect(),
                })
            })
            .collect();
        Ok(StepOutput {
            step_id,
            token_ids,
            logprobs,
        })
    }

    fn token_ids(
        &self,
        field: &'static str,
        shape: &'static str,
        bytes: &[u8],
        expected: usize,
    ) -> Result<Vec<TokenId>, OutputError> {
        let ids: Vec<TokenId> = words(checked(field, shape, bytes, expected)?)
            .map(u32::from_le_bytes)
            .collect();
        // A negative id, read as u32, is above every vocabulary.
        match ids.iter().position(|&id| id >= self.vocab_size) {
            Some(index) => Err(OutputError::Vocabulary {
                field,
                index,
                vocab_size: self.vocab_size,
            }),
            None => Ok(ids),
        }
    }
}

/// `bytes`, when they hold exactly `count` four-byte numbers.
fn checked<'a>(
    field: &'static str,
    shape: &'static str,
    bytes: &'a [u8],
    count: usize,
) -> Result<&'a [u8], OutputError> {
    let expected = count * 4;
    if bytes.len() == expected {
        Ok(bytes)
    } else {
        Err(OutputError::Length {
            field,
            shape,
            expected,
            got: bytes.len(),
        })
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    bytes.as_chunks::<4>().0.iter().copied()
}
