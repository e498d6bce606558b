//! What a request costs on a worker, under each policy.

use serde::{Deserialize, Serialize};

use super::exchange::{Fetch, FetchCost, Source};

/// What copying a token's KV back from host memory costs, in thousandths of computing it: half of the way there and
/// back, at the default of [`swap_cost_permille`](crate::step::StepSchedulerConfig::swap_cost_permille).
const COPY_PERMILLE: u64 = 50;

/// How a worker is chosen. `docs/routing.md` has each policy's formula, complexity and use.
///
/// Under every policy the workers that have room for the request now come before those that have not.
/// `miss` are the prompt tokens that the worker would have to compute, `queued` those that wait there already,
/// `batch` the sequences that run or wait there, `prompt` all tokens of the prompt. To `miss` and `prompt` comes
/// `lora_load_tokens` where the request's LoRA adapter is not on the worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutePolicy {
    /// Least `(miss + queued) × (batch + 1)`. Here and in `prefix_sum`, `miss` is less where a part of it can be fetched
    /// (`KvExchange`).
    #[default]
    Product,
    /// Least `miss + queued + seq_cost_tokens × batch`.
    PrefixSum,
    /// Least `(prompt + queued) × (batch + 1)`: what is cached does not count.
    LoadOnly,
    /// Least `(min(miss, fetch) + queued) × (batch + 1)`, where `fetch` is what the deepest holder misses too, and
    /// `fetch_cost_permille` thousandths of the tokens that would be fetched from it.
    TransferAware,
    /// The next worker in turn.
    RoundRobin,
    /// Any worker, all alike.
    Random,
    /// Of two random workers the one of less `(prompt + queued) × (batch + 1)`.
    PowerOfTwo,
    /// Least `batch`.
    LeastRequests,
    /// Least `queued`.
    LeastTokens,
    /// The worker of the session's place on a hash ring, or the next one that may take the request.
    ConsistentHash,
}

impl RoutePolicy {
    /// Whether the cost depends on what a worker has cached.
    pub(super) const fn uses_prefix(self) -> bool {
        matches!(self, Self::Product | Self::PrefixSum | Self::TransferAware)
    }

    /// Whether blocks count as fetched also by workers that did not say that they can.
    pub(super) const fn fetches_anywhere(self) -> bool {
        matches!(self, Self::TransferAware)
    }

    /// Whether the choice is a worker of least cost.
    pub(super) const fn is_least_cost(self) -> bool {
        match self {
            Self::Product
            | Self::PrefixSum
            | Self::LoadOnly
            | Self::TransferAware
            | Self::LeastRequests
            | Self::LeastTokens => true,
            Self::RoundRobin | Self::Random | Self::PowerOfTwo | Self::ConsistentHash => false,
        }
    }
}

/// The cost of one request on the workers of one group.
///
/// Properties that the search rests on: [`cost`](Self::cost) never falls where one of its arguments rises, and
/// [`prefill`](Self::prefill) never rises with the depth.
#[derive(Clone, Copy, Debug)]
pub(super) struct CostModel {
    pub(super) policy: RoutePolicy,
    pub(super) prompt_tokens: u64,
    pub(super) block_size: u64,
    /// What fetching blocks costs, where they can be.
    pub(super) fetch: Option<FetchCost>,
    /// Whom they are fetched from.
    pub(super) source: Source,
    pub(super) seq_cost_tokens: u64,
    /// What must be done before the prompt, in tokens of prefill: loading an adapter.
    pub(super) load_tokens: u64,
}

impl CostModel {
    /// What a worker that has `depth` leading blocks would have to do for the request, in tokens of prefill.
    pub(super) fn prefill(&self, depth: u64) -> u64 {
        self.prompt_left(depth).saturating_add(self.load_tokens)
    }

    /// What it costs a worker that has `depth` leading blocks to copy the last `num_kept` of them back from host
    /// memory, where that is less than to do without them.
    pub(super) fn copying(&self, depth: u64, num_kept: u64) -> u64 {
        if num_kept == 0 || !self.policy.uses_prefix() {
            return 0;
        }
        let tokens = num_kept * self.block_size * COPY_PERMILLE;
        let without = self.prompt_left(depth - num_kept) - self.prompt_left(depth);
        tokens.div_ceil(1000).min(without)
    }

    fn prompt_left(&self, depth: u64) -> u64 {
        if !self.policy.uses_prefix() {
            return self.prompt_tokens;
        }
        self.missing(depth) - self.saved_by_fetch(depth).unwrap_or(0)
    }

    fn missing(&self, depth: u64) -> u64 {
        self.prompt_tokens - depth * self.block_size
    }

    /// How much less fetching than computing costs a worker that has `depth` leading blocks; `None` where nobody has more
    /// that could be fetched.
    pub(super) fn saved_by_fetch(&self, depth: u64) -> Option<u64> {
        let fetch = self.fetch?;
        let num_blocks = self.source.depth.checked_sub(depth).filter(|&it| it > 0)?;
        let computing = num_blocks * self.block_size;
        Some(computing.saturating_sub(fetch.tokens(num_blocks)))
    }

    /// The fetch that a worker with `depth` leading blocks would make, where that is cheaper than computing.
    pub(super) fn fetch_at(&self, depth: u64) -> Option<Fetch> {
        let saved_tokens = self.saved_by_fetch(depth).filter(|&it| it > 0)?;
        Some(Fetch {
            source: self.source.worker?,
            num_blocks: self.source.depth as u32,
            saved_tokens,
        })
    }

    /// The cost on a worker: what it would have to do, what it has queued, and how many sequences are there.
    pub(super) fn cost(&self, prefill: u64, queued: u64, batch: u64) -> u64 {
        match self.policy {
            RoutePolicy::LeastRequests => batch,
            RoutePolicy::LeastTokens => queued,
            RoutePolicy::PrefixSum => prefill
                .saturating_add(queued)
                .saturating_add(batch.saturating_mul(self.seq_cost_tokens)),
            _ => prefill.saturating_add(queued).saturating_mul(batch + 1),
        }
    }
}
