//! How the next token is drawn: the parameters, their ranges, and one validator for every door.

use serde::{Deserialize, Serialize};

use crate::ids::TokenId;

/// Most stop tokens a request may name.
pub const STOP_TOKEN_IDS_MAX: usize = 64;
/// Most logit biases a request may name.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Most alternatives returned with each token.
pub const LOGPROBS_MAX: u32 = 20;

/// Sampling parameters, resolved: every field has its value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingParams {
    /// Most output tokens to generate.
    pub max_tokens: u32,
    /// 0 is greedy; 0..=2.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; (0, 1].
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens below this share of the most likely one; 0..=1.
    pub min_p: f32,
    /// Divides (multiplies where negative) logits of tokens seen in prompt or output; (0, 2].
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens seen in the output; -2..=2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; -2..=2.
    pub frequency_penalty: f32,
    /// The random stream is a function of (seed, position) alone.
    pub seed: u64,
    /// Generation ends at any of these, which is the last token returned.
    pub stop_token_ids: Vec<TokenId>,
    /// Do not end at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Return log-probabilities: the chosen token's and this many alternatives'.
    pub logprobs: Option<u32>,
    /// Added to logits before sampling; each within -100..=100.
    pub logit_bias: Vec<(TokenId, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            logit_bias: Vec::new(),
        }
    }
}

/// A sampling field that is out of its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} must be {expected}, got {got}")]
pub struct SamplingError {
    /// The field as clients spell it.
    pub field: &'static str,
    /// The range in words.
    pub expected: &'static str,
    /// What was given.
    pub got: String,
}

impl SamplingParams {
    /// Checks every range; the first violation is returned. NaN is in no range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let error = |field, expected, got: String| {
            Err(SamplingError {
                field,
                expected,
                got,
            })
        };
        let within = |value: f32, low: f32, high: f32| value >= low && value <= high;
        if self.max_tokens == 0 {
            return error("max_tokens", "at least 1", "0".to_owned());
        }
        if !within(self.temperature, 0.0, 2.0) {
            return error(
                "temperature",
                "between 0 and 2",
                self.temperature.to_string(),
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return error("top_p", "above 0 and at most 1", self.top_p.to_string());
        }
        if !within(self.min_p, 0.0, 1.0) {
            return error("min_p", "between 0 and 1", self.min_p.to_string());
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 2.0) {
            let got = self.repetition_penalty.to_string();
            return error("repetition_penalty", "above 0 and at most 2", got);
        }
        if !within(self.presence_penalty, -2.0, 2.0) {
            let got = self.presence_penalty.to_string();
            return error("presence_penalty", "between -2 and 2", got);
        }
        if !within(self.frequency_penalty, -2.0, 2.0) {
            let got = self.frequency_penalty.to_string();
            return error("frequency_penalty", "between -2 and 2", got);
        }
        self.validate_lists()
    }

    fn validate_lists(&self) -> Result<(), SamplingError> {
        let error = |field, expected, got: String| {
            Err(SamplingError {
                field,
                expected,
                got,
            })
        };
        if self.stop_token_ids.len() > STOP_TOKEN_IDS_MAX {
            let got = self.stop_token_ids.len().to_string();
            return error("stop_token_ids", "at most 64 tokens", got);
        }
        if let Some(count) = self.logprobs.filter(|&count| count > LOGPROBS_MAX) {
            return error("logprobs", "between 0 and 20", count.to_string());
        }
        if self.logit_bias.len() > LOGIT_BIAS_MAX {
            let got = self.logit_bias.len().to_string();
            return error("logit_bias", "at most 1024 tokens", got);
        }
        if let Some((_, bias)) = self
            .logit_bias
            .iter()
            .find(|(_, bias)| !(-100.0..=100.0).contains(bias))
        {
            return error("logit_bias", "between -100 and 100", bias.to_string());
        }
        Ok(())
    }

    /// Whether sampling needs to know which tokens came before.
    #[expect(
        clippy::float_cmp,
        reason = "exactly these values switch a penalty off"
    )]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(SamplingParams::default().validate(), Ok(()));
    }

    #[test]
    fn every_range_is_held_and_names_its_field() {
        type Change = fn(&mut SamplingParams);
        let cases: [(&str, Change); 11] = [
            ("max_tokens", |params| params.max_tokens = 0),
            ("temperature", |params| params.temperature = f32::NAN),
            ("temperature", |params| params.temperature = 2.5),
            ("top_p", |params| params.top_p = 0.0),
            ("min_p", |params| params.min_p = -0.1),
            ("repetition_penalty", |params| {
                params.repetition_penalty = 0.0;
            }),
            ("presence_penalty", |params| params.presence_penalty = 2.1),
            ("frequency_penalty", |params| {
                params.frequency_penalty = f32::INFINITY;
            }),
            ("stop_token_ids", |params| {
                params.stop_token_ids = vec![1; 65];
            }),
            ("logprobs", |params| params.logprobs = Some(21)),
            ("logit_bias", |params| {
                params.logit_bias = vec![(1, f32::NAN)];
            }),
        ];
        for (field, change) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            assert_eq!(params.validate().map_err(|error| error.field), Err(field));
        }
    }
}
