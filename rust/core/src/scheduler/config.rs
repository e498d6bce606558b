//! Limits of a [`Scheduler`](super::Scheduler). Every default is written here and nowhere else.

use serde::{Deserialize, Serialize};

use super::policy::RoutePolicy;
use crate::config::ConfigIssue;

/// Workers of one cell: more belong to several schedulers, by model or region.
const NUM_WORKERS_MAX: u32 = 16_384;

/// Settings of a [`Scheduler`](super::Scheduler).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerConfig {
    /// Most workers that may be registered, at most 16,384.
    pub max_num_workers: u32,
    /// Most GPUs that may be registered.
    pub max_num_gpus: u32,
    /// Most reservations and placements that may be held at once, counted apart.
    pub max_num_reservations: u32,
    /// Most requests that may wait for room, route and placement requests counted apart.
    pub max_num_waiting: u32,
    /// GPU memory is given out in multiples of this many bytes; a power of two.
    pub extent_bytes: u64,
    /// How a request's worker is chosen.
    pub policy: RoutePolicy,
    /// What a sequence in the batch weighs under `prefix_sum`, in tokens of prefill.
    pub seq_cost_tokens: u32,
    /// What fetching a token's KV costs under `transfer_aware`, in thousandths of computing it.
    pub fetch_cost_permille: u32,
    /// What loading a LoRA adapter costs, in tokens of prefill.
    pub lora_load_tokens: u32,
    /// Start of the random numbers of `random` and `power_of_two`.
    pub seed: u64,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            max_num_workers: NUM_WORKERS_MAX,
            max_num_gpus: 131_072,
            max_num_reservations: 1_048_576,
            max_num_waiting: 8_192,
            extent_bytes: 64 << 20,
            policy: RoutePolicy::default(),
            seq_cost_tokens: 64,
            fetch_cost_permille: 100,
            lora_load_tokens: 2048,
            seed: 0,
        }
    }
}

impl SchedulerConfig {
    /// Checks every setting; all problems are returned at once.
    pub fn validate(&self) -> Result<(), Vec<ConfigIssue>> {
        let counts = [
            ("max_num_workers", self.max_num_workers),
            ("max_num_gpus", self.max_num_gpus),
            ("max_num_reservations", self.max_num_reservations),
            ("max_num_waiting", self.max_num_waiting),
        ];
        let mut issues: Vec<ConfigIssue> = counts
            .into_iter()
            .filter(|&(_, value)| value == 0)
            .map(|(key, _)| ConfigIssue::new(key, "must be at least 1"))
            .collect();
        if self.max_num_workers > NUM_WORKERS_MAX {
            let message = format!("must be at most {NUM_WORKERS_MAX}");
            issues.push(ConfigIssue::new("max_num_workers", message));
        }
        if !self.extent_bytes.is_power_of_two() {
            let message = format!("must be a power of two, got {}", self.extent_bytes);
            issues.push(ConfigIssue::new("extent_bytes", message));
        }
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }
}
