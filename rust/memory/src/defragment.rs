//! Keeps a pool in long runs: moves a few sealed blocks at a time, within a budget, when it is worth it.
//!
//! Blocks are copied, never remapped: a mapping under a live registration would lose bytes. A reader never waits
//! for a move: its pin ends it. There is no thread here; whoever has idle time calls [`Defragmenter::step`].

use std::{sync::Arc, time::Duration};

use orchestra_core::Time;

use crate::{
    error::MemoryError,
    fragmentation::Fragmentation,
    pool::{BlockHandle, Cursor, Pool},
    transport::SlabId,
};

/// When and how fast blocks are moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DefragmentConfig {
    /// Bytes copied per second: about 5 % of what the machine copies.
    pub bytes_per_second: u64,
    /// Bytes moved at once: short enough that nobody notices, 0.2 ms at 10 GB/s.
    pub unit_bytes: u64,
    /// The score above which moving starts.
    pub start_above: f64,
    /// How far below that it stops.
    pub hysteresis: f64,
    /// How often the scores are looked at.
    pub look_every: Duration,
}

impl Default for DefragmentConfig {
    fn default() -> Self {
        Self {
            bytes_per_second: 500 << 20,
            unit_bytes: 2 << 20,
            start_above: 0.5,
            hysteresis: 0.1,
            look_every: Duration::from_millis(100),
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DefragmentReport {
    /// Blocks that lie elsewhere now.
    pub moved_blocks: usize,
    /// Bytes that were copied, those of moves that did not happen included.
    pub copied_bytes: u64,
    /// Blocks that were copied for nothing, because somebody pinned or freed them meanwhile.
    pub lost_blocks: usize,
    /// Whether there may be more to do.
    pub is_running: bool,
}

/// Moves blocks of one pool.
#[derive(Debug)]
pub struct Defragmenter {
    pool: Arc<Pool>,
    config: DefragmentConfig,
    cursor: Cursor,
    draining: Option<SlabId>,
    scores: Fragmentation,
    looked: Option<Time>,
    is_running: bool,
    /// Bytes that may be copied now.
    tokens: u64,
    refilled: Option<Time>,
}

impl Defragmenter {
    /// A defragmenter that has not looked at its pool yet.
    pub fn new(pool: Arc<Pool>, config: DefragmentConfig) -> Result<Self, MemoryError> {
        let refuse = |field, expected| Err(MemoryError::InvalidField { field, expected });
        if config.bytes_per_second == 0 {
            return refuse("bytes_per_second", "at least 1");
        }
        if config.unit_bytes < pool.config().block_bytes {
            return refuse("unit_bytes", "at least one block");
        }
        if !(0.0..=1.0).contains(&config.start_above) || config.hysteresis < 0.0 {
            return refuse(
                "start_above",
                "between 0 and 1, with a hysteresis of at least 0",
            );
        }
        Ok(Self {
            pool,
            config,
            cursor: Cursor::default(),
            draining: None,
            scores: Fragmentation::default(),
            looked: None,
            is_running: false,
            tokens: 0,
            refilled: None,
        })
    }

    /// Empties a slab, before anything else.
    pub fn drain(&mut self, slab: SlabId) -> Result<(), MemoryError> {
        self.pool.drain(slab)?;
        self.draining = Some(slab);
        Ok(())
    }

    /// The scores as they were last looked at.
    pub const fn scores(&self) -> &Fragmentation {
        &self.scores
    }

    /// Moves what the budget allows since the last step; nothing while transfers want the memory's bandwidth.
    pub fn step(&mut self, now: Time, is_busy: bool) -> DefragmentReport {
        let mut report = DefragmentReport::default();
        if is_busy {
            // What was not spent while others were busy is not made up for.
            self.refilled = Some(now);
            self.tokens = 0;
            return report;
        }
        self.refill(now);
        self.look(now);
        let unit = self.unit_blocks();
        while self.is_running || self.draining.is_some() {
            let affordable = (self.tokens / self.pool.config().block_bytes) as u32;
            let max = unit.min(affordable);
            // Small moves at the end of a budget would scatter what one large one joins.
            if max < unit || !self.move_some(max, &mut report) {
                break;
            }
        }
        if self.draining.is_some_and(|slab| self.pool.is_drained(slab)) {
            self.draining = None;
        }
        report.is_running = self.is_running || self.draining.is_some();
        report
    }

    fn unit_blocks(&self) -> u32 {
        (self.config.unit_bytes / self.pool.config().block_bytes) as u32
    }

    fn refill(&mut self, now: Time) {
        let passed = now.since(self.refilled.unwrap_or(now)).as_micros();
        let earned = passed * u128::from(self.config.bytes_per_second) / 1_000_000;
        if earned > 0 || self.refilled.is_none() {
            self.refilled = Some(now);
        }
        // A late caller gets no more than two units at once.
        let most = u128::from(2 * self.config.unit_bytes);
        self.tokens = (u128::from(self.tokens) + earned).min(most) as u64;
    }

    fn look(&mut self, now: Time) {
        if self
            .looked
            .is_some_and(|looked| now.since(looked) < self.config.look_every)
        {
            return;
        }
        self.looked = Some(now);
        self.scores = self.pool.fragmentation();
        let worst = self.scores.wire.max(self.scores.alloc_p90);
        let slack = if self.is_running {
            self.config.hysteresis
        } else {
            0.0
        };
        self.is_running = worst > self.config.start_above - slack;
    }

    /// Makes one move; `false` where nothing is worth it, or nothing can move.
    fn move_some(&mut self, max: u32, report: &mut DefragmentReport) -> bool {
        let Some(handles) = self.pick(max) else {
            return false;
        };
        let bytes = handles.len() as u64 * self.pool.config().block_bytes;
        let Some(moving) = self.pool.begin_move(&handles) else {
            return false;
        };
        self.tokens -= bytes;
        report.copied_bytes += bytes;
        let moved = match moving.copy() {
            Ok(()) => moving.commit(),
            Err(_) => 0,
        };
        report.moved_blocks += moved;
        report.lost_blocks += handles.len() - moved;
        moved > 0
    }

    fn pick(&mut self, max: u32) -> Option<Vec<BlockHandle>> {
        if let Some(slab) = self.draining {
            return self.pool.pick_of_slab(slab, max);
        }
        let scattered = |this: &mut Self| this.pool.pick_scattered(&mut this.cursor, max);
        let wall = |this: &mut Self| this.pool.pick_wall(&mut this.cursor, max);
        if self.scores.wire >= self.scores.alloc_p90 {
            scattered(self).or_else(|| wall(self))
        } else {
            wall(self).or_else(|| scattered(self))
        }
    }
}
