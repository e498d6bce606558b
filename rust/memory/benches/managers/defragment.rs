//! What defragmentation is worth: transfers of sets that have grown block by block beside others, before and after, each
//! beside what moves the same bytes in one piece.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::Time;
use orchestra_memory::{
    BlockSet, DefragmentConfig, Defragmenter, Direction, PeerId, Pool, Progress, Segment, SlabId,
    Transport,
};

use crate::{
    limits::{self, Limit},
    median,
    node::{Peer, config},
    rig, transports,
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

/// GB/s of putting sets as they lay before and as they lie now, and of the limit for the same bytes in one piece; in
/// turns, so that what else the machine does falls on all of them. The middle ones.
fn speeds(
    transport: &dyn Transport,
    limit: &mut Limit,
    plans: [&[Vec<Segment>]; 2],
    bytes: u64,
) -> [f64; 3] {
    let together = [Segment {
        len: bytes,
        ..Segment::default()
    }];
    let mut taken = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        for (plan, taken) in plans.iter().zip(&mut taken) {
            let started = Instant::now();
            let segments = &plan[round % plan.len()];
            let id = transport
                .post(Direction::Put, THEM, segments, None)
                .unwrap();
            let mut naps = rig::Naps::new();
            while transport.poll(id) == Progress::Pending {
                naps.turn(transport);
            }
            taken.push(started.elapsed().as_secs_f64());
            let _ = transport.release(id);
        }
        taken[2].push(limit.run(Direction::Put, &together));
    }
    taken.map(|seconds| bytes as f64 / median(seconds) / 1e9)
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
    defragmenter.step(now, || false);
    loop {
        // The clock is made up: every step has a full budget.
        now = now + Duration::from_secs(1);
        let report = defragmenter.step(now, || false);
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
        pool.add_slab(Arc::clone(&slab)).unwrap();
        let mut peer = Peer::start(env!("CARGO_BIN_EXE_memory-peer"), &[kind, "64"]);
        let theirs = rig::from_hex(&peer.answer());
        transport.connect(THEM, &theirs).unwrap();
        let ours = rig::to_hex(&transport.local_metadata().unwrap());
        assert_eq!(peer.ask(&format!("connect 9 {ours}")), "Ok(())");
        let sets = scattered(&pool);
        let plan = || -> Vec<_> { sets.iter().map(|set| segments(set, block_bytes)).collect() };
        let blocks = |plan: &[Vec<Segment>]| {
            let descriptors: usize = plan.iter().map(Vec::len).sum();
            (SETS * BLOCKS as usize) as f64 / descriptors as f64
        };
        let remote_base = peer.ask("base 0").parse().unwrap();
        let mut limit = limits::of(kind, &slab, peer.child.id(), remote_base);
        let scattered = plan();
        let copied = defragment(&pool);
        let joined = plan();
        // The bytes of the old places are still there for a transport, which knows nothing of blocks.
        let (plans, bytes) = ([&*scattered, &*joined], u64::from(BLOCKS) * block_bytes);
        let [before, after, most] = speeds(&*transport, &mut limit, plans, bytes);
        println!(
            "defragment: {kind} {} KiB: blocks a descriptor {:.1} -> {:.1}, put {before:.2} -> {after:.2} GB/s = {:.2}x; \
             {} in one piece {most:.2}: {:.2} -> {:.2} of it, so {:.1}x at most; moved at {:.1} GB/s",
            block_bytes >> 10,
            blocks(&scattered),
            blocks(&joined),
            after / before,
            limit.name(),
            before / most,
            after / most,
            most / before,
            copied / 1e9,
        );
    }
}

pub(crate) fn measure() {
    transports().for_each(transfers);
}
