//! Keeps a pool in long runs: moves a few sealed blocks at a time, within a budget, when it is worth it.
//!
//! Blocks are copied, never remapped: a mapping under a live registration would lose bytes. A reader never waits
//! for a move: its pin ends it. There is no thread here; whoever has idle time calls [`Defragmenter::step`].

use std::{sync::Arc, time::Duration};

use orchestra_core::Time;

use crate::{
    error::MemoryError,
    fragmentation::Fragmentation,
    pool::{BlockHandle, Cursor, Move, Pool},
    transport::SlabId,
};

/// What is copied before anybody is asked whether transfers wait: some 20 µs.
const SLICE_BYTES: u64 = 128 << 10;
/// How long searches rest that have looked at everything for nothing.
const RETRY_EVERY: Duration = Duration::from_millis(20);
/// How long a move waits for transfers to end before it is given up, and its target free again.
const HELD_MAX: Duration = Duration::from_millis(50);

/// When and how fast blocks are moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DefragmentConfig {
    /// Bytes copied per second: about 5 % of what the machine copies.
    pub bytes_per_second: u64,
    /// Bytes that move together, to neighbouring places. Transfers do not wait for all of them: they are copied in slices.
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
    woken: Time,
    draining: Option<SlabId>,
    scores: Fragmentation,
    looked: Option<Time>,
    is_running: bool,
    /// Bytes that may be copied now.
    tokens: u64,
    refilled: Option<Time>,
    /// The move under way, and when it began.
    moving: Option<(Move, Time)>,
    copied_bytes: u64,
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
            woken: Time::ZERO,
            draining: None,
            scores: Fragmentation::default(),
            looked: None,
            is_running: false,
            tokens: 0,
            refilled: None,
            moving: None,
            copied_bytes: 0,
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

    /// Bytes that it has copied so far.
    pub const fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }

    /// Moves what the budget allows since the last step; nothing while transfers want the memory's bandwidth, which is
    /// asked again after every slice.
    pub fn step(&mut self, now: Time, is_busy: impl Fn() -> bool) -> DefragmentReport {
        let mut report = DefragmentReport::default();
        if is_busy() {
            // Nothing is earned meanwhile. What was earned before stays: else steady traffic would leave nothing to spend.
            self.refilled = Some(now);
            self.moving
                .take_if(|(_, began)| now.since(*began) >= HELD_MAX);
            return report;
        }
        self.refill(now);
        self.look(now);
        if now.since(self.woken) >= RETRY_EVERY {
            self.woken = now;
            self.cursor.wake();
        }
        while self.begin(now) && self.carry_on(&is_busy, &mut report) {}
        if self.draining.is_some_and(|slab| self.pool.is_drained(slab)) {
            self.draining = None;
        }
        self.copied_bytes += report.copied_bytes;
        report.is_running = self.is_running || self.draining.is_some() || self.moving.is_some();
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

    /// Whether there is a move under way, or one that is worth it and can be paid for.
    fn begin(&mut self, now: Time) -> bool {
        if self.moving.is_some() {
            return true;
        }
        let block_bytes = self.pool.config().block_bytes;
        let unit = self.unit_blocks();
        // Small moves at the end of a budget would scatter what one large one joins.
        let can_pay = self.tokens / block_bytes >= u64::from(unit);
        if !can_pay || !(self.is_running || self.draining.is_some()) {
            return false;
        }
        let picked = self.pick(unit);
        let begun = picked.and_then(|handles| self.pool.begin_move(&handles));
        let Some(moving) = begun else {
            return false;
        };
        self.tokens -= moving.len() as u64 * block_bytes;
        self.moving = Some((moving, now));
        true
    }

    /// Copies slice after slice until the move is over; `false` where transfers came first, or nothing can move.
    fn carry_on(&mut self, is_busy: impl Fn() -> bool, report: &mut DefragmentReport) -> bool {
        let Some((mut moving, began)) = self.moving.take() else {
            return false;
        };
        loop {
            let left = moving.left();
            if moving.copy_some(SLICE_BYTES).is_err() {
                report.lost_blocks += moving.len();
                return false;
            }
            report.copied_bytes += left - moving.left();
            if moving.left() == 0 {
                break;
            }
            if is_busy() {
                self.moving = Some((moving, began));
                return false;
            }
        }
        let blocks = moving.len();
        let moved = moving.commit();
        report.moved_blocks += moved;
        report.lost_blocks += blocks - moved;
        moved > 0 && !is_busy()
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
