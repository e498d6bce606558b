//! A pool that has been full for long: sequences come and go at 95 % occupancy.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use orchestra_memory::{BlockSet, Pool, PoolConfig, Slab, SlabId};

const BLOCKS_PER_SLAB: u64 = 2048;
const SLABS: u32 = 4;
/// Requests after which what the start looked like is forgotten: every block changed hands some 50 times.
const STEPS: usize = 20_000;

/// A small generator (xorshift64), so that the test needs no crate and always sees the same requests.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % u64::from(n)) as u32
    }
}

fn pool() -> Arc<Pool> {
    let config = PoolConfig {
        block_bytes: (2 << 20) / BLOCKS_PER_SLAB,
        slab_bytes: 2 << 20,
        initial_slabs: SLABS,
        max_slabs: SLABS,
        ..PoolConfig::default()
    };
    let pool = Pool::new(config).unwrap();
    for id in 0..SLABS {
        let slab = Slab::create(SlabId(id), &config.slab()).unwrap();
        pool.add_slab(Arc::new(slab)).unwrap();
    }
    pool
}

/// Blocks per descriptor, over the sets of all live sequences.
fn blocks_per_descriptor(sets: &[BlockSet]) -> f64 {
    let blocks: usize = sets.iter().map(BlockSet::len).sum();
    let descriptors: usize = sets.iter().map(|set| set.extents().len()).sum();
    blocks as f64 / descriptors as f64
}

#[test]
fn sequences_stay_in_long_runs_and_no_allocation_fails_at_95_percent() {
    let pool = pool();
    let capacity = SLABS as usize * BLOCKS_PER_SLAB as usize;
    let target = capacity * 95 / 100;
    let mut draw = Draw(0x9E37_79B9_7F4A_7C15);
    let mut sets: Vec<BlockSet> = Vec::new();
    let mut live = 0;
    let mut scores = Vec::new();
    for step in 0..STEPS {
        // Prompts of 4 to 35 blocks, one in eight ten times as long.
        let long = if draw.below(8) == 0 { 10 } else { 1 };
        let n = (4 + draw.below(32)) * long;
        while live + n as usize > target {
            let leaver = draw.below(sets.len() as u32) as usize;
            live -= sets.swap_remove(leaver).len();
        }
        match pool.allocate(n) {
            Ok(set) => sets.push(set),
            Err(refused) => panic!("step {step}: {refused}"),
        }
        live += n as usize;
        if step > STEPS / 2 && step % 100 == 0 {
            scores.push(blocks_per_descriptor(&sets));
            pool.check_integrity();
        }
    }
    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
    assert!(mean >= 15.0, "{mean:.1} blocks per descriptor");
    assert!(live * 100 > capacity * 80);
}
