//! A defragmenter on pools that were scattered on purpose.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{cell::Cell, sync::Arc, time::Duration};

use orchestra_core::Time;
use orchestra_memory::{
    BlockSet, BlockState, DefragmentConfig, Defragmenter, MemoryError, Pool, PoolConfig, Slab,
    SlabId,
};

const BLOCK_BYTES: u64 = 4096;

fn pool(slabs: u32) -> Arc<Pool> {
    let config = PoolConfig {
        block_bytes: BLOCK_BYTES,
        slab_bytes: 2 << 20,
        initial_slabs: slabs,
        max_slabs: slabs,
        ..PoolConfig::default()
    };
    let pool = Pool::new(config).unwrap();
    for id in 0..slabs {
        let slab = Slab::create(SlabId(id), &config.slab()).unwrap();
        pool.add_slab(Arc::new(slab)).unwrap();
    }
    pool
}

/// Fills each block of a set with a number of its own and seals it.
fn fill(set: &BlockSet, tag: u64) {
    for at in 0..set.len() {
        let bytes = (tag * 1000 + at as u64)
            .to_le_bytes()
            .repeat(BLOCK_BYTES as usize / 8);
        set.write(at, 0, &bytes).unwrap();
    }
    set.seal().unwrap();
}

fn check(set: &BlockSet, tag: u64) {
    for at in 0..set.len() {
        let guard = set.pool().pin(set.handle(at).unwrap()).unwrap();
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        guard.read(0, &mut bytes).unwrap();
        let expected = (tag * 1000 + at as u64)
            .to_le_bytes()
            .repeat(BLOCK_BYTES as usize / 8);
        assert!(bytes == expected, "block {at} of set {tag}");
    }
}

/// Sequences that took turns growing by one block, in half of the pool: every descriptor carries one block.
fn interleaved(pool: &Arc<Pool>, num_sets: u32, blocks: u32) -> Vec<BlockSet> {
    let mut sets: Vec<BlockSet> = (0..num_sets).map(|_| pool.allocate(1).unwrap()).collect();
    for _ in 1..blocks {
        for set in &mut sets {
            set.extend(1).unwrap();
        }
    }
    for (tag, set) in (1..).zip(&sets) {
        fill(set, tag);
    }
    sets
}

fn config() -> DefragmentConfig {
    DefragmentConfig {
        bytes_per_second: 100 << 20,
        unit_bytes: 32 * BLOCK_BYTES,
        ..DefragmentConfig::default()
    }
}

#[test]
fn scattered_sequences_are_joined_within_the_budget_and_keep_their_bytes() {
    let pool = pool(1);
    let sets = interleaved(&pool, 8, 32);
    assert!(pool.fragmentation().wire > 0.9);
    let mut defragmenter = Defragmenter::new(Arc::clone(&pool), config()).unwrap();
    let mut copied = 0;
    let start = Time(1_000_000);
    for ms in 0..200 {
        let now = start + Duration::from_millis(ms);
        copied += defragmenter.step(now, || false).copied_bytes;
        let earned = ms * config().bytes_per_second / 1000;
        assert!(copied <= earned, "{copied} bytes after {ms} ms");
        pool.check_integrity();
    }
    assert!(
        !defragmenter
            .step(start + Duration::from_secs(1), || false)
            .is_running
    );
    let after = pool.fragmentation();
    assert!(after.wire <= 0.4, "{after:?}");
    assert!(after.descriptors <= 40, "{after:?}");
    for (tag, set) in (1..).zip(&sets) {
        check(set, tag);
    }
}

#[test]
fn nothing_moves_while_transfers_are_busy_or_where_nothing_is_gained() {
    let pool = pool(1);
    let sets = interleaved(&pool, 4, 16);
    let mut defragmenter = Defragmenter::new(Arc::clone(&pool), config()).unwrap();
    for ms in 0..50 {
        let report = defragmenter.step(Time(ms * 1000), || true);
        assert_eq!(report.copied_bytes, 0);
    }
    // What was not spent is not made up for.
    assert_eq!(defragmenter.step(Time(50_000), || false).copied_bytes, 0);
    drop(sets);
    let _whole = pool.allocate(64).unwrap();
    for ms in 200..400 {
        assert_eq!(defragmenter.step(Time(ms * 1000), || false).copied_bytes, 0);
    }
}

/// A defragmenter in the middle of moving 64 blocks, because a transfer came after the first half.
fn interrupted(pool: &Arc<Pool>) -> Defragmenter {
    let config = DefragmentConfig {
        unit_bytes: 64 * BLOCK_BYTES,
        ..config()
    };
    let mut defragmenter = Defragmenter::new(Arc::clone(pool), config).unwrap();
    defragmenter.step(Time(0), || false);
    let asked = Cell::new(0);
    let report = defragmenter.step(Time(10_000), || asked.replace(asked.get() + 1) > 0);
    let half = 32 * BLOCK_BYTES;
    assert_eq!((report.copied_bytes, report.moved_blocks), (half, 0));
    assert!(report.is_running);
    assert_eq!(pool.stats().in_state(BlockState::Migrating), 64);
    defragmenter
}

