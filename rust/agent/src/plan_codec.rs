//! A step as the shards see it: the plan as one msgpack map, the answer as raw little-endian arrays.
//!
//! `orchestra/worker/plan.py` reads the same map. All integers of a plan fit `int32` (the settings are checked for
//! it), so an array of `u32` has the bytes of the `int32` tensor that it becomes.

use orchestra_core::{
    SamplingParams, TokenId,
    step::{SequenceStart, StepOutput, StepPlan, TokenLogprobs},
};
use serde::{Serialize, Serializer};

const _: () = assert!(
    cfg!(target_endian = "little"),
    "arrays travel in memory order"
);

/// An array of four-byte numbers, written as `bin`.
struct Array<'a, T>(&'a [T]);

impl<T: bytemuck::NoUninit> Serialize for Array<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytemuck::cast_slice(self.0))
    }
}

/// The map, field for field. `T` tokens of `S` sequences run, `N` draw, `U` entries of the block tables change.
#[derive(Serialize)]
struct PlanMap<'a> {
    step_id: u64,
    /// `int32[T]`; -1 for `PENDING_TOKEN`
    token_ids: Array<'a, TokenId>,
    /// `int32[T]`
    positions: Array<'a, u32>,
    /// `int32[T]`
    slot_mapping: Array<'a, u32>,
    /// `int32[S + 1]`
    query_start: Array<'a, u32>,
    /// `int32[S]`
    context_lens: Array<'a, u32>,
    /// `int32[S]`
    slots: Array<'a, u32>,
    block_table_width: u32,
    /// `int32[U]`
    update_slots: Array<'a, u32>,
    /// `int32[U]`
    update_columns: Array<'a, u32>,
    /// `int32[U]`
    update_blocks: Array<'a, u32>,
    /// `int32[C]`: device blocks, and where in host memory they go.
    swap_out_blocks: Array<'a, u32>,
    /// `int32[C]`
    swap_out_host_blocks: Array<'a, u32>,
    /// `int32[D]`: device blocks, and where in host memory they come from.
    swap_in_blocks: Array<'a, u32>,
    /// `int32[D]`
    swap_in_host_blocks: Array<'a, u32>,
    /// `int32[N]`
    sample_sequences: Array<'a, u32>,
    /// `int32[N]`
    sample_slots: Array<'a, u32>,
    /// `int32[N]`
    sample_positions: Array<'a, u32>,
    /// -1: no sample wants log-probabilities; else the most alternatives that one wants.
    num_top_logprobs: i32,
    /// Whether another worker waits for blocks that the step fills, layer by layer.
    fills_blocks: bool,
    starts: Vec<StartMap<'a>>,
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

/// The plan as one msgpack map; arrays are `bin` of little-endian `int32`.
///
/// # Errors
/// None that a plan can cause: the encoder's own, which a `Vec` never raises.
pub fn encode_plan(plan: &StepPlan) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let column = |pick: fn(&_) -> u32| plan.samples.iter().map(pick).collect::<Vec<u32>>();
    let sample_sequences = column(|sample: &orchestra_core::step::Sample| sample.sequence_index);
    let sample_slots = column(|sample| sample.slot);
    let sample_positions = column(|sample| sample.position);
    let map = PlanMap {
        step_id: plan.step_id,
        token_ids: Array(&plan.token_ids),
        positions: Array(&plan.positions),
        slot_mapping: Array(&plan.slot_mapping),
        query_start: Array(&plan.query_start),
        context_lens: Array(&plan.context_lens),
        slots: Array(&plan.slots),
        block_table_width: plan.block_table_width,
        update_slots: Array(&plan.update_slots),
        update_columns: Array(&plan.update_columns),
        update_blocks: Array(&plan.update_blocks),
        swap_out_blocks: Array(&plan.swap_out.blocks),
        swap_out_host_blocks: Array(&plan.swap_out.host_blocks),
        swap_in_blocks: Array(&plan.swap_in.blocks),
        swap_in_host_blocks: Array(&plan.swap_in.host_blocks),
        sample_sequences: Array(&sample_sequences),
        sample_slots: Array(&sample_slots),
        sample_positions: Array(&sample_positions),
        num_top_logprobs: num_top_logprobs(plan).map_or(-1, |most| most as i32),
        fills_blocks: !plan.filled.is_empty(),
        starts: plan.starts.iter().map(StartMap::from).collect(),
    };
    rmp_serde::to_vec_named(&map)
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
