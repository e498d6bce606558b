//! What a worker that reports no KV events is taken to hold: the prompts that were placed on it.
//!
//! From a reservation on, the worker counts as holding the blocks of the prompt that a prefix hit can use. Beyond
//! `max_blocks` the least recently used are forgotten, as an engine would evict them; nobody says whether it did, so
//! this is a guess and `num_cached_tokens` of such a worker is one too. [`RecentBlocks`] is the list.

use super::{
    Scheduler,
    chain::usable_chain,
    error::SchedulerError,
    recent::RecentBlocks,
    route::{Candidate, RouteRequest},
    worker::{WorkerId, hash_seed},
};
use crate::time::Time;

/// How the scheduler learns what a worker's prefix cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvSource {
    /// From the KV events that it sends.
    #[default]
    Reported,
    /// It sends none, and is taken to hold the prompts that were placed on it last.
    Assumed {
        /// Most blocks that it is taken to hold, 1 to its `num_blocks`; the least recently used go first.
        max_blocks: u32,
        /// Seconds after which a block that no prompt used counts as evicted; 0: never.
        ttl_s: u32,
    },
}

impl KvSource {
    /// A list of what the worker was given; `None` for one that reports.
    pub(super) fn assumed(self) -> Option<RecentBlocks> {
        match self {
            Self::Reported => None,
            Self::Assumed { max_blocks, ttl_s } => {
                Some(RecentBlocks::new(max_blocks as usize, ttl_s))
            }
        }
    }
}

impl Scheduler {
    /// Forgets the blocks that workers without KV events were taken to hold for longer than their `ttl_s`. Each
    /// reservation does so for its own worker; call this now and then for those that get none.
    pub fn expire_kv(&mut self, now: Time) {
        let workers = self.workers.iter();
        let expiring = workers.filter(|(_, worker)| worker.assumed.is_some());
        let ids: Vec<WorkerId> = expiring.map(|(id, _)| id).collect();
        for id in ids {
            let worker = self.workers.get_mut(id);
            if let Some(worker) = worker
                && let Some(assumed) = &mut worker.assumed
            {
                let removed = assumed.expire(now);
                worker.num_cached_blocks -= self.index.remove_all(&removed, worker.holder);
            }
        }
    }

    /// The chosen worker will hold the request's prompt, where it does not say itself what it holds.
    pub(super) fn assume(&mut self, request: &RouteRequest<'_>, chosen: &Candidate, now: Time) {
        let Some(worker) = self.workers.get_mut(chosen.worker) else {
            return;
        };
        let Some(assumed) = &mut worker.assumed else {
            return;
        };
        let spec = &worker.spec;
        let seed = hash_seed(&spec.model, spec.weights_epoch, request.salt, request.lora);
        let chain = usable_chain(request, seed, spec.block_size);
        let change = assumed.touch(&chain, now);
        let removed = self.index.remove_all(&change.removed, worker.holder);
        let stored = self.index.insert_all(&change.stored, worker.holder);
        worker.num_cached_blocks = worker.num_cached_blocks - removed + stored;
    }

    /// The worker, if it is one that tells what it holds.
    pub(super) fn check_reports_kv(&self, id: WorkerId) -> Result<(), SchedulerError> {
        let worker = self.workers.get(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        if worker.assumed.is_none() {
            return Ok(());
        }
        Err(SchedulerError::InvalidField {
            field: "kv_source",
            expected: "reported for a worker that sends KV events",
        })
    }
}