#[test]
fn a_move_makes_way_for_transfers_and_goes_on_after_them() {
    let pool = pool(1);
    let sets = interleaved(&pool, 3, 64);
    let mut defragmenter = interrupted(&pool);
    assert_eq!(
        defragmenter.step(Time(11_000), || true).copied_bytes,
        0,
        "it waits while they last"
    );
    let report = defragmenter.step(Time(12_000), || false);
    assert!(report.moved_blocks >= 64, "{report:?}");
    pool.check_integrity();
    for (tag, set) in (1..).zip(&sets) {
        check(set, tag);
    }
}

#[test]
fn a_move_that_transfers_hold_up_for_long_is_given_up() {
    let pool = pool(1);
    let sets = interleaved(&pool, 3, 64);
    let mut defragmenter = interrupted(&pool);
    defragmenter.step(Time(100_000), || true);
    let stats = pool.stats();
    let left = [BlockState::Migrating, BlockState::Reserved].map(|state| stats.in_state(state));
    assert_eq!(left, [0, 0]);
    pool.check_integrity();
    for (tag, set) in (1..).zip(&sets) {
        check(set, tag);
    }
}

#[test]
fn pinned_blocks_stay_where_they_are() {
    let pool = pool(1);
    let sets = interleaved(&pool, 4, 16);
    let pins: Vec<_> = sets
        .iter()
        .flat_map(BlockSet::handles)
        .map(|handle| pool.pin(handle).unwrap())
        .collect();
    let mut defragmenter = Defragmenter::new(Arc::clone(&pool), config()).unwrap();
    for ms in 0..50 {
        assert_eq!(defragmenter.step(Time(ms * 1000), || false).copied_bytes, 0);
    }
    drop(pins);
    assert!((50..100).any(|ms| defragmenter.step(Time(ms * 1000), || false).moved_blocks > 0));
}

#[test]
fn walls_between_free_runs_go_when_long_runs_are_asked_for() {
    let pool = pool(1);
    let mut sets: Vec<BlockSet> = (0..128).map(|_| pool.allocate(4).unwrap()).collect();
    for (tag, set) in (1..).zip(&sets) {
        fill(set, tag);
    }
    // Every second one goes: no free run is longer than 4.
    let mut at = 0;
    sets.retain(|_| {
        at += 1;
        at % 2 == 0
    });
    // What is asked for from now on is long.
    for _ in 0..256 {
        drop(pool.allocate(64).unwrap());
    }
    assert!(pool.fragmentation().alloc_p90 > 0.9);
    let mut defragmenter = Defragmenter::new(Arc::clone(&pool), config()).unwrap();
    for ms in 0..2000 {
        defragmenter.step(Time(ms * 1000), || false);
    }
    let after = pool.fragmentation();
    assert!(
        after.alloc_p90 <= 0.5 && after.largest_run >= 64,
        "{after:?}"
    );
    for (at, set) in sets.iter().enumerate() {
        check(set, 2 * at as u64 + 2);
    }
}

#[test]
fn a_drained_slab_can_be_taken_out_and_no_sooner() {
    let pool = pool(2);
    let sets = interleaved(&pool, 4, 16);
    let slab = sets[0].place(0).unwrap().0.id();
    let pin = pool.pin(sets[3].handle(7).unwrap()).unwrap();
    let mut defragmenter = Defragmenter::new(Arc::clone(&pool), config()).unwrap();
    defragmenter.drain(slab).unwrap();
    assert_eq!(pool.take_out(slab).map(drop), Err(MemoryError::InUse));
    for ms in 0..100 {
        assert!(defragmenter.step(Time(ms * 1000), || false).is_running);
    }
    assert!(!pool.is_drained(slab), "a pinned block stays");
    drop(pin);
    for ms in 100..200 {
        defragmenter.step(Time(ms * 1000), || false);
    }
    assert!(pool.is_drained(slab));
    let taken = pool.take_out(slab).unwrap();
    assert_eq!((taken.id(), pool.slabs().len()), (slab, 1));
    for (tag, set) in (1..).zip(&sets) {
        check(set, tag);
    }
    // What is left of the pool goes on as before.
    assert!(pool.allocate(500).is_err());
    drop(sets);
    assert_eq!(pool.stats().allocatable, 512);
    assert_eq!(pool.stats().in_state(BlockState::Free), 1024);
    pool.check_integrity();
}
