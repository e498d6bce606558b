//! The worker's KV cache as memory that other workers can reach.
//!
//! The cache is one slab, and what a block holds of a layer is one slot: `layer * num_all_blocks + block`, where the
//! blocks of host memory come behind those of the device. All slots belong to one set for ever; the step scheduler alone decides whose a block is. The manager is told of a block only while
//! somebody outside may touch it, and gives it a new life afterwards.

use std::{
    collections::HashMap,
    fmt, fs,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::{BlockId, Time, config::ConfigIssue};
use orchestra_memory::{
    BlockHandle, BlockSet, BufferManager, ManagerConfig, MemoryError, PeerId, Pool, PoolConfig,
    Slab, Transport,
    slab::{SLAB_ALIGN, SLAB_BYTES_UNREGISTERED_MAX},
    transport::{
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};
use orchestra_proto::v1;
use serde::{Deserialize, Serialize};

/// What the manager calls this process; peers have other numbers.
const LOCAL: PeerId = PeerId(0);
/// Bytes of a failure domain's name.
const DOMAIN_BYTES_MAX: usize = 128;
/// Bytes of a layout's name.
const LAYOUT_BYTES_MAX: usize = 256;
/// The longest that a peer may touch a block, and so the longest that a move may take.
pub(crate) const LEASE_MAX: Duration = Duration::from_secs(60);

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
    /// Layers of the model.
    pub num_layers: u32,
    /// KV blocks, as many as the step scheduler has.
    pub num_blocks: u32,
    /// Blocks of host memory that lie behind them, as many as the step scheduler has.
    pub num_host_blocks: u32,
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
                "{} + {} blocks of {} layers and {} bytes each must fit in {SLAB_BYTES_UNREGISTERED_MAX} bytes",
                self.num_blocks, self.num_host_blocks, self.num_layers, self.layer_block_bytes
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
    fn bytes(&self) -> Option<u64> {
        u64::from(self.num_layers)
            .checked_mul(u64::from(self.num_blocks) + u64::from(self.num_host_blocks))?
            .checked_mul(self.layer_block_bytes)
    }

    /// Blocks of a layer: those of the device, then those of host memory.
    pub(crate) const fn num_all_blocks(&self) -> u32 {
        self.num_blocks.saturating_add(self.num_host_blocks)
    }

    const fn num_slots(&self) -> u32 {
        self.num_layers.saturating_mul(self.num_all_blocks())
    }
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum KvPoolError {
    /// Settings are wrong; every problem is listed.
    #[error("invalid settings of the KV pool: {}", crate::error::list(.0))]
    InvalidConfig(Vec<ConfigIssue>),
    /// Memory or a transport could not be had.
    #[error("the KV pool could not be made: {0}")]
    Memory(#[from] MemoryError),
}

/// The memory of a worker's KV cache, registered with what moves it. All zero at first; each page comes when it is
/// first used.
pub struct KvPool {
    config: KvPoolConfig,
    /// Declared before the manager: blocks are given back before their slab goes.
    cache: BlockSet,
    pool: Arc<Pool>,
    slab: Arc<Slab>,
    manager: BufferManager,
    announcement: v1::KvTransfer,
    started: Instant,
}

impl fmt::Debug for KvPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvPool")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl KvPool {
    /// Makes the memory and opens the transports.
    pub fn new(config: KvPoolConfig) -> Result<Self, KvPoolError> {
        config.validate().map_err(KvPoolError::InvalidConfig)?;
        let num_slots = config.num_slots();
        let limits = ManagerConfig {
            max_blocks_per_grant: num_slots as usize,
            max_quarantined_blocks: num_slots as usize,
            max_lease: LEASE_MAX,
            ..ManagerConfig::default()
        };
        let manager = BufferManager::new(LOCAL, limits, open(&config)?)?;
        let bytes = config.bytes().unwrap_or(SLAB_BYTES_UNREGISTERED_MAX);
        let pool = manager.create_pool(PoolConfig {
            block_bytes: config.layer_block_bytes,
            slab_bytes: bytes.next_multiple_of(SLAB_ALIGN),
            prefault: false,
            ..PoolConfig::default()
        })?;
        // A new pool is one run, so block `n` of the set is slot `n`.
        let cache = pool.allocate(num_slots)?;
        let slab = pool.slabs().into_iter().next();
        let slab = slab.ok_or(MemoryError::StaleHandle)?;
        let announcement = announce(&config, &manager)?;
        Ok(Self {
            config,
            cache,
            pool,
            slab,
            manager,
            announcement,
            started: Instant::now(),
        })
    }

    /// How it was made.
    pub const fn config(&self) -> &KvPoolConfig {
        &self.config
    }

    /// First byte of the cache: `[num_layers, num_blocks + num_host_blocks, layer_block_bytes]`. The pool has to outlive every use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.slab.as_ptr()
    }

    /// Bytes of the cache.
    pub fn len(&self) -> u64 {
        u64::from(self.config.num_slots()) * self.config.layer_block_bytes
    }

    /// Whether it holds no byte; never true.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes into what a block holds of a layer: for engines whose cache is no tensor.
    pub fn write(&self, layer: u32, block: BlockId, bytes: &[u8]) -> Result<(), MemoryError> {
        self.slab
            .write(self.offset(layer, block, bytes.len())?, bytes)
    }

    /// Copies what a block holds of a layer, from its beginning, until `bytes` is full.
    pub fn read(&self, layer: u32, block: BlockId, bytes: &mut [u8]) -> Result<(), MemoryError> {
        self.slab
            .read(self.offset(layer, block, bytes.len())?, bytes)
    }

    fn offset(&self, layer: u32, block: BlockId, len: usize) -> Result<u64, MemoryError> {
        let limit = self.config.layer_block_bytes;
        let is_inside = layer < self.config.num_layers && block.0 < self.config.num_all_blocks();
        if !is_inside || len as u64 > limit {
            let (offset, len) = (u64::from(self.slot(layer, block)), len as u64);
            return Err(MemoryError::OutOfBounds { offset, len, limit });
        }
        Ok(u64::from(self.slot(layer, block)) * limit)
    }

    pub(crate) const fn announcement(&self) -> &v1::KvTransfer {
        &self.announcement
    }

    pub(super) const fn manager(&self) -> &BufferManager {
        &self.manager
    }

    pub(super) const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    pub(super) fn slab(&self) -> u32 {
        self.slab.id().0
    }

    /// The manager's clock.
    pub(super) fn now(&self) -> Time {
        self.time_of(Instant::now())
    }

    pub(super) fn time_of(&self, instant: Instant) -> Time {
        let since = instant.saturating_duration_since(self.started);
        Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    const fn slot(&self, layer: u32, block: BlockId) -> u32 {
        layer
            .wrapping_mul(self.config.num_all_blocks())
            .wrapping_add(block.0)
    }

    /// The slots of these blocks in these layers, layer after layer: neighbouring blocks share a descriptor.
    fn slots(&self, layers: std::ops::Range<u32>, blocks: &[BlockId]) -> Vec<u32> {
        layers
            .flat_map(|layer| blocks.iter().map(move |&block| self.slot(layer, block)))
            .collect()
    }

    /// The present life of these blocks in these layers, layer after layer.
    pub(super) fn handles(
        &self,
        layers: std::ops::Range<u32>,
        blocks: &[BlockId],
    ) -> Result<Vec<BlockHandle>, MemoryError> {
        let slots = self.slots(layers, blocks);
        self.cache
            .handles_at(slots.into_iter().map(|slot| slot as usize))
    }

    /// Gives these blocks a new life; `InUse` while somebody outside may still touch one.
    pub(super) fn renew(&self, blocks: &[BlockId]) -> Result<(), MemoryError> {
        self.cache
            .renew(&self.slots(0..self.config.num_layers, blocks))
    }

    /// Seals those of the blocks that are not yet.
    pub(super) fn seal(&self, handles: &[BlockHandle]) -> Result<(), MemoryError> {
        for &handle in handles {
            match self.pool.seal(&[handle]) {
                Ok(()) | Err(MemoryError::WrongState { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn open(config: &KvPoolConfig) -> Result<Vec<Arc<dyn Transport>>, MemoryError> {
    let mut transports: Vec<Arc<dyn Transport>> = Vec::new();
    if config.transports != KvTransports::Tcp {
        transports.push(Arc::new(ShmTransport::open()?));
    }
    let is_tcp = match config.transports {
        KvTransports::Auto => config.address.is_some(),
        KvTransports::Shm => false,
        KvTransports::Tcp => true,
    };
    if is_tcp {
        let listen = config
            .address
            .map_or(TcpConfig::default().listen, |ip| SocketAddr::new(ip, 0));
        let advertise = None;
        transports.push(Arc::new(TcpTransport::open(&TcpConfig {
            listen,
            advertise,
        })?));
    }
    Ok(transports)
}

fn announce(config: &KvPoolConfig, manager: &BufferManager) -> Result<v1::KvTransfer, MemoryError> {
    let mut metadata = HashMap::new();
    for transport in manager.transports() {
        let name = transport.name();
        metadata.insert(name.to_owned(), manager.local_metadata(name)?);
    }
    Ok(v1::KvTransfer {
        epoch: RandomState::new().build_hasher().finish(),
        metadata,
        bytes_per_block: u64::from(config.num_layers) * config.layer_block_bytes,
        layout: config.layout.clone(),
        host: host(),
        failure_domain: match config.failure_domain.as_str() {
            "" => boot(),
            domain => domain.to_owned(),
        },
        writes_through: config.write_through,
    })
}

/// Which processes can share memory with this one: those of one boot, one network namespace (which abstract sockets
/// belong to) and one user.
fn host() -> String {
    let boot = boot();
    let network = fs::metadata("/proc/self/ns/net").map_or(0, |it| it.ino());
    let user = fs::metadata("/proc/self").map_or(0, |it| it.uid());
    format!("{boot}/{network}/{user}")
}

/// This run of the host's kernel.
fn boot() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> KvPoolConfig {
        KvPoolConfig {
            num_layers: 3,
            num_blocks: 5,
            layer_block_bytes: 1000,
            layout: "test".to_owned(),
            transports: KvTransports::Shm,
            ..KvPoolConfig::default()
        }
    }

    #[test]
    fn every_block_of_every_layer_has_its_own_bytes() {
        let pool = KvPool::new(config()).unwrap();
        assert_eq!(pool.len(), 15_000);
        let places = || (0..3).flat_map(|layer| (0..5).map(move |block| (layer, BlockId(block))));
        for (count, (layer, block)) in (0_u8..).zip(places()) {
            pool.write(layer, block, &[count; 1000]).unwrap();
        }
        for (count, (layer, block)) in (0_u8..).zip(places()) {
            let mut bytes = [0; 1000];
            pool.read(layer, block, &mut bytes).unwrap();
            assert_eq!(bytes, [count; 1000]);
        }
        assert!(pool.write(3, BlockId(0), &[0]).is_err());
        assert!(pool.write(0, BlockId(5), &[0]).is_err());
        assert!(pool.write(0, BlockId(0), &[0; 1001]).is_err());
        let handles = pool.handles(1..3, &[BlockId(4), BlockId(0)]).unwrap();
        let slots: Vec<u32> = handles.iter().map(|it| it.slot).collect();
        assert_eq!(slots, [9, 5, 14, 10]);
    }

    #[test]
    fn a_cache_may_be_larger_than_what_a_card_registers() {
        let pool = KvPool::new(KvPoolConfig {
            num_blocks: 5000,
            layer_block_bytes: 300 << 10,
            ..config()
        });
        let pool = pool.unwrap();
        assert!(pool.len() > 4 << 30);
        for (layer, block) in [(0, BlockId(0)), (2, BlockId(4999))] {
            pool.write(layer, block, &[7]).unwrap();
            let mut byte = [0];
            pool.read(layer, block, &mut byte).unwrap();
            assert_eq!(byte, [7]);
        }
    }

    #[test]
    fn what_no_pool_can_be_is_refused_with_every_reason() {
        let keys = |config: KvPoolConfig| match KvPool::new(config) {
            Err(KvPoolError::InvalidConfig(issues)) => {
                issues.into_iter().map(|issue| issue.key).collect()
            }
            other => panic!("{other:?}"),
        };
        let none: Vec<String> = keys(KvPoolConfig::default());
        assert_eq!(
            none,
            ["num_layers", "num_blocks", "layer_block_bytes", "layout"]
        );
        let large: Vec<String> = keys(KvPoolConfig {
            num_blocks: u32::MAX,
            ..config()
        });
        assert_eq!(large, ["num_blocks"]);
        let overflowing: Vec<String> = keys(KvPoolConfig {
            layer_block_bytes: u64::MAX,
            ..config()
        });
        assert_eq!(overflowing, ["num_blocks"]);
    }
}
