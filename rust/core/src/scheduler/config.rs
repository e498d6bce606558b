//! Limits of a [`Scheduler`](super::Scheduler). Every default is written here and nowhere else.

use serde::{Deserialize, Serialize};

use super::policy::RoutePolicy;
use crate::config::ConfigIssue;

/// Workers of one cell: more belong to several schedulers, by model or region.
const NUM_WORKERS_MAX: u32 = 16_384;
/// Largest weight of a class; keeps the products of weights small.
const CLASS_WEIGHT_MAX: u32 = 1_000;
/// Longest wait for KV of another worker, milliseconds: workers let nobody touch a block for longer.
const MOVE_WAIT_MAX_MS: u32 = 60_000;
/// Largest weight of a token; keeps counters of service from running over.
const TOKEN_WEIGHT_MAX: u32 = 100;

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
    /// Most requests that may wait for room, route and placement requests counted apart; 0 lets nobody wait.
    pub max_num_waiting: u32,
    /// Most requests of one tenant that may wait for a worker.
    pub max_num_waiting_per_tenant: u32,
    /// Most tenants without a waiting request whose service each class of a queue remembers; also most tenants with a
    /// weight of their own.
    pub max_num_tenants: u32,
    /// Most later requests that may leave the queue before an earlier one gets its turn, whatever classes and tenants
    /// say.
    pub max_overtakes: u32,
    /// Most later requests of one tenant that may go before an earlier one because less of them is left to compute;
    /// 0 serves a tenant's requests strictly in order of arrival.
    pub max_tenant_overtakes: u32,
    /// Most requests that may be served elsewhere, beyond `max_overtakes`, while an overdue one finds no room; 0 lets
    /// everybody wait for it.
    pub max_bypasses: u32,
    /// Share of the grants that waiting requests of class `interactive` get, against the other classes' weights; 1 to
    /// 1,000.
    pub interactive_weight: u32,
    /// The same for class `standard`.
    pub standard_weight: u32,
    /// The same for class `batch`.
    pub batch_weight: u32,
    /// What a prompt token that has to be computed counts towards its tenant's share, 1 to 100.
    pub input_token_weight: u32,
    /// What an output token counts, 1 to 100.
    pub output_token_weight: u32,
    /// Refuse a request at once whose first token is predicted to miss its deadline.
    pub refuse_hopeless: bool,
    /// GPU memory is given out in multiples of this many bytes; a power of two.
    pub extent_bytes: u64,
    /// How a request's worker is chosen.
    pub policy: RoutePolicy,
    /// What a sequence in the batch weighs under `prefix_sum`, in tokens of prefill.
    pub seq_cost_tokens: u32,
    /// What fetching a token's KV costs, in thousandths of computing it: under `transfer_aware` for workers that do not
    /// say how they exchange KV, and for those that do until their speed is known.
    pub fetch_cost_permille: u32,
    /// How fast KV moves between workers until that is learned, bytes a second; at least 1.
    pub fetch_bytes_per_s: u64,
    /// What a fetch takes besides moving the bytes, microseconds.
    pub fetch_latency_us: u32,
    /// The shortest time that a worker waits for KV of another one before it computes for itself, however soon that
    /// should come; milliseconds.
    pub move_wait_min_ms: u32,
    /// The longest time that it waits for blocks that exist, 1 to 60,000 milliseconds.
    pub fetch_wait_max_ms: u32,
    /// The longest time that it waits for blocks that another one has yet to compute, 1 to 60,000 milliseconds.
    pub split_wait_max_ms: u32,
    /// Prompts of which a worker lacks fewer tokens are not computed for it elsewhere.
    pub split_min_tokens: u32,
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
            max_num_waiting_per_tenant: 8_192,
            max_num_tenants: 4_096,
            max_overtakes: 16_384,
            max_tenant_overtakes: 64,
            max_bypasses: 16_384,
            interactive_weight: 16,
            standard_weight: 4,
            batch_weight: 1,
            input_token_weight: 1,
            output_token_weight: 2,
            refuse_hopeless: false,
            extent_bytes: 64 << 20,
            policy: RoutePolicy::default(),
            seq_cost_tokens: 64,
            fetch_cost_permille: 100,
            fetch_bytes_per_s: 1_000_000_000,
            fetch_latency_us: 5_000,
            move_wait_min_ms: 1_000,
            fetch_wait_max_ms: 5_000,
            split_wait_max_ms: 60_000,
            split_min_tokens: 256,
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
            (
                "max_num_waiting_per_tenant",
                self.max_num_waiting_per_tenant,
            ),
            ("max_num_tenants", self.max_num_tenants),
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
        if self.fetch_bytes_per_s == 0 {
            issues.push(ConfigIssue::new("fetch_bytes_per_s", "must be at least 1"));
        }
        if !self.extent_bytes.is_power_of_two() {
            let message = format!("must be a power of two, got {}", self.extent_bytes);
            issues.push(ConfigIssue::new("extent_bytes", message));
        }
        let bounded = [
            (
                "fetch_wait_max_ms",
                self.fetch_wait_max_ms,
                MOVE_WAIT_MAX_MS,
            ),
            (
                "split_wait_max_ms",
                self.split_wait_max_ms,
                MOVE_WAIT_MAX_MS,
            ),
            (
                "interactive_weight",
                self.interactive_weight,
                CLASS_WEIGHT_MAX,
            ),
            ("standard_weight", self.standard_weight, CLASS_WEIGHT_MAX),
            ("batch_weight", self.batch_weight, CLASS_WEIGHT_MAX),
            (
                "input_token_weight",
                self.input_token_weight,
                TOKEN_WEIGHT_MAX,
            ),
            (
                "output_token_weight",
                self.output_token_weight,
                TOKEN_WEIGHT_MAX,
            ),
        ];
        for (key, value, max) in bounded {
            if !(1..=max).contains(&value) {
                let message = format!("must be 1 to {max}, got {value}");
                issues.push(ConfigIssue::new(key, message));
            }
        }
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }
}
