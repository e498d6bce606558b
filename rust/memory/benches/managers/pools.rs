//! Allocating and freeing by several threads, beside a compare-and-swap that all of them do.

use std::{
    hint::black_box,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use crate::{churned::churned, median};

const ROUNDS: usize = 9;
const TIMES: usize = 20_000;

/// Nanoseconds that one time took a thread, in the middle one of some rounds.
pub(crate) fn nanoseconds(threads: usize, act: impl Fn() + Sync) -> f64 {
    let rounds = (0..ROUNDS).map(|_| {
        let barrier = Barrier::new(threads);
        let taken: Vec<f64> = thread::scope(|scope| {
            let run = || {
                barrier.wait();
                let started = Instant::now();
                (0..TIMES).for_each(|_| act());
                started.elapsed().as_secs_f64() * 1e9 / TIMES as f64
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            running.into_iter().map(|one| one.join().unwrap()).collect()
        });
        median(taken)
    });
    median(rounds.collect())
}

pub(crate) fn measure() {
    let (pool, _sets) = churned();
    let word = AtomicU64::new(0);
    for threads in [1, 2, 4] {
        let swap = nanoseconds(threads, || {
            let seen = black_box(&word).load(Ordering::Acquire);
            let _ = word.compare_exchange(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire);
        });
        let [one, extent] =
            [1, 64].map(|n| nanoseconds(threads, || drop(black_box(pool.allocate(n).unwrap()))));
        println!(
            "pools: {threads} threads: compare and swap {swap:.0} ns, allocate and free one block {one:.0} ns, \
             64 blocks {extent:.0} ns"
        );
    }
}
