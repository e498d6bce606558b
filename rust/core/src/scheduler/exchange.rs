//! Moving KV between workers: who can give blocks to whom, and what that costs.
//!
//! Workers of equal [`KvExchange`] keep blocks of one shape and can read each other's. One that lacks a part of a prompt
//! can then *fetch* it from the deepest holder instead of computing it:
//!
//! ```text
//! fetch(w) = prompt tokens that the deepest holder misses too + latency + blocks between × time for a block
//! prefill(w) = min(miss(w), fetch(w))
//! ```
//!
//! Latency and time count in tokens of prefill: what the workers of the exchange compute in it, as learned from
//! [`Scheduler::prefill_done`]. One speed for all of an exchange and not one for each worker, because the search rests on
//! workers of equal depth and load costing the same. Time for a block starts at
//! [`fetch_bytes_per_s`](super::SchedulerConfig::fetch_bytes_per_s) and is learned from
//! [`Scheduler::fetch_done`]. Fetches that failed count as time without blocks, so they are tried less; each decision
//! that passes one over moves what was learned a little back to the start, so they are tried again.
//!
//! Where no worker has an exchange none of this is looked at.

use std::{ops::ControlFlow, time::Duration};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::{
    Scheduler, SchedulerConfig,
    chain::Chain,
    error::SchedulerError,
    index::Probed,
    pace::Pace,
    reservation::ReservationId,
    worker::{WorkerId, WorkerSpec},
};
use crate::time::Time;

/// Longest [`KvExchange::layout`], in bytes.
const LAYOUT_BYTES_MAX: usize = 256;
/// Blocks that the configured bandwidth counts as having been seen to move.
const PRIOR_BLOCKS: u64 = 64;
/// So many decisions that pass a fetch over are one step back to the configured bandwidth.
const DECLINES: u32 = 64;
/// Of the deepest holders so many are compared by load.
const FEW_SOURCES: usize = 16;

/// What blocks of two workers must have in common for one to read the other's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KvExchange {
    /// Shape of a block, in the workers' own words; 1 to 256 bytes.
    pub layout: String,
    /// Bytes of a block, at least 1.
    pub bytes_per_block: u64,
}

impl KvExchange {
    pub(super) fn validate(&self) -> Result<(), SchedulerError> {
        let refuse = |field, expected| Err(SchedulerError::InvalidField { field, expected });
        if self.layout.is_empty() || self.layout.len() > LAYOUT_BYTES_MAX {
            return refuse("kv_exchange.layout", "1 to 256 bytes long");
        }
        if self.bytes_per_block == 0 {
            return refuse("kv_exchange.bytes_per_block", "at least 1");
        }
        Ok(())
    }
}

/// What a worker is there for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum WorkerRole {
    /// Whole requests.
    #[default]
    Both,
    /// Prompts of requests that run elsewhere; whole requests only where no other worker can take them.
    Prefill,
    /// Whole requests, whose prompts others should compute where they are long.
    Decode,
}

impl WorkerRole {
    /// As metrics, logs and the admin door spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Blocks that a worker should get from another one instead of computing them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Who holds them.
    pub source: WorkerId,
    /// Leading blocks of the prompt that the source holds, those that the worker has itself included.
    pub num_blocks: u32,
    /// How much less that costs than computing, in tokens of prefill.
    pub saved_tokens: u64,
}

/// What moving blocks costs, in tokens of prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FetchCost {
    /// However many blocks there are.
    latency: u64,
    /// Thousandths of a token.
    per_block: u64,
}

impl FetchCost {
    /// A share of computing the same, in thousandths.
    pub(super) fn share(block_size: u64, permille: u32) -> Self {
        Self {
            latency: 0,
            per_block: block_size.saturating_mul(permille.into()),
        }
    }

    pub(super) fn tokens(&self, num_blocks: u64) -> u64 {
        if num_blocks == 0 {
            return 0;
        }
        let blocks = num_blocks.saturating_mul(self.per_block).div_ceil(1000);
        self.latency.saturating_add(blocks)
    }
}

/// The deepest holder of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) worker: Option<WorkerId>,
    /// Leading blocks that it holds.
    pub(super) depth: u64,
}

/// How a reservation's prompt comes to its worker, where not by computing alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// It fetches this many blocks.
    Fetched(u64),
    /// Another worker computes it.
    Pushed,
}

