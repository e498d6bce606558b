//! Managers that are driven by threads of their own, over shared memory and TCP: nobody here makes progress by hand.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_memory::{
    BlockSet, BufferManager, Chime, Driver, Event, Lease, ManagerConfig, MemoryError, PeerId, Pool,
    PoolConfig, RemoteGrant, Rights, Transfer, TransferError, TransferOptions, Transport,
    driver::EVENTS,
    transport::{
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
const BLOCK_BYTES: u64 = 64 << 10;
const THEM: PeerId = PeerId(1);

struct Node {
    driver: Driver,
    pool: Arc<Pool>,
}

fn node(transport: Arc<dyn Transport>) -> Node {
    let config = ManagerConfig::default();
    let manager = BufferManager::new(PeerId(0), config, vec![transport]).unwrap();
    let config = PoolConfig {
        block_bytes: BLOCK_BYTES,
        slab_bytes: 4 << 20,
        ..PoolConfig::default()
    };
    let pool = manager.create_pool(config).unwrap();
    let driver = Driver::start(manager).unwrap();
    Node { driver, pool }
}

fn connected(open: fn() -> Arc<dyn Transport>) -> [Node; 2] {
    let nodes = [node(open()), node(open())];
    for at in 0..2 {
        let name = nodes[at].driver.manager().transports()[0].name();
        let metadata = nodes[1 - at].driver.manager().local_metadata(name).unwrap();
        let manager = nodes[at].driver.manager();
        manager.connect(THEM, name, &metadata).unwrap();
    }
    nodes
}

impl Node {
    fn grant(&self, set: &BlockSet) -> Vec<u8> {
        let lease = Lease {
            peer: THEM,
            rights: Rights::Write,
            lasts: PATIENCE,
        };
        let now = self.driver.now();
        let manager = self.driver.manager();
        let granted = manager.grant(&self.pool, &set.handles(), lease, now);
        granted.unwrap().encode(now)
    }

    fn put(&self, n: u32, grant: &[u8]) -> Transfer {
        let set = self.pool.allocate(n).unwrap();
        set.seal().unwrap();
        let now = self.driver.now();
        let grant = RemoteGrant::decode(grant, THEM, now, 1000).unwrap();
        let options = TransferOptions::default();
        let manager = self.driver.manager();
        let put = manager.put(&self.pool, &set.handles(), &grant, &options, now);
        self.driver.ring();
        put.unwrap()
    }
}

/// Sleeps until the wait of this number is over.
fn wait(chime: &Chime, number: u64) {
    let started = Instant::now();
    loop {
        assert!(started.elapsed() < PATIENCE, "it never happened");
        chime.sleep(PATIENCE);
        if chime.take().contains(&number) {
            return;
        }
    }
}

fn transfers_and_events_wake_those_who_wait(open: fn() -> Arc<dyn Transport>) {
    let [near, far] = connected(open);
    let (ends, events) = (Chime::new().unwrap(), Chime::new().unwrap());
    let target = far.pool.allocate(8).unwrap();
    for round in 1..=3 {
        assert!(!far.driver.listen(&events));
        let put = near.put(8, &far.grant(&target));
        if !put.wake(&ends.waker(round)) {
            wait(&ends, round);
        }
        assert_eq!(put.result().unwrap().unwrap().blocks, 8);
        // Who finds the event before the bell for it has rung hears that bell the next time, when there is none yet.
        let arrived = loop {
            if let Some(event) = far.driver.manager().take_event() {
                break event;
            }
            if !far.driver.listen(&events) {
                wait(&events, EVENTS);
            }
        };
        assert!(matches!(arrived, Event::Arrived(_)), "{arrived:?}");
    }
}

fn closing_ends_transfers_and_waits(open: fn() -> Arc<dyn Transport>) {
    let [near, far] = connected(open);
    let target = far.pool.allocate(8).unwrap();
    let grant = far.grant(&target);
    far.driver.close();
    // The far end has hung up, or is seen to have: nothing can be left hanging.
    let now = near.driver.now();
    let set = near.pool.allocate(8).unwrap();
    set.seal().unwrap();
    let grant = RemoteGrant::decode(&grant, THEM, now, 1000).unwrap();
    let options = TransferOptions::default();
    let manager = near.driver.manager();
    let put = manager
        .put(&near.pool, &set.handles(), &grant, &options, now)
        .unwrap();
    let events = Chime::new().unwrap();
    assert!(!near.driver.listen(&events));
    near.driver.close();
    near.driver.close();
    assert_eq!(put.result().unwrap(), Err(TransferError::PeerGone));
    wait(&events, EVENTS);
    assert!(near.driver.listen(&events), "nobody will bring any more");
    let refused = manager.put(&near.pool, &set.handles(), &grant, &options, now);
    assert_eq!(refused.map(drop), Err(MemoryError::UnknownPeer));
}

fn a_transfer_that_is_given_up_ends(open: fn() -> Arc<dyn Transport>) {
    let [near, far] = connected(open);
    let target = far.pool.allocate(32).unwrap();
    let put = near.put(32, &far.grant(&target));
    put.abort();
    near.driver.ring();
    let ends = Chime::new().unwrap();
    if !put.wake(&ends.waker(7)) {
        wait(&ends, 7);
    }
    let ended = put.result().unwrap();
    let is_named = matches!(ended, Ok(_) | Err(TransferError::Timeout { .. }));
    assert!(is_named, "{ended:?}");
}

fn shm() -> Arc<dyn Transport> {
    Arc::new(ShmTransport::open().unwrap())
}

fn tcp() -> Arc<dyn Transport> {
    Arc::new(TcpTransport::open(&TcpConfig::default()).unwrap())
}

#[test]
fn transfers_and_events_wake_those_who_wait_over_shared_memory() {
    transfers_and_events_wake_those_who_wait(shm);
}

#[test]
fn transfers_and_events_wake_those_who_wait_over_tcp() {
    transfers_and_events_wake_those_who_wait(tcp);
}

#[test]
fn closing_ends_transfers_and_waits_over_shared_memory() {
    closing_ends_transfers_and_waits(shm);
}

#[test]
fn closing_ends_transfers_and_waits_over_tcp() {
    closing_ends_transfers_and_waits(tcp);
}

#[test]
fn a_transfer_that_is_given_up_ends_over_shared_memory() {
    a_transfer_that_is_given_up_ends(shm);
}

#[test]
fn a_transfer_that_is_given_up_ends_over_tcp() {
    a_transfer_that_is_given_up_ends(tcp);
}

#[test]
fn a_grant_ends_in_time_though_nobody_calls() {
    let [near, far] = connected(shm);
    let target = far.pool.allocate(1).unwrap();
    let lease = Lease {
        peer: THEM,
        rights: Rights::Write,
        lasts: Duration::from_millis(20),
    };
    let events = Chime::new().unwrap();
    assert!(!far.driver.listen(&events));
    let manager = far.driver.manager();
    let granted = manager.grant(&far.pool, &target.handles(), lease, far.driver.now());
    far.driver.ring();
    wait(&events, EVENTS);
    let ended = Event::WriteGrantExpired(granted.unwrap().id);
    assert_eq!(manager.take_event(), Some(ended));
    drop(near);
}

#[test]
fn a_chime_is_readable_from_when_it_is_rung_until_it_is_taken() {
    let chime = Chime::new().unwrap();
    let is_readable = |chime: &Chime| {
        let mut byte = [0; 8];
        rustix::io::read(chime.as_fd(), &mut byte).is_ok()
    };
    assert!(!is_readable(&chime));
    for number in [3, 3, 4] {
        chime.waker(number).wake();
    }
    chime.sleep(PATIENCE);
    assert_eq!(chime.take(), [3, 4]);
    assert!(!is_readable(&chime) && chime.take().is_empty());
}
