//! What every door turns its input into, and what the corridor streams back.

use std::time::Duration;

use orchestra_core::{
    SamplingParams, TokenId,
    step::{FinishReason, TokenLogprobs},
};

use crate::caller::Caller;
use crate::observe::Record;

/// One generation request, parsed and not yet checked against a model.
#[derive(Clone, Debug)]
pub struct GenerateInput {
    /// The model that the client named.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Sampling fields that the client gave; the rest come from the model's generation config, then defaults.
    pub sampling: SamplingPatch,
    /// Strings that end the output before them. At most 16, each 1 to 256 bytes.
    pub stop: Vec<String>,
    /// Choices, 1..=32.
    pub n: u32,
    /// How long the client will wait; `None`: the router's limit.
    pub timeout: Option<Duration>,
    /// Isolates the prefix cache.
    pub cache_salt: String,
    /// Who asks, and how urgently.
    pub caller: Caller,
    /// What is taken down of it.
    pub record: Record,
}

/// The three forms of a prompt.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Plain text, tokenised with the model's special tokens.
    Text(String),
    /// Token ids, used as they are.
    TokenIds(Vec<TokenId>),
    /// Messages for the model's chat template.
    Chat {
        /// The OpenAI `messages` array; `content` parts already joined to strings.
        messages: Vec<serde_json::Value>,
        /// The OpenAI `tools` array, handed to the template; empty: none.
        tools: Vec<serde_json::Value>,
        /// Further template variables (`chat_template_kwargs`).
        template_kwargs: serde_json::Map<String, serde_json::Value>,
    },
}

/// Sampling fields as given; `None` was not given.
#[derive(Clone, Debug, Default)]
pub struct SamplingPatch {
    /// See [`orchestra_core::SamplingParams`], as for every field here.
    pub max_tokens: Option<u32>,
    /// 0..=2.
    pub temperature: Option<f32>,
    /// (0, 1].
    pub top_p: Option<f32>,
    /// 0: all.
    pub top_k: Option<u32>,
    /// 0..=1.
    pub min_p: Option<f32>,
    /// (0, 2].
    pub repetition_penalty: Option<f32>,
    /// -2..=2.
    pub presence_penalty: Option<f32>,
    /// -2..=2.
    pub frequency_penalty: Option<f32>,
    /// Choice `i` draws with `seed + i`.
    pub seed: Option<u64>,
    /// At most 64.
    pub stop_token_ids: Vec<TokenId>,
    /// Do not end at end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Alternatives per token; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// At most 1024.
    pub logit_bias: Vec<(TokenId, f32)>,
}

impl SamplingPatch {
    /// The given values over these; `max_tokens` that nobody gave is `max_tokens_default`.
    pub fn over(self, defaults: &SamplingParams, max_tokens_default: u32) -> SamplingParams {
        SamplingParams {
            max_tokens: self.max_tokens.unwrap_or(max_tokens_default),
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed.unwrap_or(defaults.seed),
            stop_token_ids: self.stop_token_ids,
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            logit_bias: self.logit_bias,
        }
    }
}

/// A piece of one choice.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    /// Which choice, `0..n`.
    pub index: u32,
    /// Text that is complete: never half a character, never part of a stop string.
    pub text: String,
    /// New tokens. A token may come before its text, where that is held back.
    pub token_ids: Vec<TokenId>,
    /// One per token where asked for, else empty.
    pub logprobs: Vec<TokenLogprobs>,
    /// Set on the choice's last chunk.
    pub finish: Option<Finish>,
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// Output tokens of this choice.
    pub completion_tokens: u32,
    /// Prompt tokens that the prefix cache gave.
    pub cached_tokens: u32,
}
