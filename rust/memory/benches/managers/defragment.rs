//! What defragmentation is worth: transfers of sets that have grown block by block beside others, before and after,
//! and what those in the foreground notice of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use orchestra_core::Time;
use orchestra_memory::{
    BlockSet, Chime, DefragmentConfig, Defragmenter, Direction, PeerId, Pool, Progress, Segment,
    SlabId, Transport,
};

use crate::{
    median,
    node::{BLOCK_BYTES, Node, Peer, config, wait},
    percentile, rig, transports,
};

const THEM: PeerId = PeerId(1);
/// Sets that grow side by side, and the blocks of each at the end.
const SETS: usize = 28;
const BLOCKS: u32 = 256;
const ROUNDS: usize = 21;

/// Sets that took their blocks one at a time and in turn, so that no two neighbours are of one set.
fn scattered(pool: &Arc<Pool>) -> Vec<BlockSet> {
    let mut sets: Vec<BlockSet> = (0..SETS).map(|_| pool.allocate(1).unwrap()).collect();
    for step in 1..BLOCKS as usize {
        // Another order each time: in the same one, a set's blocks would lie in even steps.
        for at in 0..SETS {
            sets[(at * 11 + step * 5) % SETS].extend(1).unwrap();
        }
    }
    for set in &sets {
        set.seal().unwrap();
    }
    sets
}

/// As a manager would plan it: a descriptor for each run, to neighbours at the peer.
fn segments(set: &BlockSet, block_bytes: u64) -> Vec<Segment> {
    let mut remote_offset = 0;
    let segment = |run: orchestra_memory::Extent| {
        let len = u64::from(run.len) * block_bytes;
        let segment = Segment {
            local_slab: SlabId(0),
            local_offset: u64::from(run.start) * block_bytes,
            remote_slab: SlabId(0),
            remote_offset,
            len,
        };
        remote_offset += len;
        segment
    };
    set.extents().into_iter().map(segment).collect()
}

/// GB/s of putting each set, the middle one.
fn speed(transport: &dyn Transport, sets: &[BlockSet], block_bytes: u64) -> f64 {
    let round = |round: usize| {
        let segments = segments(&sets[round % sets.len()], block_bytes);
        let started = Instant::now();
        let id = transport
            .post(Direction::Put, THEM, &segments, None)
            .unwrap();
        while transport.poll(id) == Progress::Pending {
            rig::turn(transport, Duration::from_millis(1));
        }
        let seconds = started.elapsed().as_secs_f64();
        let _ = transport.release(id);
        f64::from(BLOCKS) * block_bytes as f64 / seconds / 1e9
    };
    median((0..ROUNDS).map(round).collect())
}

/// Until there is nothing left to gain; bytes copied per second of it.
fn defragment(pool: &Arc<Pool>) -> f64 {
    let config = DefragmentConfig {
        bytes_per_second: u64::MAX,
        start_above: 0.0,
        hysteresis: 0.0,
        look_every: Duration::from_secs(64),
        unit_bytes: DefragmentConfig::default().unit_bytes,
    };
    let mut defragmenter = Defragmenter::new(Arc::clone(pool), config).unwrap();
    let (mut now, mut copied) = (Time::ZERO, 0);
    let started = Instant::now();
    defragmenter.step(now, false);
    loop {
        // The clock is made up: every step has a full budget.
        now = now + Duration::from_secs(1);
        let report = defragmenter.step(now, false);
        copied += report.copied_bytes;
        if report.moved_blocks == 0 {
            return copied as f64 / started.elapsed().as_secs_f64();
        }
    }
}

