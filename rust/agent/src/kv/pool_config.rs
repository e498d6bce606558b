//! What a [`KvPool`](super::pool::KvPool) is made by.

use std::net::IpAddr;

use orchestra_core::config::ConfigIssue;
use orchestra_memory::slab::SLAB_BYTES_UNREGISTERED_MAX;
use serde::{Deserialize, Serialize};

/// Bytes of a failure domain's name.
const DOMAIN_BYTES_MAX: usize = 128;
/// Bytes of a layout's name.
const LAYOUT_BYTES_MAX: usize = 256;

/// What moves KV between two workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvTransports {
    /// Shared memory where both are on one host; TCP elsewhere, where there is an address for it.
    #[default]
    Auto,
    /// Shared memory alone.
    Shm,
    /// TCP alone.
    Tcp,
}

/// Settings of a [`KvPool`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvPoolConfig {
    /// Layers of the model; where several ranks compute, what each of them holds of a layer is one of these.
    pub num_layers: u32,
    /// KV blocks, as many as the step scheduler has.
    pub num_blocks: u32,
    /// Blocks of host memory that lie behind them, as many as the step scheduler has.
    pub num_host_blocks: u32,
    /// Blocks between the two that no sequence ever has: ranks warm up in them while others may be read.
    pub num_scratch_blocks: u32,
    /// What a block holds of one layer, bytes.
    pub layer_block_bytes: u64,
    /// Equal where two workers may exchange blocks; 1 to 256 bytes.
    pub layout: String,
    /// What fails together with this worker, at most 128 bytes; empty: the host, by its boot.
    pub failure_domain: String,
    /// Another worker is to keep copies of what the prefix cache holds.
    pub write_through: bool,
    /// What moves KV.
    pub transports: KvTransports,
    /// The address under which workers on other hosts reach this one. Without it TCP serves this host only.
    pub address: Option<IpAddr>,
}

impl Default for KvPoolConfig {
    fn default() -> Self {
        Self {
            num_layers: 0,
            num_blocks: 0,
            num_host_blocks: 0,
            num_scratch_blocks: 0,
            layer_block_bytes: 0,
            layout: String::new(),
            failure_domain: String::new(),
            write_through: false,
            transports: KvTransports::Auto,
            address: None,
        }
    }
}

impl KvPoolConfig {
    /// Checks every setting and returns all problems at once.
    pub fn validate(&self) -> Result<(), Vec<ConfigIssue>> {
        let mut issues = Vec::new();
        let counts = [
            ("num_layers", u64::from(self.num_layers)),
            ("num_blocks", u64::from(self.num_blocks)),
            ("layer_block_bytes", self.layer_block_bytes),
        ];
        for (key, _) in counts.into_iter().filter(|&(_, count)| count == 0) {
            issues.push(ConfigIssue::new(key, "must be at least 1".to_owned()));
        }
        if self.layout.is_empty() || self.layout.len() > LAYOUT_BYTES_MAX {
            let message = format!("must have 1 to {LAYOUT_BYTES_MAX} bytes");
            issues.push(ConfigIssue::new("layout", message));
        }
        if self.failure_domain.len() > DOMAIN_BYTES_MAX {
            let message = format!("must have at most {DOMAIN_BYTES_MAX} bytes");
            issues.push(ConfigIssue::new("failure_domain", message));
        }
        if self
            .bytes()
            .is_none_or(|bytes| bytes > SLAB_BYTES_UNREGISTERED_MAX)
        {
            let message = format!(
                "{} + {} + {} blocks of {} layers and {} bytes each must fit in {SLAB_BYTES_UNREGISTERED_MAX} bytes",
                self.num_blocks,
                self.num_scratch_blocks,
                self.num_host_blocks,
                self.num_layers,
                self.layer_block_bytes
            );
            issues.push(ConfigIssue::new("num_blocks", message));
        }
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }

    /// Bytes of the cache.
    pub(super) fn bytes(&self) -> Option<u64> {
        let counts = [
            self.num_blocks,
            self.num_scratch_blocks,
            self.num_host_blocks,
        ];
        u64::from(self.num_layers)
            .checked_mul(counts.into_iter().map(u64::from).sum())?
            .checked_mul(self.layer_block_bytes)
    }

    /// Blocks of a layer that sequences may have: those of the device, then those of host memory.
    pub(crate) const fn num_all_blocks(&self) -> u32 {
        self.num_blocks.saturating_add(self.num_host_blocks)
    }

    /// Slots of a layer.
    pub(super) const fn layer_slots(&self) -> u32 {
        self.num_all_blocks()
            .saturating_add(self.num_scratch_blocks)
    }

    pub(super) const fn num_slots(&self) -> u32 {
        self.num_layers.saturating_mul(self.layer_slots())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(config: &KvPoolConfig) -> Vec<String> {
        let issues = config.validate().unwrap_err();
        issues.into_iter().map(|issue| issue.key).collect()
    }

    #[test]
    fn what_no_pool_can_be_is_refused_with_every_reason() {
        let none = wrong(&KvPoolConfig::default());
        assert_eq!(
            none,
            ["num_layers", "num_blocks", "layer_block_bytes", "layout"]
        );
        let good = KvPoolConfig {
            num_layers: 3,
            num_blocks: 5,
            layer_block_bytes: 1000,
            layout: "test".to_owned(),
            ..KvPoolConfig::default()
        };
        assert_eq!(good.validate(), Ok(()));
        let large = KvPoolConfig {
            num_blocks: u32::MAX,
            ..good.clone()
        };
        assert_eq!(wrong(&large), ["num_blocks"]);
        let overflowing = KvPoolConfig {
            layer_block_bytes: u64::MAX,
            ..good
        };
        assert_eq!(wrong(&overflowing), ["num_blocks"]);
    }
}
