//! What transfers in the foreground notice of defragmentation.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use orchestra_memory::{BlockSet, Chime, DefragmentConfig, Defragmenter, Pool};

use crate::{
    median,
    node::{BLOCK_BYTES, Node, Peer, config, wait},
    percentile,
};

/// Rounds of each kind, and how long one lasts.
const ROUNDS: usize = 15;
const LASTS: Duration = Duration::from_secs(1);

/// What one round saw.
struct Round {
    median: f64,
    p99: f64,
    /// How scattered the pool was at its end.
    wire: f64,
    /// MiB that were moved meanwhile.
    moved: f64,
}

/// Puts of 16 blocks while others come and go, microseconds.
fn round(is_on: bool) -> Round {
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
    let mut latencies = Vec::new();
    let wire = thread::scope(|scope| {
        scope.spawn(|| churn(&node.pool, &is_over));
        let end = Instant::now() + LASTS;
        while Instant::now() < end {
            let started = Instant::now();
            wait(&node.put(&set, &grant), &chime);
            latencies.push(started.elapsed().as_secs_f64() * 1e6);
            peer.ask("take");
            thread::sleep(Duration::from_millis(1));
        }
        let wire = node.pool.fragmentation().wire;
        is_over.store(true, Ordering::Relaxed);
        wire
    });
    Round {
        median: percentile(&mut latencies, 0.5),
        p99: percentile(&mut latencies, 0.99),
        wire,
        moved: node.driver.defragmented_bytes() as f64 / f64::from(1 << 20),
    }
}

/// With and without a defragmenter in turns; and without it once more, which says what the figures are good for.
pub(crate) fn measure() {
    let mut kinds = [const { Vec::new() }; 3];
    for turn in 0..3 * ROUNDS {
        // Another order each time: what comes first or last is not always the same.
        let kind = (turn + turn / 3) % 3;
        kinds[kind].push(round(kind == 2));
    }
    let middle = |of: fn(&Round) -> f64| {
        kinds
            .each_ref()
            .map(|rounds| median(rounds.iter().map(of).collect()))
    };
    let (medians, p99s) = (middle(|round| round.median), middle(|round| round.p99));
    let wires = middle(|round| round.wire);
    let beside = |values: [f64; 3]| 2.0 * values[2] / (values[0] + values[1]);
    println!(
        "foreground: 1 MiB over shm while sets come and go, medians of {ROUNDS} rounds: p99 off {:.0}, off again {:.0} us \
         = {:.2}x, on {:.0} us = {:.2}x; median off {:.0}, {:.0} us, on {:.0} us = {:.2}x; wire score off {:.2}, on {:.2}, {:.0} MiB moved a round",
        p99s[0],
        p99s[1],
        p99s[1] / p99s[0],
        p99s[2],
        beside(p99s),
        medians[0],
        medians[1],
        medians[2],
        beside(medians),
        wires[0],
        wires[2],
        middle(|round| round.moved)[2],
    );
}

/// Sets that grow side by side, a block at a time, and go: no two neighbours are of one set, and more come than a
/// defragmenter may join.
fn churn(pool: &Arc<Pool>, is_over: &AtomicBool) {
    let (mut whole, mut growing, mut draw) = (Vec::new(), Vec::<BlockSet>::new(), 1_usize);
    while !is_over.load(Ordering::Relaxed) {
        if growing.is_empty() {
            growing = (0..8).map(|_| pool.allocate(1).unwrap()).collect();
        } else {
            for set in &mut growing {
                set.extend(1).unwrap();
            }
        }
        let len = growing[0].len();
        for set in &growing {
            pool.seal(&set.handles_in(len - 1..len).unwrap()).unwrap();
        }
        if len == 32 {
            whole.append(&mut growing);
        }
        while whole.len() > 150 {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            whole.swap_remove((draw >> 33) % whole.len());
        }
        thread::sleep(Duration::from_micros(200));
    }
}
