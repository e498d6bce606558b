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

use std::cmp::Reverse;

pub use super::explain::{Explanation, Ineligible};
use super::{
    Scheduler,
    admission::AdmissionClass,
    chain::Chain,
    error::SchedulerError,
    exchange::{Fetch, Source},
    group::GroupKey,
    loras::Lora,
    policy::CostModel,
    reservation::Reservation,
    search::{Found, Needs, Search},
    split::Split,
    worker::{NAME_BYTES_MAX, WorkerId, validate_name},
};
use crate::{
    hash::{BlockHash, HashSeed},
    ids::TokenId,
    time::Time,
};

/// Most tolerations of a request.
const TOLERATIONS_MAX: usize = 64;

/// A request that wants a worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteRequest<'a> {
    /// The model.
    pub model: &'a str,
    /// The prompt; at least one token.
    pub token_ids: &'a [TokenId],
    /// Most output tokens; at least 1. Only workers that could hold all of them take the request.
    pub max_tokens: u32,
    /// Output tokens that room is kept for, at least 1; `max_tokens` where it is `None` or more. Who books less than may
    /// come runs more at once and relies on the worker to preempt where that was too few;
    /// [`expected_output`](Scheduler::expected_output) says what is usual.
    pub booked_tokens: Option<u32>,
    /// Isolates the prefix cache; requests share KV only where it is equal.
    pub salt: &'a str,
    /// The adapter that it runs with.
    pub lora: Option<Lora<'a>>,
    /// Only workers with this version of the weights; any where `None`.
    pub weights_epoch: Option<u64>,
    /// Its service class, where it has one; at most 128 bytes. Workers reserved for other classes do not take it.
    pub slo_class: &'a str,
    /// Taints of workers that do not keep it away; at most 64.
    pub tolerations: &'a [&'a str],
    /// Workers that may not take it, for example because they failed it before.
    pub exclude: &'a [WorkerId],
    /// What `consistent_hash` keeps together; where it is empty, prompts of one first block.
    pub session_key: &'a str,
    /// Whose request it is, at most 128 bytes; the empty name is the tenant of all who give none. Tenants share what
    /// [`acquire`](Scheduler::acquire) grants.
    pub tenant: &'a str,
    /// Most requests of its tenant that may wait, where that is less than
    /// [`max_num_waiting_per_tenant`](super::SchedulerConfig::max_num_waiting_per_tenant).
    pub queue_limit: Option<u32>,
    /// How urgent it is while it waits.
    pub class: AdmissionClass,
    /// By when the first token is wanted. A request that still waits then is refused.
    pub deadline: Option<Time>,
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
    /// In order; what [`block_hashes`](crate::hash::block_hashes) returns.
    pub blocks: &'a [BlockHash],
}

impl RouteRequest<'_> {
    /// Prompt and output tokens.
    pub(super) fn num_tokens(&self) -> u64 {
        self.token_ids.len() as u64 + u64::from(self.max_tokens)
    }

    /// Prompt tokens, and the output tokens that room is kept for.
    pub(super) fn num_booked_tokens(&self) -> u64 {
        let output = self
            .booked_tokens
            .map_or(self.max_tokens, |it| it.min(self.max_tokens));
        self.token_ids.len() as u64 + u64::from(output)
    }

    pub(super) fn validate(&self) -> Result<(), SchedulerError> {
        let refuse = |field, expected| Err(SchedulerError::InvalidField { field, expected });
        if self.token_ids.is_empty() {
            return refuse("token_ids", "not empty");
        }
        if self.max_tokens == 0 {
            return refuse("max_tokens", "at least 1");
        }
        if self.booked_tokens == Some(0) {
            return refuse("booked_tokens", "at least 1");
        }
        if self.slo_class.len() > NAME_BYTES_MAX {
            return refuse("slo_class", "at most 128 bytes long");
        }
        if self.tenant.len() > NAME_BYTES_MAX {
            return refuse("tenant", "at most 128 bytes long");
        }
        if self.tolerations.len() > TOLERATIONS_MAX {
            return refuse("tolerations", "at most 64 names");
        }
        self.lora
            .map_or(Ok(()), |lora| validate_name("lora.id", lora.id))
    }
}

