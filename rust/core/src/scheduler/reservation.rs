//! Reservations: room on workers that was promised and not yet given back.

use super::{
    Scheduler,
    error::SchedulerError,
    held::Held,
    policy::RoutePolicy,
    route::{Candidate, RouteRequest},
    worker::{Demand, WorkerId},
};
use crate::time::Time;

/// Names a reservation. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId {
    /// Counts decisions; first, so that ids are ordered by it.
    pub(super) number: u64,
    /// Where the reservation is found, if what is there has this number.
    pub(super) slot: u32,
}

/// Room on a worker, held until [`Scheduler::release`] or until the worker is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Its name.
    pub id: ReservationId,
    /// The chosen worker.
    pub worker: WorkerId,
    /// Prompt tokens whose KV the worker holds already.
    pub num_cached_tokens: u32,
    /// KV blocks of the prompt and the booked output together, cached ones included.
    pub num_blocks: u32,
}

impl Scheduler {
    /// Commits a decision.
    pub(super) fn reserve(
        &mut self,
        request: &RouteRequest<'_>,
        chosen: Candidate,
        now: Time,
    ) -> Result<Reservation, SchedulerError> {
        let limit = self.config.max_num_reservations;
        if self.reservations.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "reservations",
                current: limit,
                limit,
            });
        }
        let worker = self
            .workers
            .get_mut(chosen.worker)
            .ok_or(SchedulerError::UnknownWorker)?;
        let cached_blocks = chosen.num_cached_tokens / chosen.block_size;
        let demand = Demand {
            num_seqs: 1,
            num_blocks: u64::from(chosen.num_blocks - cached_blocks),
            prefill_tokens: request.token_ids.len() as u64 - u64::from(chosen.num_cached_tokens),
        };
        self.num_decisions += 1;
        worker.reserved.add(demand);
        worker.unreported.add(demand);
        let num_reports = worker.num_reports;
        let held = Held {
            worker: chosen.worker,
            demand,
            num_reports,
            reserved_at: now,
        };
        let id = self.reservations.insert(self.num_decisions, held);
        let slot = chosen.worker.slot;
        self.workers.standings_mut()[slot as usize].last_chosen = self.num_decisions;
        self.refresh(slot);
        self.assume(request, &chosen, now);
        if let Some(lora) = request.lora {
            self.expect_lora(chosen.worker, lora);
        }
        if self.config.policy == RoutePolicy::RoundRobin
            && let Some(model) = self.groups.model_mut(request.model)
        {
            model.last_slot = Some(chosen.worker.slot);
        }
        Ok(Reservation {
            id,
            worker: chosen.worker,
            num_cached_tokens: chosen.num_cached_tokens,
            num_blocks: chosen.num_blocks,
        })
    }

    /// The prompt is computed: its tokens no longer queue on the worker. `false` where the reservation is gone or
    /// its prompt was done before.
    ///
    /// The time that it took teaches how fast the worker computes prompts: since the reservation, or since the last
    /// prompt that the worker computed if that was later.
    pub fn prefill_done(&mut self, id: ReservationId, now: Time) -> bool {
        let Some(held) = self.reservations.get_mut(id) else {
            return false;
        };
        let prefill = Demand {
            prefill_tokens: held.demand.prefill_tokens,
            ..Demand::default()
        };
        held.demand.subtract(prefill);
        let held = *held;
        self.give_back(&held, prefill);
        let is_first = prefill.prefill_tokens > 0;
        if is_first && let Some(worker) = self.workers.get_mut(held.worker) {
            let started = held.reserved_at.max(worker.prefill_done_at);
            worker.prefill_done_at = worker.prefill_done_at.max(now);
            let tokens = prefill.prefill_tokens;
            worker.prefill_pace.sample(tokens, now - started);
        }
        is_first
    }

    /// Gives a reservation back. `false` where it is gone already.
    ///
    /// Its tenant stays charged for all of `max_tokens`; [`finish`](Self::finish) settles that.
    pub fn release(&mut self, id: ReservationId) -> bool {
        let Some(held) = self.reservations.remove(id) else {
            return false;
        };
        self.charges.remove(&id);
        self.give_back(&held, held.demand);
        true
    }

    fn give_back(&mut self, held: &Held, demand: Demand) {
        // A reservation goes with its worker, so a held one's worker is there.
        let Some(worker) = self.workers.get_mut(held.worker) else {
            return;
        };
        worker.give_back(held, demand);
        self.refresh(held.worker.slot);
    }
}
