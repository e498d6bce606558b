//! Pools of such memory, and what transports make of them. NIXL's library is a mock as well.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::Time;
use orchestra_memory::{
    BlockSet, BufferManager, Event, Lease, ManagerConfig, MemoryError, PeerId, Pool, PoolConfig,
    RemoteGrant, Rights, Tier, TransferOptions, Transport,
    dlpack::device_of,
    transport::{
        nixl::{NixlConfig, NixlTransport},
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};

use crate::{mock, on};

const BLOCK_BYTES: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

fn config(tier: Tier) -> PoolConfig {
    PoolConfig {
        tier,
        block_bytes: BLOCK_BYTES,
        slab_bytes: 2 << 20,
        huge_pages: false,
        ..PoolConfig::default()
    }
}

fn manager(local: u64, transport: Arc<dyn Transport>) -> BufferManager {
    let limits = ManagerConfig::default();
    BufferManager::new(PeerId(local), limits, vec![transport]).unwrap()
}

fn nixl() -> Arc<dyn Transport> {
    Arc::new(NixlTransport::open(&NixlConfig::default()).unwrap())
}

#[test]
fn what_the_processor_copies_cannot_reach_a_device_and_says_why() {
    let test = "pools::what_the_processor_copies_cannot_reach_a_device_and_says_why";
    mock::run(test, &[], || {
        let tcp = TcpTransport::open(&TcpConfig::default()).unwrap();
        let shm = ShmTransport::open().unwrap();
        let transports: [(Arc<dyn Transport>, _); 2] = [
            (Arc::new(shm), "peers map memory files, and it is none"),
            (
                Arc::new(tcp),
                "it would have to be staged through host memory, which sockets send from",
            ),
        ];
        let slab = Arc::new(crate::slab(7, on(1)).unwrap());
        for (transport, reason) in transports {
            let refused = Err(MemoryError::TierUnsupported {
                transport: transport.name(),
                tier: on(1),
                reason,
            });
            assert_eq!(transport.register(&slab), refused);
            let manager = manager(0, transport);
            assert_eq!(manager.create_pool(config(on(1))).map(drop), refused);
            manager.create_pool(config(Tier::Pinned)).unwrap();
        }
        assert_eq!(mock::counts().allocated_bytes, 2 << 20, "only the slab");
        let settings = PoolConfig {
            numa_node: Some(0),
            ..config(on(1))
        };
        let refused = manager(0, nixl()).create_pool(settings).map(drop);
        assert!(
            matches!(refused, Err(MemoryError::InvalidField { field, .. }) if field == "numa_node")
        );
    });
}

#[test]
fn a_pool_on_a_device_is_moved_viewed_and_never_touched_by_the_processor() {
    let test = "pools::a_pool_on_a_device_is_moved_viewed_and_never_touched_by_the_processor";
    mock::run(test, &[], || {
        let pool = manager(0, nixl()).create_pool(config(on(1))).unwrap();
        let mut sets: Vec<_> = (0..16).map(|at| filled(&pool, 1, at)).collect();
        // Holes in between, as a defragmenter would close.
        let mut at = 0;
        sets.retain(|_| {
            at += 1;
            at % 2 == 0
        });
        let handles: Vec<_> = sets.iter().map(|set| set.handle(0).unwrap()).collect();
        let mut moving = pool.begin_move(&handles).unwrap();
        moving.copy().unwrap();
        assert_eq!(moving.commit(), sets.len());
        for (at, set) in sets.iter().enumerate() {
            check(set, 1 + 2 * at as u8);
        }
        let view = pool.view(sets[0].handle(0).unwrap()).unwrap();
        assert_eq!((view.tier(), device_of(view.tier())), (on(1), (2, 1)));
        let refused = Err(MemoryError::NotInHostMemory { device: 1 });
        assert_eq!(view.check_host(), refused);
        drop((view, sets));
        pool.check_integrity();
    });
}

fn filled(pool: &Arc<Pool>, n: u32, seed: u8) -> BlockSet {
    let set = pool.allocate(n).unwrap();
    for at in 0..set.len() {
        let bytes = vec![seed + at as u8; BLOCK_BYTES as usize];
        set.write(at, 0, &bytes).unwrap();
    }
    set.seal().unwrap();
    set
}

fn check(set: &BlockSet, seed: u8) {
    for at in 0..set.len() {
        let pin = set.pool().pin(set.handle(at).unwrap()).unwrap();
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        pin.read(0, &mut bytes).unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == seed + at as u8),
            "block {at}"
        );
    }
}

struct Node {
    manager: BufferManager,
    pool: Arc<Pool>,
}

fn connected(tiers: [Tier; 2]) -> [Node; 2] {
    let nodes = [0, 1].map(|at| {
        let manager = manager(at, nixl());
        let pool = manager.create_pool(config(tiers[at as usize])).unwrap();
        Node { manager, pool }
    });
    for at in 0..2 {
        let metadata = nodes[1 - at].manager.local_metadata("nixl").unwrap();
        let peer = PeerId(1 - at as u64);
        nodes[at].manager.connect(peer, "nixl", &metadata).unwrap();
    }
    nodes
}

fn until(nodes: &[Node; 2], mut is_true: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_true() {
        assert!(started.elapsed() < PATIENCE, "it never happened");
        for node in nodes {
            node.manager.progress(Time(1), Duration::from_millis(1));
        }
    }
}

fn grant(owner: &Node, set: &BlockSet, rights: Rights) -> RemoteGrant {
    let owned = owner.manager.local();
    let lease = Lease {
        peer: PeerId(1 - owned.0),
        rights,
        lasts: PATIENCE,
    };
    let grant = owner
        .manager
        .grant(&owner.pool, &set.handles(), lease, Time(1))
        .unwrap();
    RemoteGrant::decode(&grant.encode(Time(1)), owned, Time(1), 1000).unwrap()
}

/// Blocks go from one kind of memory to another and back. The mock checks what each side says of both.
fn there_and_back(tiers: [Tier; 2]) {
    let nodes = connected(tiers);
    let options = TransferOptions::default();
    let source = filled(&nodes[0].pool, 5, 30);
    let target = nodes[1].pool.allocate(5).unwrap();
    let to = grant(&nodes[1], &target, Rights::Write);
    let Node { manager, pool } = &nodes[0];
    let put = manager
        .put(pool, &source.handles(), &to, &options, Time(1))
        .unwrap();
    let mut arrived = None;
    until(&nodes, || {
        arrived = arrived.take().or_else(|| nodes[1].manager.take_event());
        arrived.is_some() && put.result().is_some()
    });
    assert_eq!(put.result().unwrap().unwrap().blocks, 5);
    assert!(matches!(arrived, Some(Event::Arrived(_))), "{arrived:?}");
    target.seal().unwrap();
    check(&target, 30);
    let back = nodes[0].pool.allocate(5).unwrap();
    let from = grant(&nodes[1], &target, Rights::Read);
    let get = manager
        .get(&from, pool, &back.handles(), &options, Time(1))
        .unwrap();
    until(&nodes, || get.result().is_some());
    get.result().unwrap().unwrap();
    back.seal().unwrap();
    check(&back, 30);
}

#[test]
fn nixl_is_told_which_memory_lies_on_which_device() {
    let test = "pools::nixl_is_told_which_memory_lies_on_which_device";
    mock::run(test, &[], || {
        there_and_back([on(0), on(1)]);
        there_and_back([on(1), Tier::Dram]);
        there_and_back([Tier::Pinned, on(0)]);
        assert_eq!(mock::counts(), mock::Counts::default());
    });
}
