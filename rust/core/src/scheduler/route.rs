//! Choosing a worker for a request.
//!
//! Among the workers that may take the request at all, those that have room for it now come first; among these the
//! [policy](super::RoutePolicy) chooses. Equals take turns: a worker whose load changed goes behind those of like load. By
//! default the one of least cost is taken:
//!
//! ```text
//! cost(w) = (prefill tokens left to compute on w + prefill tokens queued on w) × (batch on w + 1)
//! ```
//!
//! The reservation is committed inside the decision, so the next decision sees it.
//!
//! Properties (tested): the choice has the least cost of a full scan; a request is never placed on a worker whose
//! KV could not hold it even when empty; a refusal changes nothing.

use std::{borrow::Cow, cmp::Reverse};

pub use super::explain::{Explanation, Ineligible};
use super::{
    Scheduler,
    error::SchedulerError,
    group::Model,
    policy::CostModel,
    reservation::Reservation,
    search::{Found, Needs, Search},
    worker::WorkerId,
};
use crate::{
    hash::{BlockHash, HashSeed, SeedParts, block_hashes},
    ids::TokenId,
    time::Time,
};

/// A request that wants a worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteRequest<'a> {
    /// The model.
    pub model: &'a str,
    /// The prompt; at least one token.
    pub token_ids: &'a [TokenId],
    /// Most output tokens; at least 1.
    pub max_tokens: u32,
    /// Isolates the prefix cache; requests share KV only where it is equal.
    pub salt: &'a str,
    /// Workers that may not take it, for example because they failed it before.
    pub exclude: &'a [WorkerId],
    /// What `consistent_hash` keeps together; where it is empty, prompts of one first block.
    pub session_key: &'a str,
    /// The prompt's hashes, where the caller has them already.
    pub hashed: Option<HashedPrompt<'a>>,
}

/// Hashes of a prompt's full blocks. Used for the workers of this seed and block size; for others the scheduler hashes.
#[derive(Clone, Copy, Debug)]
pub struct HashedPrompt<'a> {
    /// Start of the chain: [`WorkerSpec::hash_seed`](super::WorkerSpec::hash_seed) of the request's salt.
    pub seed: HashSeed,
    /// Tokens per block.
    pub block_size: u32,
    /// In order; what [`block_hashes`] returns.
    pub blocks: &'a [BlockHash],
}

impl RouteRequest<'_> {
    /// Prompt and output tokens.
    pub(super) fn num_tokens(&self) -> u64 {
        self.token_ids.len() as u64 + u64::from(self.max_tokens)
    }

    pub(super) fn validate(&self) -> Result<(), SchedulerError> {
        if self.token_ids.is_empty() {
            return Err(SchedulerError::InvalidField {
                field: "token_ids",
                expected: "not empty",
            });
        }
        if self.max_tokens == 0 {
            return Err(SchedulerError::InvalidField {
                field: "max_tokens",
                expected: "at least 1",
            });
        }
        Ok(())
    }
}

/// A worker that may take the request, and what that would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The worker.
    pub worker: WorkerId,
    /// The [policy](super::RoutePolicy)'s formula; `load_only`'s where the policy has none.
    pub cost: u64,
    /// Whether it could start the request now: free KV for all of it and a place in the batch.
    pub has_room: bool,
    /// Prompt tokens whose KV the worker holds already.
    pub num_cached_tokens: u32,
    /// Prompt tokens that wait to be computed there.
    pub queued_prefill_tokens: u64,
    /// Sequences that run or wait there.
    pub batch: u32,
    /// KV blocks of prompt and output together, in the worker's block size.
    pub num_blocks: u32,
    /// KV blocks that nothing holds and nothing was promised.
    pub kv_blocks_free: u64,
    /// Number of the decision that last chose the worker; 0: none.
    last_chosen: u64,
}

impl Candidate {
    /// Least is best.
    pub(super) fn rank(&self) -> (Reverse<bool>, u64, u64, WorkerId) {
        (
            Reverse(self.has_room),
            self.cost,
            self.last_chosen,
            self.worker,
        )
    }
}

/// A request's usable hashes on the workers of one group.
pub(super) struct Chain<'a> {
    pub(super) group: u32,
    pub(super) block_size: u32,
    pub(super) blocks: Cow<'a, [BlockHash]>,
}

