//! The worker's KV cache as memory that other workers can reach.
//!
//! The cache is one slab, and what a block holds of a layer is one slot. In each layer the blocks of host memory come
//! behind those of the device. All slots belong to one set for ever; the step scheduler alone decides whose a block is. The
//! manager is told of a block only while somebody outside may touch it, and gives it a new life afterwards.
//!
//! Ranks that share the layers have their parts in it too: to the pool the part of each is a layer, in the order of the
//! layers and then of the ranks. The process that has the pool moves all of them, the others map it.

use std::{
    collections::HashMap,
    fmt, fs,
    net::SocketAddr,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    process,
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::{BlockId, Time, config::ConfigIssue};
use orchestra_memory::{
    BlockHandle, BlockSet, BufferManager, ManagerConfig, MemoryError, PeerId, Pool, PoolConfig,
    Slab, Transport,
    random::random_bytes,
    slab::{SLAB_ALIGN, SLAB_BYTES_UNREGISTERED_MAX},
    transport::{
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};
use orchestra_proto::v1;

use super::pool_config::{KvPoolConfig, KvTransports};

/// What the manager calls this process; peers have other numbers.
const LOCAL: PeerId = PeerId(0);
/// The longest that a peer may touch a block, and so the longest that a move may take.
pub(crate) const LEASE_MAX: Duration = Duration::from_secs(60);

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

    /// First byte of the cache: `[num_layers, num_blocks + num_scratch_blocks + num_host_blocks, layer_block_bytes]`.
    /// The pool has to outlive every use.
    pub fn as_ptr(&self) -> *mut u8 {
        self.slab.as_ptr()
    }

    /// Where processes of this machine and user find the memory, which they may map for as long as this one has it.
    pub fn address(&self) -> Option<String> {
        let file = self.slab.file()?;
        Some(format!("/proc/{}/fd/{}", process::id(), file.as_raw_fd()))
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

    /// Which of a layer's slots a block has.
    pub(super) const fn place(&self, block: BlockId) -> u32 {
        if block.0 < self.config.num_blocks {
            block.0
        } else {
            block.0.wrapping_add(self.config.num_scratch_blocks)
        }
    }

    const fn slot(&self, layer: u32, block: BlockId) -> u32 {
        layer
            .wrapping_mul(self.config.layer_slots())
            .wrapping_add(self.place(block))
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
        epoch: u64::from_le_bytes(random_bytes()?),
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
    fn scratch_blocks_lie_behind_those_of_the_device_and_nobody_has_them() {
        let pool = KvPool::new(KvPoolConfig {
            num_scratch_blocks: 1,
            num_host_blocks: 2,
            ..config()
        });
        let pool = pool.unwrap();
        assert_eq!(pool.len(), 3 * 8 * 1000);
        let blocks: Vec<BlockId> = (0..7).map(BlockId).collect();
        let handles = pool.handles(1..2, &blocks).unwrap();
        let slots: Vec<u32> = handles.iter().map(|it| it.slot).collect();
        assert_eq!(slots, [8, 9, 10, 11, 12, 14, 15]);
        assert!(pool.write(1, BlockId(7), &[0]).is_err());
    }

    #[test]
    fn other_processes_find_the_memory_where_it_says() {
        let pool = KvPool::new(config()).unwrap();
        pool.write(2, BlockId(1), b"hello").unwrap();
        let bytes = fs::read(pool.address().unwrap()).unwrap();
        assert_eq!(&bytes[11_000..11_005], b"hello");
        assert!(bytes.len() as u64 >= pool.len());
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
}
