//! Choosing a worker for a request.
//!
//! Among the workers that may take the request at all, those that have room for it now come first; among these the
//! one of least cost is taken, and among equals the one that was chosen longest ago:
//!
//! ```text
//! cost(w) = (prefill tokens left to compute on w + prefill tokens queued on w) × (batch on w + 1)
//! ```
//!
//! The reservation is committed inside the decision, so the next decision sees it.
//!
//! Properties (tested): the choice has the least cost of a full scan; a request is never placed on a worker whose
//! KV could not hold it even when empty; a refusal changes nothing.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{
    Scheduler,
    error::SchedulerError,
    reservation::Reservation,
    worker::{Worker, WorkerId, WorkerSpec},
};
use crate::{
    hash::{BlockHash, block_hashes},
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
}

impl RouteRequest<'_> {
    /// Prompt and output tokens.
    fn num_tokens(&self) -> u64 {
        self.token_ids.len() as u64 + u64::from(self.max_tokens)
    }

    fn validate(&self) -> Result<(), SchedulerError> {
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
    /// The formula of this module.
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
    fn rank(&self) -> (Reverse<bool>, u64, u64, WorkerId) {
        (
            Reverse(self.has_room),
            self.cost,
            self.last_chosen,
            self.worker,
        )
    }
}

/// Why a worker of the right model may not take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ineligible {
    /// The request excludes it.
    Excluded,
    /// It takes no new requests.
    Draining,
    /// Prompt and output exceed its context.
    ContextTooLong {
        /// Prompt plus output tokens.
        requested: u64,
        /// Its `max_model_len`.
        limit: u64,
    },
    /// Prompt and output need more KV blocks than it has in all.
    KvTooLarge {
        /// Blocks needed.
        requested: u64,
        /// Its `num_blocks`.
        limit: u64,
    },
}

impl Ineligible {
    /// The reason as metrics and Python spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Excluded => "excluded",
            Self::Draining => "draining",
            Self::ContextTooLong { .. } => "context_too_long",
            Self::KvTooLarge { .. } => "kv_too_large",
        }
    }
}

/// Why a request would go where it would go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// The best candidates, best first. The first is the one that `route` would choose.
    pub candidates: Vec<Candidate>,
    /// How many more workers could take the request.
    pub num_more_candidates: u32,
    /// The workers of the model that could not, and why.
    pub ineligible: Vec<(WorkerId, Ineligible)>,
}

/// All workers of a request's model, judged.
struct Survey {
    candidates: Vec<Candidate>,
    ineligible: Vec<(WorkerId, Ineligible)>,
}

impl Survey {
    fn best(&self) -> Option<Candidate> {
        self.candidates
            .iter()
            .min_by_key(|candidate| candidate.rank())
            .copied()
    }