/// What was learned of the workers of one exchange.
#[derive(Debug)]
pub(super) struct Learned {
    num_workers: u32,
    /// Prompt tokens computed.
    pub(super) prefill: Pace,
    /// Blocks fetched.
    pub(super) fetch: Pace,
    num_declined: u32,
}

/// All exchanges that workers have.
#[derive(Debug, Default)]
pub(super) struct Exchanges(FxHashMap<KvExchange, Learned>);

impl Exchanges {
    /// A worker came.
    pub(super) fn join(&mut self, spec: &WorkerSpec, config: &SchedulerConfig) {
        let Some(exchange) = &spec.kv_exchange else {
            return;
        };
        let learned = self.0.entry(exchange.clone());
        let learned = learned.or_insert_with(|| {
            let mut fetch = Pace::default();
            fetch.sample(PRIOR_BLOCKS, prior(exchange, config));
            Learned {
                num_workers: 0,
                prefill: Pace::default(),
                fetch,
                num_declined: 0,
            }
        });
        learned.num_workers += 1;
    }

    /// A worker left; what was learned goes with the last one.
    pub(super) fn leave(&mut self, spec: &WorkerSpec) {
        let Some(exchange) = &spec.kv_exchange else {
            return;
        };
        if let Some(learned) = self.0.get_mut(exchange) {
            learned.num_workers -= 1;
            if learned.num_workers == 0 {
                self.0.remove(exchange);
            }
        }
    }

    /// A worker computed so many prompt tokens in that time.
    pub(super) fn computed(&mut self, spec: &WorkerSpec, tokens: u64, took: Duration) {
        let exchange = spec.kv_exchange.as_ref();
        if let Some(learned) = exchange.and_then(|it| self.0.get_mut(it)) {
            learned.prefill.sample(tokens, took);
        }
    }

    /// A worker got so many blocks in that time; 0: it waited in vain.
    fn fetched(&mut self, spec: &WorkerSpec, blocks: u64, took: Duration) {
        let exchange = spec.kv_exchange.as_ref();
        if let Some(learned) = exchange.and_then(|it| self.0.get_mut(it)) {
            learned.fetch.sample(blocks, took);
        }
    }

    /// A fetch from a deeper holder was thought too dear.
    pub(super) fn declined(&mut self, spec: &WorkerSpec, config: &SchedulerConfig) {
        let Some(exchange) = &spec.kv_exchange else {
            return;
        };
        if let Some(learned) = self.0.get_mut(exchange) {
            learned.num_declined += 1;
            if learned.num_declined >= DECLINES {
                learned.num_declined = 0;
                learned.fetch.sample(PRIOR_BLOCKS, prior(exchange, config));
            }
        }
    }

    /// What was learned of the exchange that a worker has.
    pub(super) fn learned(&self, spec: &WorkerSpec) -> Option<&Learned> {
        self.0.get(spec.kv_exchange.as_ref()?)
    }

    pub(super) fn cost(
        &self,
        exchange: &KvExchange,
        block_size: u64,
        config: &SchedulerConfig,
    ) -> FetchCost {
        let learned = self.0.get(exchange);
        let speed = learned.map_or(0, |learned| learned.prefill.per_second());
        let time = learned.and_then(|learned| learned.fetch.time_for(1000));
        let (1.., Some(time)) = (speed, time) else {
            return FetchCost::share(block_size, config.fetch_cost_permille);
        };
        // Microseconds for a thousand blocks and millionths of a second: thousandths of a token for a block.
        let tokens = |micros: u64| micros.saturating_mul(speed) / 1_000_000;
        FetchCost {
            latency: tokens(config.fetch_latency_us.into()),
            per_block: tokens(u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        }
    }

    /// # Panics
    /// If the workers of an exchange are miscounted.
    pub(super) fn check_integrity<'a>(&self, specs: impl Iterator<Item = &'a WorkerSpec>) {
        let mut counts: FxHashMap<&KvExchange, u32> = FxHashMap::default();
        for exchange in specs.filter_map(|spec| spec.kv_exchange.as_ref()) {
            *counts.entry(exchange).or_default() += 1;
        }
        assert_eq!(counts.len(), self.0.len(), "an exchange without workers");
        for (exchange, learned) in &self.0 {
            assert_eq!(counts.get(exchange), Some(&learned.num_workers));
        }
    }
}