/// A worker that may take the request, and what that would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The worker.
    pub worker: WorkerId,
    /// The [policy](super::RoutePolicy)'s formula; `load_only`'s where the policy has none.
    pub cost: u64,
    /// Whether it could start the request now: free KV for what is booked and a place in the batch.
    pub has_room: bool,
    /// Prompt tokens whose KV the worker holds already.
    pub num_cached_tokens: u32,
    /// Prompt tokens that wait to be computed there.
    pub queued_prefill_tokens: u64,
    /// Sequences that run or wait there.
    pub batch: u32,
    /// KV blocks of the prompt and the booked output together, in the worker's block size.
    pub num_blocks: u32,
    /// KV blocks that nothing holds and nothing was promised.
    pub kv_blocks_free: u64,
    /// What loading the request's adapter there costs, in tokens of prefill; 0 where it is there, or none is wanted.
    pub lora_load_tokens: u64,
    /// What it would get from another worker instead of computing it.
    pub fetch: Option<Fetch>,
    /// Who would compute the prompt for it; only said of the chosen one.
    pub split: Option<Split>,
    /// Somebody holds more, and fetching it was thought no cheaper than computing.
    pub(super) declines_fetch: bool,
    /// Of the worker.
    pub(super) block_size: u32,
    /// Number of the decision that last chose the worker; 0: none.
    last_chosen: u64,
}

