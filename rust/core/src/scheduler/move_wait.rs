//! How long a worker waits for KV that another one gives, before it computes for itself.
//!
//! ```text
//! wait = max(4 × what the move is predicted to take, what computing the same takes), within the configured bounds
//! ```
//!
//! Who waits for as long as computing takes, and then computes, takes twice the time of whoever knew: no other wait is
//! better in the worst case (Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988). But a prediction is a
//! mean, and most moves that are late are a little late; so a move gets several times what it should take. What a
//! helper computes first, behind what is queued there, is part of a split's move.
//!
//! Until the speed of the exchange is known the wait is the longest there is.

use std::time::Duration;

use super::{Scheduler, exchange::Exchanges, route::Candidate, worker::WorkerSpec};

/// A move gets so many times the predicted time.
const SLACK: u32 = 4;

/// What comes to a worker.
struct Coming {
    /// Blocks that it lacks.
    num_blocks: u64,
    /// Tokens that are computed elsewhere before they come.
    num_tokens_before: u64,
    /// The longest wait.
    max: Duration,
}

impl Scheduler {
    /// How long the candidate should wait for what comes to it; zero where nothing does.
    pub(super) fn move_wait(&self, chosen: &Candidate, is_split: bool) -> Duration {
        let config = &self.config;
        let num_held = u64::from(chosen.num_cached_tokens / chosen.block_size);
        let lacked = |num_blocks: u32| u64::from(num_blocks).saturating_sub(num_held);
        let coming = match (chosen.split, chosen.fetch) {
            (Some(split), _) if is_split => Coming {
                num_blocks: lacked(split.num_blocks),
                num_tokens_before: split.cost,
                max: millis(config.split_wait_max_ms),
            },
            (None, Some(fetch)) => Coming {
                num_blocks: lacked(fetch.num_blocks),
                num_tokens_before: 0,
                max: millis(config.fetch_wait_max_ms),
            },
            _ => return Duration::ZERO,
        };
        let min = millis(config.move_wait_min_ms).min(coming.max);
        let worker = self.workers.get(chosen.worker);
        let predicted = worker.and_then(|worker| self.worth_waiting(&worker.spec, &coming));
        predicted.map_or(coming.max, |wait| wait.clamp(min, coming.max))
    }

    fn worth_waiting(&self, spec: &WorkerSpec, coming: &Coming) -> Option<Duration> {
        let num_tokens = coming.num_blocks.saturating_mul(spec.block_size.into());
        let computing = self.exchanges.time_to_compute(spec, num_tokens)?;
        let before = match coming.num_tokens_before {
            0 => Duration::ZERO,
            num_tokens => self.exchanges.time_to_compute(spec, num_tokens)?,
        };
        let latency = Duration::from_micros(self.config.fetch_latency_us.into());
        let moving = self.exchanges.time_to_move(spec, coming.num_blocks)?;
        let moved = before.saturating_add(latency).saturating_add(moving);
        Some(computing.max(moved.saturating_mul(SLACK)))
    }
}

impl Exchanges {
    /// What the workers of this one's exchange take for so many prompt tokens; `None` until that is known.
    fn time_to_compute(&self, spec: &WorkerSpec, num_tokens: u64) -> Option<Duration> {
        self.learned(spec)?.prefill.time_for(num_tokens)
    }

    /// What so many blocks take from one of them to another.
    fn time_to_move(&self, spec: &WorkerSpec, num_blocks: u64) -> Option<Duration> {
        self.learned(spec)?.fetch.time_for(num_blocks)
    }
}

const fn millis(millis: u32) -> Duration {
    Duration::from_millis(millis as u64)
}
