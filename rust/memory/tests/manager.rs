//! Two managers over real transports: shared memory and TCP.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::Time;
use orchestra_memory::{
    BlockSet, BufferManager, Event, Lease, ManagerConfig, MemoryError, PeerId, Pool, PoolConfig,
    Quiet, RemoteGrant, Rights, TransferOptions, Transport,
    transport::{
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};

const BLOCK_BYTES: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    manager: BufferManager,
    pool: Arc<Pool>,
    peer: PeerId,
}

struct Two {
    nodes: [Node; 2],
    started: Instant,
}

fn config() -> PoolConfig {
    PoolConfig {
        block_bytes: BLOCK_BYTES,
        slab_bytes: 4 << 20,
        ..PoolConfig::default()
    }
}

impl Two {
    fn connected(open: fn() -> Arc<dyn Transport>) -> Self {
        let nodes = [0_u64, 1].map(|at| {
            let config = ManagerConfig::default();
            let manager = BufferManager::new(PeerId(at), config, vec![open()]).unwrap();
            let pool = manager.create_pool(self::config()).unwrap();
            Node {
                manager,
                pool,
                peer: PeerId(10 + at),
            }
        });
        let started = Instant::now();
        let two = Self { nodes, started };
        for at in 0..2 {
            let name = two.nodes[at].manager.transports()[0].name();
            let metadata = two.nodes[1 - at].manager.local_metadata(name).unwrap();
            let Node { manager, peer, .. } = &two.nodes[at];
            // Connecting may need the other side to answer: that one is driven by a thread of the test.
            std::thread::scope(|scope| {
                let connecting = scope.spawn(|| manager.connect(*peer, name, &metadata));
                two.until(|_| connecting.is_finished());
                connecting.join().unwrap().unwrap();
            });
        }
        two
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }

    /// Drives both ends until something is true.
    fn until(&self, mut is_true: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !is_true(self) {
            assert!(started.elapsed() < PATIENCE, "it never happened");
            for node in &self.nodes {
                node.manager.progress(self.now(), Duration::from_millis(1));
            }
        }
    }

    fn grant(&self, owner: usize, set: &BlockSet, rights: Rights) -> RemoteGrant {
        let Node {
            manager,
            pool,
            peer,
        } = &self.nodes[owner];
        let lease = Lease {
            peer: *peer,
            rights,
            lasts: PATIENCE,
        };
        let grant = manager
            .grant(pool, &set.handles(), lease, self.now())
            .unwrap();
        let bytes = grant.encode(self.now());
        RemoteGrant::decode(&bytes, self.nodes[1 - owner].peer, self.now(), 1000).unwrap()
    }

    fn filled(&self, node: usize, n: u32, seed: u8) -> BlockSet {
        let set = self.nodes[node].pool.allocate(n).unwrap();
        for at in 0..set.len() {
            set.write(at, 0, &vec![seed + at as u8; BLOCK_BYTES as usize])
                .unwrap();
        }
        set.seal().unwrap();
        set
    }
}

fn check(set: &BlockSet, seed: u8) {
    for at in 0..set.len() {
        let guard = set.pool().pin(set.handle(at).unwrap()).unwrap();
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        guard.read(0, &mut bytes).unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == seed + at as u8),
            "block {at}"
        );
    }
}

fn blocks_go_there_and_back(open: fn() -> Arc<dyn Transport>) {
    let two = Two::connected(open);
    let source = two.filled(0, 12, 1);
    // Every second block of the target is somebody else's: descriptors cannot all be joined.
    let mut target = two.nodes[1].pool.allocate(1).unwrap();
    let mut between = Vec::new();
    for _ in 1..12 {
        between.push(two.nodes[1].pool.allocate(1).unwrap());
        target.extend(1).unwrap();
    }
    let grant = two.grant(1, &target, Rights::Write);
    assert_eq!(
        target.seal(),
        Err(MemoryError::InUse),
        "a peer may still write it"
    );
    let options = TransferOptions {
        payload: b"request 7".to_vec(),
        ..TransferOptions::default()
    };
    let Node { manager, pool, .. } = &two.nodes[0];
    let put = manager
        .put(pool, &source.handles(), &grant, &options, two.now())
        .unwrap();
    let mut arrived = None;
    two.until(|two| {
        arrived = arrived.take().or_else(|| two.nodes[1].manager.take_event());
        arrived.is_some() && put.result().is_some()
    });
    let stats = put.result().unwrap().unwrap();
    assert_eq!((stats.blocks, stats.bytes), (12, 12 * BLOCK_BYTES));
    let Some(Event::Arrived(arrival)) = arrived else {
        unreachable!("{arrived:?}");
    };
    assert_eq!(
        (arrival.handles, arrival.payload),
        (target.handles(), b"request 7".to_vec())
    );
    target.seal().unwrap();
    check(&target, 1);

    let grant = two.grant(1, &target, Rights::Read);
    let back = two.nodes[0].pool.allocate(12).unwrap();
    let options = TransferOptions::default();
    let get = manager
        .get(&grant, pool, &back.handles(), &options, two.now())
        .unwrap();
    two.until(|_| get.result().is_some());
    get.result().unwrap().unwrap();
    back.seal().unwrap();
    check(&back, 1);
    two.until(|two| two.nodes[1].manager.stats().open_grants == 0);
}

