//! Settings of managers and pools from Python. Their defaults are those of `orchestra_memory`.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use orchestra_core::config::ConfigIssue;
use orchestra_memory::{
    DefragmentConfig, Defragmenter, ManagerConfig, MemlockPolicy, MemoryError, Pool, PoolConfig,
    Transport,
    slab::SLAB_ALIGN,
    transport::{
        nixl::{NixlConfig, NixlTransport},
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};
use serde::Deserialize;

use crate::errors::Failure;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct OpenConfig {
    transports: Vec<String>,
    memlock: Memlock,
    tcp_listen: String,
    tcp_advertise: String,
    site_packages: Vec<PathBuf>,
    inflight_bytes_max: u64,
    max_transfers: usize,
    max_grants: usize,
    max_blocks_per_grant: usize,
    max_quarantined_blocks: usize,
    max_lease_s: f64,
    lease_grace_s: f64,
    max_payload_bytes: usize,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Memlock {
    Require,
    Ignore,
}

impl Default for OpenConfig {
    fn default() -> Self {
        let ManagerConfig {
            memlock,
            inflight_bytes_max,
            max_transfers,
            max_grants,
            max_blocks_per_grant,
            max_quarantined_blocks,
            max_lease,
            lease_grace,
            max_payload_bytes,
        } = ManagerConfig::default();
        Self {
            transports: vec!["shm".to_owned()],
            memlock: match memlock {
                MemlockPolicy::Require => Memlock::Require,
                MemlockPolicy::Ignore => Memlock::Ignore,
            },
            tcp_listen: TcpConfig::default().listen.to_string(),
            tcp_advertise: String::new(),
            site_packages: Vec::new(),
            inflight_bytes_max,
            max_transfers,
            max_grants,
            max_blocks_per_grant,
            max_quarantined_blocks,
            max_lease_s: max_lease.as_secs_f64(),
            lease_grace_s: lease_grace.as_secs_f64(),
            max_payload_bytes,
        }
    }
}

/// A setting that is wrong.
fn wrong(key: &str, problem: impl Into<String>) -> Failure {
    Failure::config(&[ConfigIssue::new(key, problem)])
}

/// An error that settings have caused; a range that was left becomes a setting that is wrong.
pub(super) fn issue(error: MemoryError) -> Failure {
    match error {
        MemoryError::InvalidField { field, expected } => {
            wrong(field, format!("must be {expected}"))
        }
        error => error.into(),
    }
}

fn duration(key: &str, seconds: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| wrong(key, "must be a number of seconds, at least 0"))
}

fn address(key: &str, text: &str) -> Result<SocketAddr, Failure> {
    text.parse()
        .map_err(|_| wrong(key, "must be an IP address and a port, as in 10.0.0.1:7000"))
}

impl OpenConfig {
    pub(super) fn limits(&self) -> Result<ManagerConfig, Failure> {
        let limits = ManagerConfig {
            memlock: match self.memlock {
                Memlock::Require => MemlockPolicy::Require,
                Memlock::Ignore => MemlockPolicy::Ignore,
            },
            inflight_bytes_max: self.inflight_bytes_max,
            max_transfers: self.max_transfers,
            max_grants: self.max_grants,
            max_blocks_per_grant: self.max_blocks_per_grant,
            max_quarantined_blocks: self.max_quarantined_blocks,
            max_lease: duration("max_lease_s", self.max_lease_s)?,
            lease_grace: duration("lease_grace_s", self.lease_grace_s)?,
            max_payload_bytes: self.max_payload_bytes,
        };
        limits.validate().map_err(issue)?;
        Ok(limits)
    }

    /// Opens all transports, or with an error none.
    pub(super) fn open_transports(&self) -> Result<Vec<Arc<dyn Transport>>, Failure> {
        let mut opened: Vec<Arc<dyn Transport>> = Vec::new();
        for name in &self.transports {
            let transport = self.open(name)?;
            if opened.iter().any(|one| one.name() == transport.name()) {
                return Err(wrong("transports", "must name each transport once"));
            }
            opened.push(transport);
        }
        Ok(opened)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Transport>, Failure> {
        Ok(match name.split_once(':').unwrap_or((name, "")) {
            ("shm", "") => Arc::new(ShmTransport::open().map_err(issue)?),
            ("tcp", "") => {
                let advertise = match self.tcp_advertise.as_str() {
                    "" => None,
                    given => Some(address("tcp_advertise", given)?),
                };
                let config = TcpConfig {
                    listen: address("tcp_listen", &self.tcp_listen)?,
                    advertise,
                };
                Arc::new(TcpTransport::open(&config).map_err(issue)?)
            }
            ("nixl", backend) => {
                let mut config = NixlConfig {
                    site_packages: self.site_packages.clone(),
                    ..NixlConfig::default()
                };
                if !backend.is_empty() {
                    backend.clone_into(&mut config.backend);
                }
                Arc::new(NixlTransport::open(&config).map_err(issue)?)
            }
            _ => {
                let known = "must be among shm, tcp, nixl:UCX and nixl:LIBFABRIC";
                return Err(wrong("transports", known));
            }
        })
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PoolSettings {
    tier: String,
    block_bytes: u64,
    slab_bytes: Option<u64>,
    max_bytes: Option<u64>,
    initial_slabs: u32,
    huge_pages: bool,
    prefault_threads: usize,
    numa_node: Option<u32>,
    defragment_bytes_per_s: u64,
}

impl Default for PoolSettings {
    fn default() -> Self {
        let pool = PoolConfig::default();
        Self {
            tier: pool.tier.to_string(),
            block_bytes: pool.block_bytes,
            slab_bytes: None,
            max_bytes: None,
            initial_slabs: pool.initial_slabs,
            huge_pages: pool.huge_pages,
            prefault_threads: pool.prefault_threads.get(),
            numa_node: pool.numa_node,
            defragment_bytes_per_s: 0,
        }
    }
}

impl PoolSettings {
    /// Where only one of the two sizes is given, the other follows from it.
    pub(super) fn pool(&self) -> Result<PoolConfig, Failure> {
        let usual = PoolConfig::default().slab_bytes;
        let slab_bytes = self.slab_bytes.unwrap_or_else(|| {
            let enough = self
                .max_bytes
                .map(|most| most.div_ceil(SLAB_ALIGN) * SLAB_ALIGN);
            enough.map_or(usual, |enough| enough.min(usual))
        });
        let max_slabs = match self.max_bytes {
            Some(most) if slab_bytes > 0 => most.div_ceil(slab_bytes),
            _ => 1,
        };
        let config = PoolConfig {
            tier: self.tier.parse().map_err(issue)?,
            block_bytes: self.block_bytes,
            slab_bytes,
            initial_slabs: self.initial_slabs,
            max_slabs: u32::try_from(max_slabs)
                .map_err(|_| wrong("max_bytes", "must be less than 2^32 slabs"))?,
            huge_pages: self.huge_pages,
            prefault_threads: NonZeroUsize::new(self.prefault_threads)
                .ok_or_else(|| wrong("prefault_threads", "must be at least 1"))?,
            numa_node: self.numa_node,
            ..PoolConfig::default()
        };
        config.validate().map_err(issue)?;
        Ok(config)
    }

    /// What keeps the pool in long runs, where that was asked for.
    pub(super) fn defragmenter(&self, pool: &Arc<Pool>) -> Result<Option<Defragmenter>, Failure> {
        if self.defragment_bytes_per_s == 0 {
            return Ok(None);
        }
        let usual = DefragmentConfig::default();
        let config = DefragmentConfig {
            bytes_per_second: self.defragment_bytes_per_s,
            unit_bytes: usual.unit_bytes.max(self.block_bytes),
            ..usual
        };
        Ok(Some(
            Defragmenter::new(Arc::clone(pool), config).map_err(issue)?,
        ))
    }
}