/// What [`PRIOR_BLOCKS`] take at the configured bandwidth.
fn prior(exchange: &KvExchange, config: &SchedulerConfig) -> Duration {
    let bytes = u128::from(exchange.bytes_per_block) * u128::from(PRIOR_BLOCKS);
    let micros = bytes * 1_000_000 / u128::from(config.fetch_bytes_per_s.max(1));
    // At least one, or it would count as no time at all.
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX).max(1))
}

impl Scheduler {
    /// What moving blocks to the workers of the chain's group costs; `None` where nothing can be moved, or the policy does
    /// not look at it.
    pub(super) fn fetch_cost(&self, chain: &Chain<'_>) -> Option<FetchCost> {
        let policy = self.config.policy;
        if !policy.uses_prefix() || !(chain.has_exchange || policy.fetches_anywhere()) {
            return None;
        }
        let block_size = chain.block_size.into();
        match self.groups.get(chain.group).key.terms.exchange() {
            Some(exchange) => Some(self.exchanges.cost(exchange, block_size, &self.config)),
            None if policy.fetches_anywhere() => Some(FetchCost::share(
                block_size,
                self.config.fetch_cost_permille,
            )),
            None => None,
        }
    }

    /// The deepest holder that the workers of the chain's group can fetch from.
    ///
    /// O(log blocks) for each depth visited; where holders of other exchanges are deeper, O(their number).
    pub(super) fn source(&self, chain: &Chain<'_>) -> Source {
        let mut probed = Probed::new(&self.index, &chain.blocks);
        let (mut depth, mut count) = probed.deepest_above(chain.blocks.len(), 0);
        while let Some(last) = depth.checked_sub(1) {
            let source = self.source_at(chain, depth);
            if source.depth > 0 {
                return source;
            }
            (depth, count) = match probed.deepest_above(last, count) {
                (0, _) => (0, count),
                deeper => deeper,
            };
        }
        Source::default()
    }

    /// Of the holders of this depth that can be fetched from, the least busy of a few.
    fn source_at(&self, chain: &Chain<'_>, depth: usize) -> Source {
        let exchange = self.groups.get(chain.group).key.terms.exchange();
        let standings = self.workers.standings();
        let mut best: Option<(u32, u32)> = None;
        let mut left = FEW_SOURCES;
        let holders = self.index.holders_of(chain.blocks[depth - 1]);
        let _ = holders.try_for_each(|id| {
            let Some(slot) = self.index.slot_of(id) else {
                return ControlFlow::Continue(());
            };
            let standing = &standings[slot as usize];
            let theirs = self.groups.get(standing.group).key.terms.exchange();
            if exchange.is_some() && theirs != exchange {
                return ControlFlow::Continue(());
            }
            let load = (standing.batch, slot);
            best = Some(best.map_or(load, |best| best.min(load)));
            left -= 1;
            if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let Some((_, slot)) = best else {
            return Source::default();
        };
        let standing = &standings[slot as usize];
        // Where an event was lost it may lack an earlier block.
        let depth = self.index.depth_of(&chain.blocks[..depth], standing.holder);
        Source {
            worker: exchange.map(|_| standing.id),
            depth: depth as u64,
        }
    }

    /// What came of the fetch that a reservation named: prompt tokens whose KV another worker gave. To be called before
    /// [`prefill_done`](Self::prefill_done), which takes the time. `false` where the reservation is gone or names none.
    pub fn fetch_done(&mut self, id: ReservationId, num_tokens: u32, now: Time) -> bool {
        let Some(&Moved::Fetched(num_blocks)) = self.moved.get(&id) else {
            return false;
        };
        let Some(held) = self.reservations.get(id) else {
            return false;
        };
        let Some(worker) = self.workers.get(held.worker) else {
            return false;
        };
        let took = now - held.reserved_at.max(worker.prefill_done_at);
        let latency = Duration::from_micros(self.config.fetch_latency_us.into());
        let computing = worker.prefill_pace.time_for(held.demand.prefill_tokens);
        let rest = latency.saturating_add(computing.unwrap_or_default());
        let (blocks, took) = match u64::from(num_tokens.div_ceil(worker.spec.block_size)) {
            0 => (0, took),
            blocks => (blocks.min(num_blocks), took.saturating_sub(rest)),
        };
        self.exchanges.fetched(&worker.spec, blocks, took);
        true
    }
}