/// Closed from both sides, each end proves sooner or later that the other is quiet, and all blocks come back.
fn a_closed_connection_gives_its_blocks_back(open: fn() -> Arc<dyn Transport>) {
    let two = Two::connected(open);
    let target = two.nodes[1].pool.allocate(4).unwrap();
    let grant = two.grant(1, &target, Rights::Write);
    two.nodes[1].manager.revoke(grant.id).unwrap();
    assert_eq!(target.handles(), [], "its blocks wait for proof");
    assert_eq!(two.nodes[1].manager.stats().quarantined_blocks, 4);
    let mut proven = [false; 2];
    two.until(|two| {
        for (node, proven) in two.nodes.iter().zip(&mut proven) {
            *proven = *proven || node.manager.disconnect(node.peer, two.now()) == Ok(Quiet::Proven);
        }
        proven == [true; 2]
    });
    assert_eq!(two.nodes[1].manager.stats().quarantined_blocks, 0);
    let all = config().slots_per_slab();
    assert_eq!(two.nodes[1].pool.stats().allocatable, all as usize);
    let source = two.filled(0, 4, 9);
    let Node { manager, pool, .. } = &two.nodes[0];
    let options = TransferOptions::default();
    let put = manager.put(pool, &source.handles(), &grant, &options, two.now());
    assert_eq!(put.map(drop), Err(MemoryError::UnknownPeer));
}

fn shm() -> Arc<dyn Transport> {
    Arc::new(ShmTransport::open().unwrap())
}

fn tcp() -> Arc<dyn Transport> {
    Arc::new(TcpTransport::open(&TcpConfig::default()).unwrap())
}

#[test]
fn blocks_go_there_and_back_through_shared_memory() {
    blocks_go_there_and_back(shm);
}

#[test]
fn blocks_go_there_and_back_through_tcp() {
    blocks_go_there_and_back(tcp);
}

#[test]
fn a_closed_connection_gives_its_blocks_back_through_shared_memory() {
    a_closed_connection_gives_its_blocks_back(shm);
}

#[test]
fn a_closed_connection_gives_its_blocks_back_through_tcp() {
    a_closed_connection_gives_its_blocks_back(tcp);
}

#[test]
fn a_retired_slab_stays_mapped_until_its_peers_are_gone() {
    let two = Two::connected(shm);
    let Node {
        manager,
        pool,
        peer,
    } = &two.nodes[0];
    let slab = pool.slabs().remove(0);
    let (id, memory) = (slab.id(), Arc::downgrade(&slab));
    drop(slab);
    assert_eq!(manager.retire_slab(pool, id), Err(MemoryError::InUse));
    pool.drain(id).unwrap();
    manager.retire_slab(pool, id).unwrap();
    assert!(pool.slabs().is_empty() && memory.upgrade().is_some());
    two.until(|two| {
        let far = &two.nodes[1];
        // The far end may have been closed before; what counts is what this end can prove.
        let _ = far.manager.disconnect(far.peer, two.now());
        manager.disconnect(*peer, two.now()) == Ok(Quiet::Proven)
    });
    assert!(memory.upgrade().is_none());
}

#[test]
fn a_slab_is_added_where_blocks_run_out() {
    let manager = BufferManager::new(PeerId(0), ManagerConfig::default(), vec![shm()]).unwrap();
    let pool = manager
        .create_pool(PoolConfig {
            max_slabs: 2,
            ..config()
        })
        .unwrap();
    let per_slab = config().slots_per_slab();
    let _first = manager.allocate(&pool, per_slab).unwrap();
    assert!(pool.allocate(1).is_err(), "the pool alone does not grow");
    let _second = manager.allocate(&pool, per_slab).unwrap();
    let refused = manager.allocate(&pool, 1).map(drop);
    assert!(matches!(
        refused,
        Err(MemoryError::Exhausted { free: 0, .. })
    ));
    assert_eq!(pool.slabs().len(), 2);
}
