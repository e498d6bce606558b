//! Pools.

use std::{sync::Arc, time::Duration};

use orchestra_core::Time;
use orchestra_memory::{BlockState, DefragmentConfig, Defragmenter, Fragmentation, Pool};
use pyo3::prelude::*;

use super::{blocks::BlockSet, hub::Hub};
use crate::errors::Failure;

/// Blocks of one size.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct BlockPool {
    hub: Arc<Hub>,
    pool: Arc<Pool>,
}

impl BlockPool {
    pub(super) fn new(hub: &Arc<Hub>, pool: Arc<Pool>) -> Self {
        Self {
            hub: Arc::clone(hub),
            pool,
        }
    }
}

#[pymethods]
impl BlockPool {
    #[getter]
    fn tier(&self) -> String {
        self.pool.config().tier.to_string()
    }

    #[getter]
    fn block_bytes(&self) -> u64 {
        self.pool.config().block_bytes
    }

    #[getter]
    fn slab_bytes(&self) -> u64 {
        self.pool.config().slab_bytes
    }

    #[getter]
    fn max_bytes(&self) -> u64 {
        self.pool.config().max_bytes()
    }

    /// Takes `n` blocks, together where that is possible; adds a slab where it takes one.
    fn alloc(&self, py: Python<'_>, n: u32) -> PyResult<BlockSet> {
        let set = py.detach(|| -> Result<_, Failure> {
            Ok(self.hub.manager()?.allocate(&self.pool, n)?)
        })?;
        Ok(BlockSet::new(&self.hub, set))
    }

    fn frag(&self, py: Python<'_>) -> FragRow {
        py.detach(|| self.pool.fragmentation()).into()
    }

    /// Moves blocks into longer runs, at most `max_bytes` of them; how many were moved.
    fn defrag(&self, py: Python<'_>, max_bytes: u64) -> PyResult<usize> {
        Ok(py.detach(|| defragment(&self.pool, max_bytes))?)
    }

    fn stats(&self, py: Python<'_>) -> PoolRow {
        py.detach(|| PoolRow::new(&self.pool))
    }

    /// Raises `PanicException` where the pool's books do not agree. For tests.
    fn check_integrity(&self, py: Python<'_>) {
        py.detach(|| self.pool.check_integrity());
    }
}

/// Moves what is worth it until the budget is spent. The defragmenter's clock is made up: a second between two steps
/// fills its bucket each time, so that the bytes alone limit it.
fn defragment(pool: &Arc<Pool>, max_bytes: u64) -> Result<usize, Failure> {
    let unit_bytes = DefragmentConfig::default().unit_bytes;
    let config = DefragmentConfig {
        bytes_per_second: u64::MAX,
        unit_bytes: unit_bytes.max(pool.config().block_bytes),
        start_above: 0.0,
        hysteresis: 0.0,
        // In steps: to look at all blocks costs more than to move a few.
        look_every: Duration::from_secs(64),
    };
    let mut defragmenter = Defragmenter::new(Arc::clone(pool), config)?;
    let (mut now, mut left, mut moved) = (Time::ZERO, max_bytes, 0);
    defragmenter.step(now, || false);
    // A step copies two units at most.
    while left >= 2 * config.unit_bytes {
        now = now + Duration::from_secs(1);
        let report = defragmenter.step(now, || false);
        moved += report.moved_blocks;
        if report.copied_bytes == 0 {
            break;
        }
        left -= report.copied_bytes;
    }
    Ok(moved)
}

/// Scores as a dictionary.
#[derive(IntoPyObject)]
struct FragRow {
    alloc_p50: f64,
    alloc_p90: f64,
    wire: f64,
    slab: f64,
    largest_run: u32,
    live_blocks: usize,
    descriptors: usize,
}

impl From<Fragmentation> for FragRow {
    fn from(scores: Fragmentation) -> Self {
        let Fragmentation {
            alloc_p50,
            alloc_p90,
            wire,
            slab,
            largest_run,
            live_blocks,
            descriptors,
        } = scores;
        Self {
            alloc_p50,
            alloc_p90,
            wire,
            slab,
            largest_run,
            live_blocks,
            descriptors,
        }
    }
}

/// Counts of a pool as a dictionary.
#[derive(IntoPyObject)]
struct PoolRow {
    num_blocks: usize,
    num_slabs: usize,
    free: usize,
    writing: usize,
    sealed: usize,
    limbo: usize,
    quarantined: usize,
}

impl PoolRow {
    fn new(pool: &Pool) -> Self {
        let stats = pool.stats();
        let migrating = stats.in_state(BlockState::Migrating);
        Self {
            num_blocks: stats.num_blocks,
            num_slabs: stats.num_slabs,
            free: stats.in_state(BlockState::Free) + stats.in_state(BlockState::Reserved),
            writing: stats.in_state(BlockState::Writing),
            sealed: stats.in_state(BlockState::Sealed) + migrating,
            limbo: stats.in_state(BlockState::Limbo),
            quarantined: stats.in_state(BlockState::Quarantined),
        }
    }
}