    /// Why there is no candidate: size first, because waiting does not help against it.
    fn refusal(&self) -> SchedulerError {
        let reasons = self.ineligible.iter().map(|&(_, reason)| reason);
        let kv = reasons.clone().filter_map(|reason| match reason {
            Ineligible::KvTooLarge { requested, limit } => Some((limit, requested)),
            _ => None,
        });
        let context = reasons.filter_map(|reason| match reason {
            Ineligible::ContextTooLong { requested, limit } => Some((limit, requested)),
            _ => None,
        });
        match (kv.max(), context.max()) {
            (Some((limit, requested)), _) => SchedulerError::KvTooLarge { requested, limit },
            (None, Some((limit, requested))) => SchedulerError::ContextTooLong { requested, limit },
            (None, None) => SchedulerError::NoWorkers {
                registered: self.ineligible.len() as u32,
            },
        }
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

    /// The best `k` workers for the request and what each would cost, and why the others of the model may not
    /// take it. Reserves nothing.
    pub fn explain(
        &self,
        request: &RouteRequest<'_>,
        k: usize,
    ) -> Result<Explanation, SchedulerError> {
        let Survey {
            mut candidates,
            ineligible,
        } = self.survey(request)?;
        candidates.sort_unstable_by_key(Candidate::rank);
        let num_more_candidates = candidates.len().saturating_sub(k) as u32;
        candidates.truncate(k);
        Ok(Explanation {
            candidates,
            num_more_candidates,
            ineligible,
        })
    }

    /// The best worker for the request, whether or not it has room now. Reserves nothing.
    pub(super) fn choose(&self, request: &RouteRequest<'_>) -> Result<Candidate, SchedulerError> {
        let survey = self.survey(request)?;
        survey.best().ok_or_else(|| survey.refusal())
    }

    /// Judges every worker of the model.
    fn survey(&self, request: &RouteRequest<'_>) -> Result<Survey, SchedulerError> {
        request.validate()?;
        let mut ineligible = Vec::new();
        // Workers that hash alike share one chain: it depends on the block size and, of the seed's parts, on the
        // epoch; model and salt are the request's.
        let mut groups: BTreeMap<(u32, u64), Vec<WorkerId>> = BTreeMap::new();
        for (&id, worker) in &self.workers {
            if worker.spec.model != request.model {
                continue;
            }
            match judge(id, worker, request) {
                Some(reason) => ineligible.push((id, reason)),
                None => groups
                    .entry((worker.spec.block_size, worker.spec.weights_epoch))
                    .or_default()
                    .push(id),
            }
        }
        if groups.is_empty() && ineligible.is_empty() {
            return Err(SchedulerError::ModelNotFound);
        }
        let mut candidates = Vec::new();
        for members in groups.values() {
            let Some(first) = self.workers.get(&members[0]) else {
                continue;
            };
            let chain = usable_chain(request, &first.spec);
            let depths = self.index.depths(&chain, members);
            for (&id, depth) in members.iter().zip(depths) {
                if let Some(worker) = self.workers.get(&id) {
                    candidates.push(assess(id, worker, request, depth));
                }
            }
        }
        Ok(Survey {
            candidates,
            ineligible,
        })
    }
}

/// Hashes of the prompt's blocks that a prefix hit can use: at least one token is always computed, because the first
/// output token is drawn from its logits.
fn usable_chain(request: &RouteRequest<'_>, spec: &WorkerSpec) -> Vec<BlockHash> {
    let (_last, usable) = request.token_ids.split_last().unwrap_or((&0, &[]));
    block_hashes(
        spec.hash_seed(request.salt),
        usable,
        spec.block_size as usize,
    )
}

/// Whether the worker could ever take the request; `None`: it could.
fn judge(id: WorkerId, worker: &Worker, request: &RouteRequest<'_>) -> Option<Ineligible> {
    if request.exclude.contains(&id) {
        return Some(Ineligible::Excluded);
    }
    if worker.is_draining {
        return Some(Ineligible::Draining);
    }
    let (requested, limit) = (request.num_tokens(), u64::from(worker.spec.max_model_len));
    if requested > limit {
        return Some(Ineligible::ContextTooLong { requested, limit });
    }
    let requested = requested.div_ceil(u64::from(worker.spec.block_size));
    let limit = u64::from(worker.spec.num_blocks);
    (requested > limit).then_some(Ineligible::KvTooLarge { requested, limit })
}

/// What the request would cost on a worker that holds `depth` leading blocks of it.
fn assess(id: WorkerId, worker: &Worker, request: &RouteRequest<'_>, depth: u32) -> Candidate {
    let block_size = worker.spec.block_size;
    let num_cached_tokens = depth * block_size;
    // Fits in u32: `judge` held it against `num_blocks`.
    let num_blocks = request.num_tokens().div_ceil(u64::from(block_size)) as u32;
    let batch = worker.batch();
    let kv_blocks_free = worker.kv_blocks_free();
    let queued_prefill_tokens = worker.queued_prefill_tokens();
    let left = request.token_ids.len() as u64 - u64::from(num_cached_tokens);
    Candidate {
        worker: id,
        cost: left
            .saturating_add(queued_prefill_tokens)
            .saturating_mul(u64::from(batch) + 1),
        has_room: batch < worker.spec.max_num_seqs
            && u64::from(num_blocks - depth) <= kv_blocks_free,
        num_cached_tokens,
        queued_prefill_tokens,
        batch,
        num_blocks,
        kv_blocks_free,
        last_chosen: worker.last_chosen,
    }
}
