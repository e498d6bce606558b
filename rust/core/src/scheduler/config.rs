//! Limits of a [`Scheduler`](super::Scheduler). Every default is written here and nowhere else.

use serde::{Deserialize, Serialize};

use crate::config::ConfigIssue;

/// Settings of a [`Scheduler`](super::Scheduler).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerConfig {
    /// Most workers that may be registered.
    pub max_num_workers: u32,
    /// Most GPUs that may be registered.
    pub max_num_gpus: u32,
    /// Most reservations and placements that may be held at once, counted apart.
    pub max_num_reservations: u32,
    /// Most requests that may wait for room, route and placement requests counted apart.
    pub max_num_waiting: u32,
    /// GPU memory is given out in multiples of this many bytes; a power of two.
    pub extent_bytes: u64,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            max_num_workers: 16_384,
            max_num_gpus: 131_072,
            max_num_reservations: 1_048_576,
            max_num_waiting: 8_192,
            extent_bytes: 64 << 20,
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
