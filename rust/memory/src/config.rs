//! Settings of pools and of the manager. `Default` is the only place where a number is written.

use std::{num::NonZeroUsize, time::Duration};

use crate::{
    error::MemoryError,
    slab::{SLAB_ALIGN, SLAB_BYTES_UNREGISTERED_MAX, SlabConfig},
    tier::Tier,
};

/// The most slots that a pool may have: numbers of slots and lengths of runs fit in 31 bits.
const SLOTS_MAX: u64 = 1 << 30;

/// A pool: blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Where its blocks lie.
    pub tier: Tier,
    /// Bytes of a block: at least 1, at most a slab.
    pub block_bytes: u64,
    /// Bytes of a slab: a multiple of 2 MiB, at most 4 GiB where a transport registers it with a card, else 1 TiB. A
    /// rest that holds no whole block stays unused.
    pub slab_bytes: u64,
    /// Slabs made at once. Peers know those that exist when they connect.
    pub initial_slabs: u32,
    /// Slabs that there may be; more are made when an allocation does not fit.
    pub max_slabs: u32,
    /// Whether to try huge pages.
    pub huge_pages: bool,
    /// Whether a new slab is touched at once; see [`SlabConfig::prefault`].
    pub prefault: bool,
    /// Threads that touch a new slab.
    pub prefault_threads: NonZeroUsize,
    /// The NUMA node that slabs in host memory come from; the kernel's choice where `None`.
    pub numa_node: Option<u32>,
}

impl Default for PoolConfig {
    fn default() -> Self {
        let slab = SlabConfig::default();
        Self {
            tier: slab.tier,
            block_bytes: 64 << 10,
            slab_bytes: slab.len,
            initial_slabs: 1,
            max_slabs: 1,
            huge_pages: slab.huge_pages,
            prefault: slab.prefault,
            prefault_threads: slab.prefault_threads,
            numa_node: slab.numa_node,
        }
    }
}

impl PoolConfig {
    /// Refuses what cannot be a pool.
    pub fn validate(&self) -> Result<(), MemoryError> {
        let refuse = |field, expected| Err(MemoryError::InvalidField { field, expected });
        if self.slab_bytes == 0
            || !self.slab_bytes.is_multiple_of(SLAB_ALIGN)
            || self.slab_bytes > SLAB_BYTES_UNREGISTERED_MAX
        {
            return refuse("slab_bytes", "a positive multiple of 2 MiB, at most 1 TiB");
        }
        if self.block_bytes == 0 || self.block_bytes > self.slab_bytes {
            return refuse("block_bytes", "at least 1 and at most slab_bytes");
        }
        if self.max_slabs == 0 || self.initial_slabs > self.max_slabs {
            return refuse("max_slabs", "at least 1 and at least initial_slabs");
        }
        if u64::from(self.slots_per_slab()) * u64::from(self.max_slabs) > SLOTS_MAX {
            return refuse("max_slabs", "small enough for at most 2^30 blocks");
        }
        if !self.tier.is_host() && self.numa_node.is_some() {
            return refuse("numa_node", "absent where the memory is a device's");
        }
        Ok(())
    }

    /// Whole blocks in a slab.
    pub const fn slots_per_slab(&self) -> u32 {
        (self.slab_bytes / self.block_bytes) as u32
    }

    /// Bytes of all slabs that there may be.
    pub const fn max_bytes(&self) -> u64 {
        self.slab_bytes * self.max_slabs as u64
    }

    /// How each slab is made.
    pub const fn slab(&self) -> SlabConfig {
        SlabConfig {
            tier: self.tier,
            len: self.slab_bytes,
            huge_pages: self.huge_pages,
            prefault: self.prefault,
            prefault_threads: self.prefault_threads,
            numa_node: self.numa_node,
        }
    }
}

/// What to do where the process may lock less memory than the slabs need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemlockPolicy {
    /// Refuse to make the pool: registering would fail later, and less clearly.
    Require,
    /// Make it: no transport in use locks memory.
    Ignore,
}

/// Limits of a manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManagerConfig {
    /// Whether the memlock limit is checked before a pool is made.
    pub memlock: MemlockPolicy,
    /// Bytes that may be in flight at once over all transfers; at least one block always may.
    pub inflight_bytes_max: u64,
    /// Transfers that may be unfinished at once.
    pub max_transfers: usize,
    /// Grants that may be open at once.
    pub max_grants: usize,
    /// Blocks of one grant.
    pub max_blocks_per_grant: usize,
    /// Blocks that unproven transfers and grants may hold before new ones are refused.
    pub max_quarantined_blocks: usize,
    /// The longest lease that is given.
    pub max_lease: Duration,
    /// What is kept of a read lease after its end: covers a peer's clock that runs slow.
    pub lease_grace: Duration,
    /// Bytes of a notification that a caller may add to a transfer.
    pub max_payload_bytes: usize,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            memlock: MemlockPolicy::Ignore,
            inflight_bytes_max: 64 << 20,
            max_transfers: 1024,
            max_grants: 4096,
            max_blocks_per_grant: 1 << 16,
            max_quarantined_blocks: 1 << 14,
            max_lease: Duration::from_secs(60),
            lease_grace: Duration::from_secs(1),
            max_payload_bytes: 1024,
        }
    }
}

impl ManagerConfig {
    /// Refuses limits that would let nothing through.
    pub fn validate(&self) -> Result<(), MemoryError> {
        let expected = "at least 1";
        let positive = [
            ("inflight_bytes_max", self.inflight_bytes_max > 0),
            ("max_transfers", self.max_transfers > 0),
            ("max_grants", self.max_grants > 0),
            ("max_blocks_per_grant", self.max_blocks_per_grant > 0),
            ("max_quarantined_blocks", self.max_quarantined_blocks > 0),
            ("max_lease", !self.max_lease.is_zero()),
        ];
        match positive.into_iter().find(|(_, is_positive)| !is_positive) {
            Some((field, _)) => Err(MemoryError::InvalidField { field, expected }),
            None => Ok(()),
        }
    }
}
