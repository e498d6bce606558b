//! The limits of one replica's steps.

use serde::{Deserialize, Serialize};

use crate::config::ConfigIssue;

/// Settings of a [`StepScheduler`](super::StepScheduler).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StepSchedulerConfig {
    /// Tokens per KV block.
    pub block_size: u32,
    /// KV blocks of the replica. Depends on its memory, so there is no default: it has to be given.
    pub num_blocks: u32,
    /// Most sequences that run at a time; also the number of sampler slots.
    pub max_num_seqs: u32,
    /// Most tokens of one step, prefill and decode together.
    pub max_num_batched_tokens: u32,
    /// Most tokens of one sequence, prompt and output together. Depends on the model: it has to be given.
    pub max_model_len: u32,
    /// Most requests that wait to start; one more is refused.
    pub max_num_waiting: u32,
    /// Most steps that are planned and not committed: as many as the runner has stages. The sequences that decode, and
    /// the prefill tokens, are divided among them, unless `plans_ahead`.
    pub max_steps_in_flight: u32,
    /// Plan a sequence's next step before the token of its last one is drawn: the runner takes the token from where it
    /// drew it. Steps in flight then follow each other through one stage, and each has everybody; whoever turns out to
    /// have ended is computed once too often.
    pub plans_ahead: bool,
    /// Most prefill tokens of one sequence in one step; 0 leaves only the token budget.
    pub max_prefill_chunk: u32,
    /// How long a step may last while sequences decode, µs: their time per output token. The prefill tokens of a
    /// step are limited to what is predicted to fit; 0 leaves only the token budget.
    pub tpot_target_us: u32,
    /// Fewest prefill tokens that `tpot_target_us` leaves to a step, so that prompts go on when decodes alone last
    /// longer; and fewest to which `max_steps_in_flight` divides them.
    pub min_prefill_tokens: u32,
    /// Reuse the KV of equal prefixes.
    pub enable_prefix_cache: bool,
    /// Most later requests that may start before an earlier one because less of them is left to compute;
    /// 0 starts requests strictly in order of arrival.
    pub max_overtakes: u32,
    /// Most steps that a request is held back while another computes the prefix that both share; 0 never
    /// holds one back.
    pub max_prefix_wait_steps: u32,
    /// KV blocks of host memory that keep what preempted sequences have computed; with 0 they compute it again.
    pub num_host_blocks: u32,
    /// What it costs to copy a token's KV to host memory and back, in thousandths of computing it again.
    pub swap_cost_permille: u32,
    /// Tokens that end a sequence unless it ignores them.
    pub eos_token_ids: Vec<u32>,
}

impl Default for StepSchedulerConfig {
    fn default() -> Self {
        Self {
            block_size: 16,
            num_blocks: 0,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            max_model_len: 0,
            max_num_waiting: 8192,
            max_steps_in_flight: 1,
            plans_ahead: false,
            max_prefill_chunk: 0,
            tpot_target_us: 0,
            min_prefill_tokens: 64,
            enable_prefix_cache: true,
            max_overtakes: 64,
            max_prefix_wait_steps: 64,
            num_host_blocks: 0,
            // 328 kB per token (70 billion parameters) over 4 links of 25 GB/s take 3.3 µs one way, its prefill 70 µs.
            swap_cost_permille: 100,
            eos_token_ids: Vec::new(),
        }
    }
}

impl StepSchedulerConfig {
    /// Checks every setting and returns all that is wrong.
    pub fn validate(&self) -> Result<(), Vec<ConfigIssue>> {
        let mut issues = Vec::new();
        let positive = [
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_num_waiting", self.max_num_waiting),
            ("max_steps_in_flight", self.max_steps_in_flight),
            ("min_prefill_tokens", self.min_prefill_tokens),
        ];
        for (key, value) in positive {
            if value == 0 {
                issues.push(ConfigIssue::new(key, "must be at least 1, got 0"));
            }
        }
        if self.max_model_len < 2 {
            let message = format!(
                "must be at least 2 (one prompt token, one output token), got {}",
                self.max_model_len
            );
            issues.push(ConfigIssue::new("max_model_len", message));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            let message = format!(
                "must be at least max_num_seqs, so that every running sequence can decode in every step: \
                 {} < {}",
                self.max_num_batched_tokens, self.max_num_seqs
            );
            issues.push(ConfigIssue::new("max_num_batched_tokens", message));
        }
        if i32::try_from(self.num_host_blocks).is_err() {
            let message = format!("at most {}, got {}", i32::MAX, self.num_host_blocks);
            issues.push(ConfigIssue::new("num_host_blocks", message));
        }
        let slots = u64::from(self.num_blocks) * u64::from(self.block_size);
        if i32::try_from(slots).is_err() {
            let message = format!(
                "num_blocks * block_size = {} * {} = {slots} token slots, at most {} can be addressed",
                self.num_blocks,
                self.block_size,
                i32::MAX
            );
            issues.push(ConfigIssue::new("num_blocks", message));
        }
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(config: &StepSchedulerConfig) -> Vec<String> {
        let issues = config.validate().err().unwrap_or_default();
        issues.into_iter().map(|issue| issue.key).collect()
    }

    #[test]
    fn defaults_lack_only_what_depends_on_model_and_memory() {
        let config = StepSchedulerConfig::default();
        assert_eq!(keys(&config), ["num_blocks", "max_model_len"]);
        let config = StepSchedulerConfig {
            num_blocks: 1,
            max_model_len: 2,
            ..config
        };
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn everything_wrong_is_said_at_once_with_its_arithmetic() {
        let config = StepSchedulerConfig {
            block_size: 1 << 16,
            num_blocks: 1 << 15,
            max_num_seqs: 300,
            max_num_batched_tokens: 256,
            max_num_waiting: 0,
            ..StepSchedulerConfig::default()
        };
        let issues = config.validate().err().unwrap_or_default();
        let texts: Vec<String> = issues.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "max_num_waiting: must be at least 1, got 0",
                "max_model_len: must be at least 2 (one prompt token, one output token), got 0",
                "max_num_batched_tokens: must be at least max_num_seqs, so that every running \
                 sequence can decode in every step: 256 < 300",
                "num_blocks: num_blocks * block_size = 32768 * 65536 = 2147483648 token slots, at \
                 most 2147483647 can be addressed",
            ]
        );
    }

    #[test]
    fn files_may_leave_settings_out_and_may_not_invent_any() {
        let config: StepSchedulerConfig = serde_json::from_str(r#"{"num_blocks": 9}"#).unwrap();
        assert_eq!(
            config,
            StepSchedulerConfig {
                num_blocks: 9,
                ..StepSchedulerConfig::default()
            }
        );
        assert!(serde_json::from_str::<StepSchedulerConfig>(r#"{"num_block": 9}"#).is_err());
    }
}
