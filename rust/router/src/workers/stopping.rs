//! Running work that may be stopped for a more urgent request, to go on later. Who stops for whom the core decides
//! ([`Scheduler::preempt`](orchestra_core::scheduler::Scheduler::preempt)); here is who offers to.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU32, Ordering},
};

use orchestra_core::{
    Time,
    scheduler::{Grant, Preemptible, ReservationId},
};

use super::Pool;

/// Work on a worker.
pub(crate) trait Stop: Send + Sync {
    /// Stops it: its worker is told before this returns. Called under no lock.
    fn stop(&self);
}

/// Work that is offered, and how far it has got.
pub(crate) struct Stoppable {
    pub(crate) work: Weak<dyn Stop>,
    pub(crate) prompt_tokens: u32,
    /// Of what holds the room.
    pub(crate) progress: Progress,
    /// Of all that stops with it, itself included.
    pub(crate) together: Arc<[Progress]>,
}

/// How far an output has got.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    /// The index that its next token will have, when it began and now.
    pub(crate) first_index: u32,
    pub(crate) next_index: Arc<AtomicU32>,
}

impl Progress {
    /// Tokens since it began.
    pub(crate) fn num_output_tokens(&self) -> u32 {
        self.next_index.load(Ordering::Relaxed) - self.first_index
    }

    /// Tokens whose KV is computed, behind a prompt of this length.
    fn num_computed_tokens(&self, prompt_tokens: u32) -> u64 {
        match self.num_output_tokens() {
            // How far the prompt has got only the worker knows.
            0 => 0,
            _ => u64::from(prompt_tokens) + u64::from(self.next_index.load(Ordering::Relaxed)),
        }
    }
}

impl Stoppable {
    fn offer(&self, reservation: ReservationId) -> Preemptible {
        let computed = |progress: &Progress| progress.num_computed_tokens(self.prompt_tokens);
        Preemptible {
            reservation,
            num_computed_tokens: self.together.iter().map(computed).sum(),
            num_output_tokens: self.progress.num_output_tokens(),
        }
    }
}

impl Pool {
    /// Has work stopped for urgent requests that still wait; what these get is added to `grants`.
    pub(super) fn preempt(&mut self, grants: &mut Vec<Grant>, now: Time) -> Vec<Arc<dyn Stop>> {
        if self.stoppable.is_empty() || !self.scheduler.has_urgent() {
            return Vec::new();
        }
        let offers = self.stoppable.iter().map(|(&id, work)| work.offer(id));
        let preemptions = self.scheduler.preempt(offers.collect(), now);
        let mut stopped = Vec::with_capacity(preemptions.len());
        for preemption in preemptions {
            let work = self.stoppable.remove(&preemption.victim);
            // Where it is gone it has just ended, which also makes room.
            stopped.extend(work.and_then(|work| work.work.upgrade()));
            grants.push(preemption.grant);
        }
        stopped
    }
}
