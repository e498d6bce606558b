//! A pool as it is after long use, for the benches of allocating.

use std::sync::Arc;

use orchestra_memory::{BlockSet, Pool, PoolConfig, Slab, SlabId};

/// A pool of 32,768 blocks, four fifths of them in sets of 1 to 64 that came and went: free runs of all lengths.
pub(crate) fn churned() -> (Arc<Pool>, Vec<BlockSet>) {
    let config = PoolConfig {
        block_bytes: 4096,
        slab_bytes: 128 << 20,
        ..PoolConfig::default()
    };
    let pool = Pool::new(config).unwrap();
    let slab = Slab::create(SlabId(0), &config.slab()).unwrap();
    pool.add_slab(Arc::new(slab)).unwrap();
    let (mut sets, mut live, mut draw) = (Vec::<BlockSet>::new(), 0, 1_usize);
    for _ in 0..50_000 {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let n = 1 + (draw >> 33) % 64;
        while live + n > 26_000 {
            let at = (draw >> 17) % sets.len();
            live -= sets.swap_remove(at).len();
        }
        sets.push(pool.allocate(n as u32).unwrap());
        live += n;
    }
    (pool, sets)
}
