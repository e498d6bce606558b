//! Blocks between others' memory and a peer's pool, over real transports.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::Time;
use orchestra_memory::{
    BlockSet, BufferManager, Event, ForeignMemory, Lease, ManagerConfig, PeerId, Pool, PoolConfig,
    Region, RemoteGrant, Rights, Transfer, TransferOptions,
};

use crate::{
    owners::{Heap, Part},
    rig,
};

const BLOCK_BYTES: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    manager: BufferManager,
    pool: Arc<Pool>,
}

struct Two {
    nodes: [Node; 2],
    started: Instant,
}

impl Two {
    fn connected(kind: &str) -> Self {
        let nodes = [0, 1].map(|at| {
            let transports = vec![rig::open(kind).into()];
            let limits = ManagerConfig::default();
            let manager = BufferManager::new(PeerId(at), limits, transports).unwrap();
            let config = PoolConfig {
                block_bytes: BLOCK_BYTES as u64,
                slab_bytes: 2 << 20,
                huge_pages: false,
                ..PoolConfig::default()
            };
            let pool = manager.create_pool(config).unwrap();
            Node { manager, pool }
        });
        let two = Self {
            nodes,
            started: Instant::now(),
        };
        for at in 0..2 {
            let metadata = two.nodes[1 - at].manager.local_metadata(kind).unwrap();
            let (manager, peer) = (&two.nodes[at].manager, PeerId(1 - at as u64));
            // Connecting may need the other side to answer: that one is driven by a thread of the test.
            std::thread::scope(|scope| {
                let connecting = scope.spawn(|| manager.connect(peer, kind, &metadata));
                two.until(|_| connecting.is_finished());
                connecting.join().unwrap().unwrap();
            });
        }
        two
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }

    fn until(&self, mut is_true: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !is_true(self) {
            assert!(started.elapsed() < PATIENCE, "it never happened");
            for node in &self.nodes {
                node.manager.progress(self.now(), Duration::from_millis(1));
            }
        }
    }

    /// The other side lets this one at some blocks.
    fn grant(&self, set: &BlockSet, rights: Rights) -> RemoteGrant {
        let Node { manager, pool } = &self.nodes[1];
        let lease = Lease {
            peer: PeerId(0),
            rights,
            lasts: PATIENCE,
        };
        let grant = manager
            .grant(pool, &set.handles(), lease, self.now())
            .unwrap();
        RemoteGrant::decode(&grant.encode(self.now()), PeerId(1), self.now(), 1000).unwrap()
    }

    fn end(&self, transfer: &Transfer) {
        self.until(|_| transfer.result().is_some());
        transfer.result().unwrap().unwrap();
    }

    /// Writes blocks of somebody's memory into new ones of the other side; what is there then.
    fn put(&self, memory: Arc<dyn ForeignMemory>, blocks: Range<usize>) -> Vec<u8> {
        let target = self.nodes[1].pool.allocate(blocks.len() as u32).unwrap();
        let grant = self.grant(&target, Rights::Write);
        let manager = &self.nodes[0].manager;
        let guard = manager.register_external(memory).unwrap();
        let options = TransferOptions::default();
        let put = manager
            .put_from(&guard, blocks, &grant, &options, self.now())
            .unwrap();
        // The transfer holds the memory by itself.
        drop(guard);
        self.end(&put);
        let mut event = None;
        self.until(|two| {
            event = event.take().or_else(|| two.nodes[1].manager.take_event());
            event.is_some()
        });
        assert!(matches!(event, Some(Event::Arrived(_))), "{event:?}");
        target.seal().unwrap();
        bytes_of(&target)
    }
}

fn bytes_of(set: &BlockSet) -> Vec<u8> {
    let mut all = Vec::new();
    for handle in set.handles() {
        let mut bytes = vec![0; BLOCK_BYTES];
        set.pool().pin(handle).unwrap().read(0, &mut bytes).unwrap();
        all.extend(bytes);
    }
    all
}

/// Bytes that say where they belong.
fn pattern(blocks: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| seed.wrapping_add((at / 97) as u8);
    (0..blocks * BLOCK_BYTES).map(byte).collect()
}

fn memory_of_others_is_put_from_and_got_into(kind: &str) {
    let two = Two::connected(kind);
    let manager = &two.nodes[0].manager;
    let known = manager.local_metadata(kind).unwrap().len();
    let bytes = pattern(6, 3);
    let (heap, weak) = Heap::new(&bytes, false);
    assert_eq!(two.put(Arc::clone(&heap) as _, 0..6), bytes);
    assert_eq!(
        two.put(Arc::clone(&heap) as _, 2..5),
        bytes[2 * BLOCK_BYTES..5 * BLOCK_BYTES]
    );
    // Some bytes of what is registered are registered.
    let whole = heap.region();
    let part = Region {
        address: whole.address + 100,
        len: 2 * BLOCK_BYTES as u64,
        ..whole
    };
    let inner = Part(Arc::clone(&heap), part);
    assert_eq!(
        two.put(Arc::new(inner), 0..2),
        bytes[100..100 + 2 * BLOCK_BYTES]
    );
    let stats = manager.stats().registrations;
    assert_eq!((stats.hits, stats.misses, stats.count), (2, 1, 1));
    let metadata = manager.local_metadata(kind).unwrap();
    if kind != "nixl" {
        assert_eq!(metadata.len(), known, "peers are not told of it");
    }

    let source = two.nodes[1].pool.allocate(3).unwrap();
    for at in 0..3 {
        let bytes = &pattern(3, 90)[at * BLOCK_BYTES..][..BLOCK_BYTES];
        source.write(at, 0, bytes).unwrap();
    }
    source.seal().unwrap();
    let grant = two.grant(&source, Rights::Read);
    let (into, _) = Heap::new(&vec![0; 5 * BLOCK_BYTES], true);
    let guard = manager.register_external(Arc::clone(&into) as _).unwrap();
    let options = TransferOptions::default();
    let get = manager
        .get_into(&grant, &guard, 1..4, &options, two.now())
        .unwrap();
    two.end(&get);
    let got = into.bytes();
    assert_eq!(got[BLOCK_BYTES..4 * BLOCK_BYTES], pattern(3, 90));
    assert!(
        got[..BLOCK_BYTES]
            .iter()
            .chain(&got[4 * BLOCK_BYTES..])
            .all(|byte| *byte == 0)
    );

    // A larger registration beside one in its middle that is held.
    let (wide, _) = Heap::new(&pattern(8, 50), true);
    let all = wide.region();
    let middle = Region {
        address: all.address + 3 * BLOCK_BYTES as u64,
        len: BLOCK_BYTES as u64,
        ..all
    };
    let held = manager
        .register_external(Arc::new(Part(Arc::clone(&wide), middle)))
        .unwrap();
    assert_eq!(two.put(wide, 0..8), pattern(8, 50));
    drop(held);

    drop(heap);
    assert_eq!(weak.strong_count(), 1, "kept for the next time");
    assert_eq!(manager.invalidate(whole), 1);
    assert_eq!(weak.strong_count(), 0);
}

#[test]
fn over_shm() {
    memory_of_others_is_put_from_and_got_into("shm");
}

#[test]
fn over_tcp() {
    memory_of_others_is_put_from_and_got_into("tcp");
}

#[test]
fn over_nixl() {
    if rig::is_installed("nixl") {
        memory_of_others_is_put_from_and_got_into("nixl");
    } else {
        eprintln!("skipped: nixl is not installed");
    }
}