impl Candidate {
    /// Prompt tokens whose KV the worker holds or is to be given.
    pub(super) fn num_given_tokens(&self) -> u64 {
        let of_split = self.split.map(|split| split.num_blocks);
        let num_blocks = of_split.or(self.fetch.map(|fetch| fetch.num_blocks));
        let moved = u64::from(num_blocks.unwrap_or(0)) * u64::from(self.block_size);
        moved.max(self.num_cached_tokens.into())
    }

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
        if let Some(candidate) = self.find(request)? {
            return Ok(candidate);
        }
        // Nobody may take it, or a holder lacks a block that it should have: rare enough to judge everybody.
        let survey = self.survey(request)?;
        survey.best().ok_or_else(|| survey.refusal())
    }

    /// As [`choose`](Self::choose), and gives up where that would judge everybody.
    pub(super) fn find(
        &self,
        request: &RouteRequest<'_>,
    ) -> Result<Option<Candidate>, SchedulerError> {
        self.find_among(request, &[true, false])
    }

    /// As [`find`](Self::find), among the workers that have room now.
    pub(super) fn find_room(&self, request: &RouteRequest<'_>) -> Option<Candidate> {
        let found = self.find_among(request, &[true]).ok().flatten();
        found.filter(|candidate| candidate.has_room)
    }

    /// The best of those that have room or have none, whichever comes first in `rooms` and is there.
    fn find_among(
        &self,
        request: &RouteRequest<'_>,
        rooms: &[bool],
    ) -> Result<Option<Candidate>, SchedulerError> {
        request.validate()?;
        let model = self.groups.model(request.model);
        let model = model.ok_or(SchedulerError::ModelNotFound)?;
        let mut chains = self.chains(model, request);
        let num_whole = Self::set_prefill_last(&mut chains);
        let (whole, prefill) = chains.split_at(num_whole);
        let find = |chains: &[Chain<'_>], rooms: &[bool]| {
            if self.config.policy.is_least_cost() {
                self.least_cost(request, chains, rooms, |chain| {
                    self.cost_model(request, chain)
                })
            } else {
                self.pick(model, request, chains)
            }
        };
        if let Some((found, chain, costs)) = find(whole, rooms) {
            let home = &whole[chain];
            let candidate = self.verified(request, found, home, &costs);
            return Ok(candidate.map(|it| self.split(request, prefill, home, it)));
        }
        // Those that compute prompts for others take whole requests only where nobody else could, be it later.
        if prefill.is_empty() || find(whole, &[false]).is_some() {
            return Ok(None);
        }
        Ok(find(prefill, rooms).and_then(|(found, chain, costs)| {
            self.verified(request, found, &prefill[chain], &costs)
        }))
    }

    /// What a request asks of a chain's workers.
    pub(super) fn needs<'a>(
        request: &RouteRequest<'a>,
        chain: &Chain<'a>,
        room: bool,
    ) -> Needs<'a> {
        let num_tokens = request.num_tokens();
        let block_size = u64::from(chain.block_size);
        Needs {
            num_tokens,
            num_blocks: num_tokens.div_ceil(block_size),
            num_booked_blocks: request.num_booked_tokens().div_ceil(block_size),
            exclude: request.exclude,
            room,
            only: None,
        }
    }

    pub(super) fn cost_model(&self, request: &RouteRequest<'_>, chain: &Chain<'_>) -> CostModel {
        let fetch = self.fetch_cost(chain);
        CostModel {
            policy: self.config.policy,
            prompt_tokens: request.token_ids.len() as u64,
            block_size: chain.block_size.into(),
            fetch,
            source: fetch.map_or_else(Source::default, |_| self.source(chain)),
            seq_cost_tokens: self.config.seq_cost_tokens.into(),
            load_tokens: 0,
        }
    }

    /// What loading the request's adapter onto the worker in this slot costs, in tokens of prefill.
    pub(super) fn load_tokens(&self, chain: &Chain<'_>, slot: u32) -> u64 {
        match chain.residents {
            Some(residents) if !residents.contains(slot) => self.config.lora_load_tokens.into(),
            _ => 0,
        }
    }

    /// A worker of least cost, and which chain is its own.
    pub(super) fn least_cost<'a>(
        &self,
        request: &RouteRequest<'a>,
        chains: &[Chain<'a>],
        rooms: &[bool],
        costs_of: impl Fn(&Chain<'_>) -> CostModel,
    ) -> Option<(Found, usize, CostModel)> {
        rooms.iter().find_map(|&room| {
            let mut best: Option<(Found, usize, CostModel)> = None;
            for (number, chain) in chains.iter().enumerate() {
                // Those that have the adapter, then all as if they had to load it: no resident wins by the latter.
                let residents = chain.residents.map(|residents| (Some(residents), 0));
                let load_tokens = residents.map_or(0, |_| self.config.lora_load_tokens.into());
                let costs = costs_of(chain);
                for (only, load_tokens) in residents.into_iter().chain([(None, load_tokens)]) {
                    let mut search = Search {
                        index: &self.index,
                        workers: &self.workers,
                        group: self.groups.get(chain.group),
                        group_number: chain.group,
                        chain: &chain.blocks,
                        num_sharers: chain.num_sharers,
                        needs: Needs {
                            only,
                            ..Self::needs(request, chain, room)
                        },
                        costs: CostModel {
                            load_tokens,
                            ..costs
                        },
                        // One more, so that an equal of another group is found as well.
                        best: best.map(|(found, ..)| Found {
                            cost: found.cost.saturating_add(1),
                            ..found
                        }),
                    };
                    search.run();
                    if let Some(found) = search.best
                        && best.is_none_or(|(old, ..)| found.is_before(&old))
                    {
                        best = Some((found, number, search.costs));
                    }
                }
            }
            best
        })
    }

    /// The candidate that was found, if it holds what the search took it to hold.
    pub(super) fn verified(
        &self,
        request: &RouteRequest<'_>,
        found: Found,
        chain: &Chain<'_>,
        costs: &CostModel,
    ) -> Option<Candidate> {
        let standing = self.workers.standing(found.slot);
        let blocks = &chain.blocks[..];
        let claimed = if costs.policy.uses_prefix() {
            &blocks[..found.depth]
        } else {
            blocks
        };
        let depth = self.index.depth_of(claimed, standing.holder);
        (depth >= found.depth)
            .then(|| self.candidate(request, chain, found.slot, depth, costs))
            .flatten()
    }

    /// What the request would cost on a worker that holds `depth` leading blocks of it.
    pub(super) fn candidate(
        &self,
        request: &RouteRequest<'_>,
        chain: &Chain<'_>,
        slot: u32,
        depth: usize,
        costs: &CostModel,
    ) -> Option<Candidate> {
        let (_, standing) = self.workers.at(slot)?;
        let load_tokens = self.load_tokens(chain, slot);
        let costs = CostModel {
            load_tokens,
            ..*costs
        };
        let block_size = chain.block_size;
        let num_blocks = request.num_booked_tokens().div_ceil(u64::from(block_size));
        let num_kept = self.workers.num_kept(slot, &chain.blocks[..depth]);
        let prefill = costs.prefill(depth as u64) + costs.copying(depth as u64, num_kept);
        let saved = costs.saved_by_fetch(depth as u64);
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
            lora_load_tokens: load_tokens,
            fetch: costs.fetch_at(depth as u64),
            split: None,
            declines_fetch: costs.source.worker.is_some() && saved == Some(0),
            block_size,
            last_chosen: standing.last_chosen,
        })
    }
}

impl GroupKey {
    /// Why the workers of the group do not take the request; `None`: they do.
    pub(super) fn refusal(&self, request: &RouteRequest<'_>) -> Option<Ineligible> {
        let demanded = request.weights_epoch;
        if demanded.is_some_and(|epoch| epoch != self.weights_epoch) {
            return Some(Ineligible::OtherWeightsEpoch);
        }
        self.terms.refusal(request)
    }
}
