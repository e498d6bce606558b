//! Allocating and freeing under criterion: `cargo bench -p orchestra-memory --bench alloc`. The pool has been full
//! for long, so that free runs of all lengths exist. Beside it what a compare-and-swap costs here, the limit.

#![expect(clippy::unwrap_used, reason = "a benchmark fails loudly")]

use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
};

use criterion::{Criterion, criterion_group, criterion_main};

use crate::churned::churned;

#[path = "managers/churned.rs"]
mod churned;

fn alloc(c: &mut Criterion) {
    let word = AtomicU64::new(0);
    c.bench_function("compare_and_swap", |b| {
        b.iter(|| {
            let seen = black_box(&word).load(Ordering::Acquire);
            word.compare_exchange(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire)
        });
    });
    let (pool, _sets) = churned();
    for n in [1_u32, 64] {
        c.bench_function(&format!("allocate_and_free/{n}"), |b| {
            b.iter(|| drop(black_box(pool.allocate(n).unwrap())));
        });
    }
    let sealed = pool.allocate(1).unwrap();
    sealed.seal().unwrap();
    let handle = sealed.handle(0).unwrap();
    c.bench_function("pin_and_unpin", |b| {
        b.iter(|| drop(black_box(pool.pin(handle).unwrap())));
    });
    c.bench_function("seal/64", |b| {
        b.iter_batched(
            || pool.allocate(64).unwrap(),
            |set| {
                set.seal().unwrap();
                set
            },
            criterion::BatchSize::PerIteration,
        );
    });
}

criterion_group!(benches, alloc);
criterion_main!(benches);