impl Scheduler {
    /// Places the request on the best worker, whether or not that has room now, and reserves for it.
    ///
    /// `now` dates the reservation. On refusal nothing changes.
    pub fn route(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Reservation, SchedulerError> {
        let best = self.choose(request)?;
        self.reserve(request, best, now)
    }

    /// The best worker for the request, whether or not it has room now. Reserves nothing.
    pub(super) fn choose(&self, request: &RouteRequest<'_>) -> Result<Candidate, SchedulerError> {
        request.validate()?;
        let model = self.groups.model(request.model);
        let model = model.ok_or(SchedulerError::ModelNotFound)?;
        let chains = self.chains(model, request);
        let found = if self.config.policy.is_least_cost() {
            self.least_cost(request, &chains)
        } else {
            self.pick(model, request, &chains)
        };
        if let Some(candidate) = found.and_then(|(found, chain, costs)| {
            let candidate = self.verified(request, found, &chains[chain], &costs)?;
            Some(candidate)
        }) {
            return Ok(candidate);
        }
        // Nobody may take it, or a holder lacks a block that it should have: rare enough to judge everybody.
        let survey = self.survey(request)?;
        survey.best().ok_or_else(|| survey.refusal())
    }

    /// The request's hashes for each group of its model.
    pub(super) fn chains<'a>(&self, model: &Model, request: &RouteRequest<'a>) -> Vec<Chain<'a>> {
        let of_group = |&group: &u32| {
            let (key, seed) = (self.groups.get(group).key, self.groups.get(group).seed);
            let seed = match request.salt {
                "" => seed,
                salt => SeedParts {
                    model: request.model,
                    weights_epoch: key.weights_epoch,
                    salt,
                    ..SeedParts::default()
                }
                .seed(),
            };
            Chain {
                group,
                block_size: key.block_size,
                blocks: usable_chain(request, seed, key.block_size),
            }
        };
        model.groups.values().map(of_group).collect()
    }

    /// What a request asks of a chain's workers.
    pub(super) fn needs<'a>(
        request: &RouteRequest<'a>,
        chain: &Chain<'_>,
        room: bool,
    ) -> Needs<'a> {
        let num_tokens = request.num_tokens();
        Needs {
            num_tokens,
            num_blocks: num_tokens.div_ceil(u64::from(chain.block_size)),
            exclude: request.exclude,
            room,
        }
    }

    pub(super) fn cost_model(&self, request: &RouteRequest<'_>, chain: &Chain<'_>) -> CostModel {
        CostModel {
            policy: self.config.policy,
            prompt_tokens: request.token_ids.len() as u64,
            block_size: chain.block_size.into(),
            deepest: 0,
            seq_cost_tokens: self.config.seq_cost_tokens.into(),
            fetch_cost_permille: self.config.fetch_cost_permille.into(),
        }
    }

    /// A worker of least cost, and which chain is its own.
    fn least_cost(
        &self,
        request: &RouteRequest<'_>,
        chains: &[Chain<'_>],
    ) -> Option<(Found, usize, CostModel)> {
        [true, false].into_iter().find_map(|room| {
            let mut best: Option<(Found, usize, CostModel)> = None;
            for (number, chain) in chains.iter().enumerate() {
                let before = best.map(|(found, ..)| found);
                let mut search = Search {
                    index: &self.index,
                    standings: self.workers.standings(),
                    group: self.groups.get(chain.group),
                    group_number: chain.group,
                    chain: &chain.blocks,
                    needs: Self::needs(request, chain, room),
                    costs: self.cost_model(request, chain),
                    best: before,
                };
                search.run();
                let is_better = |found: &Found| before.is_none_or(|old| found.cost < old.cost);
                if let Some(found) = search.best.filter(is_better) {
                    best = Some((found, number, search.costs));
                }
            }
            best
        })
    }

    /// The candidate that was found, if it holds what the search took it to hold.
    fn verified(
        &self,
        request: &RouteRequest<'_>,
        found: Found,
        chain: &Chain<'_>,
        costs: &CostModel,
    ) -> Option<Candidate> {
        let standing = self.workers.standing(found.slot);
        let blocks = &chain.blocks[..];
        let claimed = if self.config.policy.uses_prefix() {
            &blocks[..found.depth]
        } else {
            blocks
        };
        let depth = self.index.depth_of(claimed, standing.holder);
        (depth >= found.depth)
            .then(|| self.candidate(request, found.slot, depth, costs))
            .flatten()
    }

    /// What the request would cost on a worker that holds `depth` leading blocks of it.
    pub(super) fn candidate(
        &self,
        request: &RouteRequest<'_>,
        slot: u32,
        depth: usize,
        costs: &CostModel,
    ) -> Option<Candidate> {
        let (worker, standing) = self.workers.at(slot)?;
        let block_size = worker.spec.block_size;
        let num_blocks = request.num_tokens().div_ceil(u64::from(block_size));
        let prefill = costs.prefill(depth as u64);
        Some(Candidate {
            worker: standing.id,
            cost: costs.cost(prefill, standing.queued, standing.batch.into()),
            has_room: standing.batch < standing.max_num_seqs
                && num_blocks - depth as u64 <= u64::from(standing.kv_blocks_free),
            num_cached_tokens: depth as u32 * block_size,
            queued_prefill_tokens: standing.queued,
            batch: standing.batch,
            // Fits in u32: it was held against the worker's blocks.
            num_blocks: num_blocks as u32,
            kv_blocks_free: standing.kv_blocks_free.into(),
            last_chosen: worker.last_chosen,
        })
    }
}

/// Hashes of the prompt's blocks that a prefix hit can use: at least one token is always computed, because the first
/// output token is drawn from its logits.
fn usable_chain<'a>(
    request: &RouteRequest<'a>,
    seed: HashSeed,
    block_size: u32,
) -> Cow<'a, [BlockHash]> {
    let (_last, usable) = request.token_ids.split_last().unwrap_or((&0, &[]));
    match request.hashed {
        Some(hashed) if hashed.seed == seed && hashed.block_size == block_size => {
            let num_usable = (usable.len() / block_size as usize).min(hashed.blocks.len());
            Cow::Borrowed(&hashed.blocks[..num_usable])
        }
        _ => Cow::Owned(block_hashes(seed, usable, block_size as usize)),
    }
}
