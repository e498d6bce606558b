//! Every worker judged for one request, in words for an operator.

use orchestra_core::scheduler::{RouteRequest, Scheduler, WorkerId};

use super::Workers;
use crate::observe::{Candidate, Explained};

/// Candidates, and ineligible workers, that are named.
const NAMED_MAX: usize = 16;

impl Workers {
    /// How the workers stand for the request now. O(workers × blocks of the prompt), so only for requests that are to be
    /// explained; `None` where it cannot be placed at all.
    pub(crate) fn explain(&self, request: &RouteRequest<'_>) -> Option<Explained> {
        let pool = self.pool.lock();
        let scheduler = &pool.scheduler;
        let explanation = scheduler.explain(request, NAMED_MAX).ok()?;
        let candidates = explanation.candidates.iter().map(|candidate| Candidate {
            worker: name_of(scheduler, candidate.worker),
            cost: candidate.cost,
            has_room: candidate.has_room,
            cached_tokens: candidate.num_cached_tokens,
            queued_prefill_tokens: candidate.queued_prefill_tokens,
            batch: candidate.batch,
            kv_blocks: candidate.num_blocks,
            kv_blocks_free: candidate.kv_blocks_free,
        });
        let ineligible = explanation.ineligible.iter().take(NAMED_MAX);
        let ineligible = ineligible.map(|&(id, reason)| (name_of(scheduler, id), reason.as_str()));
        Some(Explained {
            candidates: candidates.collect(),
            num_more_candidates: explanation.num_more_candidates,
            ineligible: ineligible.collect(),
            num_more_ineligible: explanation.ineligible.len().saturating_sub(NAMED_MAX),
        })
    }
}

fn name_of(scheduler: &Scheduler, worker: WorkerId) -> String {
    scheduler
        .worker_spec(worker)
        .map_or_else(String::new, |spec| spec.name.clone())
}
