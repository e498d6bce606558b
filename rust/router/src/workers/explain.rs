//! Every worker judged for one request, in words for an operator.

use orchestra_core::scheduler::{self as core, RouteRequest, Scheduler, WorkerId};

use super::Workers;
use crate::{
    metrics::MoveKind,
    observe::{Candidate, Explained, KvMove, Record},
};

/// Candidates, and ineligible workers, that are named.
const NAMED_MAX: usize = 16;

impl Workers {
    /// Has the record of a request that is to be explained say how the workers stand for it now.
    pub(crate) fn explain_to(&self, record: &Record, request: &RouteRequest<'_>) {
        if record.wants_explanation() {
            record.explained(self.explain(request));
        }
    }

    /// O(workers × blocks of the prompt) under the lock of all placements. `None` where it cannot be placed at all.
    fn explain(&self, request: &RouteRequest<'_>) -> Option<Explained> {
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
            kv_move: kv_move(scheduler, candidate),
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

fn kv_move(scheduler: &Scheduler, candidate: &core::Candidate) -> Option<KvMove> {
    let (kind, from, blocks) = match (candidate.split, candidate.fetch) {
        (Some(split), _) => (MoveKind::Split, split.worker, split.num_blocks),
        (None, fetch) => {
            let fetch = fetch?;
            (MoveKind::Fetch, fetch.source, fetch.num_blocks)
        }
    };
    Some(KvMove {
        kind: kind.as_str(),
        from: name_of(scheduler, from),
        blocks,
    })
}

fn name_of(scheduler: &Scheduler, worker: WorkerId) -> String {
    scheduler
        .worker_spec(worker)
        .map_or_else(String::new, |spec| spec.name.clone())
}