fn transfers(kind: &str) {
    for block_bytes in [4 << 10, 16 << 10, 64 << 10] {
        // A quarter of the pool is free: moving needs room.
        let slab_bytes =
            (SETS as u64 * u64::from(BLOCKS) * block_bytes * 4 / 3).next_multiple_of(2 << 20);
        let transport = rig::open(kind);
        let config = config(block_bytes, slab_bytes);
        let pool = Pool::new(config).unwrap();
        let slab = Arc::new(orchestra_memory::Slab::create(SlabId(0), &config.slab()).unwrap());
        transport.register(&slab).unwrap();
        pool.add_slab(slab).unwrap();
        let mut peer = Peer::start(env!("CARGO_BIN_EXE_memory-peer"), &[kind, "64"]);
        let theirs = rig::from_hex(&peer.answer());
        transport.connect(THEM, &theirs).unwrap();
        let ours = rig::to_hex(&transport.local_metadata().unwrap());
        assert_eq!(peer.ask(&format!("connect 9 {ours}")), "Ok(())");
        let sets = scattered(&pool);
        let runs = |sets: &[BlockSet]| {
            let descriptors: usize = sets.iter().map(|set| set.extents().len()).sum();
            (SETS * BLOCKS as usize) as f64 / descriptors as f64
        };
        let (blocks_before, before) = (runs(&sets), speed(&*transport, &sets, block_bytes));
        let copied = defragment(&pool);
        let (blocks_after, after) = (runs(&sets), speed(&*transport, &sets, block_bytes));
        println!(
            "defragment: {kind} {} KiB: blocks a descriptor {blocks_before:.1} -> {blocks_after:.1}, put {before:.2} -> \
             {after:.2} GB/s = {:.1}x; moved at {:.1} GB/s",
            block_bytes >> 10,
            after / before,
            copied / 1e9,
        );
    }
}

/// Microseconds of putting 16 blocks while others come and go, with and without a defragmenter, in turns.
fn foreground() {
    let mut latencies = [Vec::new(), Vec::new()];
    let mut moved = 0;
    for round in 0..6 {
        let is_on = round % 2 == 1;
        let node = Node::new("shm", config(BLOCK_BYTES, 512 << 20));
        let mut peer = Peer::connected(&node);
        let grant = peer.grant(&node, 16);
        let set = node.sealed(16);
        if is_on {
            let config = DefragmentConfig {
                start_above: 0.05,
                hysteresis: 0.0,
                ..DefragmentConfig::default()
            };
            let pool = Arc::clone(&node.pool);
            node.driver
                .defragment(Defragmenter::new(pool, config).unwrap());
        }
        let is_over = AtomicBool::new(false);
        let chime = Chime::new().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| churn(&node.pool, &is_over));
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end {
                let started = Instant::now();
                wait(&node.put(&set, &grant), &chime);
                latencies[usize::from(is_on)].push(started.elapsed().as_secs_f64() * 1e6);
                peer.ask("take");
                thread::sleep(Duration::from_millis(1));
            }
            is_over.store(true, Ordering::Relaxed);
        });
        if is_on {
            moved += usize::from(node.pool.fragmentation().wire < 1.0);
        }
    }
    let [off, on] = latencies
        .each_mut()
        .map(|all| (percentile(all, 0.5), percentile(all, 0.99)));
    println!(
        "defragment: 1 MiB over shm while sets come and go, median and p99: off {:.0} and {:.0} us, on {:.0} and {:.0} us \
         = {:.2}x p99 ({} puts each, {moved} of 3 pools kept)",
        off.0,
        off.1,
        on.0,
        on.1,
        on.1 / off.1,
        latencies[0].len(),
    );
}

/// Sets that grow beside each other and go, for ever.
fn churn(pool: &Arc<Pool>, is_over: &AtomicBool) {
    let (mut sets, mut draw) = (Vec::<BlockSet>::new(), 1_usize);
    while !is_over.load(Ordering::Relaxed) {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if sets.len() >= 200 {
            sets.swap_remove((draw >> 33) % sets.len());
        }
        let mut set = pool.allocate(1).unwrap();
        set.seal().unwrap();
        if let Some(other) = sets.last_mut() {
            let _ = other.extend(1);
            let _ = other.seal();
        }
        if set.extend(8).is_ok() {
            let _ = set.seal();
        }
        sets.push(set);
        thread::sleep(Duration::from_micros(200));
    }
}

pub(crate) fn measure() {
    transports().for_each(transfers);
    foreground();
}
