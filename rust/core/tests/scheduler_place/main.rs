//! Gang placement against a naive model: random operations, and the cases that a person would try first.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod closeness;
mod model;
mod ops;

use model::{EXTENT, Pair};
use ops::op;
use orchestra_core::{
    Time,
    scheduler::{GpuId, PlaceRequest},
};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_gang_is_refused_only_where_no_domain_has_room(ops in prop::collection::vec(op(), 1..120)) {
        let mut pair = Pair::new();
        for op in &ops {
            pair.apply(op);
            pair.check();
        }
        while !pair.placements.is_empty() {
            pair.release(0);
        }
        let stats = pair.real.stats(Time::ZERO);
        prop_assert_eq!(stats.gpu_bytes_free, stats.gpu_bytes_total);
    }
}

#[test]
fn narrow_gangs_take_the_low_end_and_wide_ones_the_tightest_domain() {
    let mut pair = Pair::new();
    for gpu in 0..24 {
        pair.add_gpu(gpu / 8, 0, 16);
    }
    let mut place = |num_gpus, extents| {
        let request = PlaceRequest {
            num_gpus,
            bytes_per_gpu: extents * EXTENT,
            ..PlaceRequest::default()
        };
        let first = pair.real.place(&request).unwrap().gpus[0];
        let gpu = pair.gpus.iter().position(|gpu| gpu.id == first.gpu);
        (gpu.unwrap(), first.extent.offset_bytes / EXTENT)
    };
    assert_eq!(place(1, 4), (0, 0));
    // Too much for the first domain; of the other two, both empty, the last.
    assert_eq!(place(8, 14), (16, 2));
    // Two extents are left on each GPU there, and that is enough.
    assert_eq!(place(8, 2), (16, 0));
    // The eighth GPU of the first domain has less room than that of the second.
    assert_eq!(place(8, 2), (0, 14));
}

#[test]
fn a_wide_gang_skips_domains_that_only_look_large_enough() {
    // 5 and 6 extents are of one size class: the index has to count to tell them apart.
    let mut pair = Pair::new();
    for (domain, extents) in [(0, 6), (0, 5), (1, 6), (1, 6), (2, 6), (2, 5)] {
        pair.add_gpu(domain, 0, extents);
    }
    let gang = |num_gpus| PlaceRequest {
        num_gpus,
        bytes_per_gpu: 6 * EXTENT,
        ..PlaceRequest::default()
    };
    let placed = pair.real.place(&gang(2)).unwrap();
    let gpus: Vec<GpuId> = placed.gpus.iter().map(|placed| placed.gpu).collect();
    assert_eq!(gpus, [pair.gpus[2].id, pair.gpus[3].id]);
    let refused = pair.real.place(&gang(2)).unwrap_err();
    assert_eq!(refused.limit(), Some(1));
}

#[test]
fn a_domain_of_72_grows_and_shrinks() {
    let mut pair = Pair::new();
    for _ in 0..72 {
        pair.add_gpu(0, 0, 20);
    }
    pair.place(&PlaceRequest {
        num_gpus: 72,
        bytes_per_gpu: 7 * EXTENT,
        ..PlaceRequest::default()
    });
    assert_eq!(pair.placements.len(), 1);
    pair.check();
    while !pair.gpus.is_empty() {
        pair.lose_gpu(0, true);
    }
    pair.check();
}

#[test]
fn stranded_memory_is_weighed_by_what_was_asked_for() {
    let mut pair = Pair::new();
    pair.add_gpu(0, 0, 16);
    let gang = |extents| PlaceRequest {
        num_gpus: 1,
        bytes_per_gpu: extents * EXTENT,
        ..PlaceRequest::default()
    };
    for extents in [4, 4, 4] {
        pair.place(&gang(extents));
    }
    let use_now = || pair.real.gpu_memory(pair.gpus[0].id).unwrap();
    assert_eq!(
        (use_now().bytes_free, use_now().bytes_stranded),
        (4 * EXTENT, 0)
    );
    pair.place(&gang(2));
    // Three of four requests were larger than the two extents that are left.
    let left = pair.real.gpu_memory(pair.gpus[0].id).unwrap();
    assert_eq!(
        (left.bytes_free, left.bytes_stranded),
        (2 * EXTENT, 3 * EXTENT / 2)
    );
    assert!((left.unusable_ratio - 1.0).abs() < f64::EPSILON);
    let domain = pair.real.domain_memory("domain-0").unwrap();
    assert_eq!(
        (domain.num_gpus, domain.bytes_stranded),
        (1, 3 * EXTENT / 2)
    );
}
