//! Reservations: room on workers that was promised and not yet given back.

use std::time::Duration;

use super::{
    Scheduler,
    error::SchedulerError,
    exchange::{Fetch, Moved},
    held::Held,
    policy::RoutePolicy,
    route::{Candidate, RouteRequest},
    split::Split,
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
    /// What it should get from another worker instead of computing it.
    pub fetch: Option<Fetch>,
    /// Who computes the prompt for it; never together with a fetch.
    pub prefill: Option<PrefillPart>,
    /// How long it should wait for what comes from the other worker, before it computes for itself; zero where nothing
    /// does.
    pub move_wait: Duration,
}

/// A prompt that another worker computes: room there, held like any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillPart {
    /// Its own name. It outlives neither its worker nor [`Scheduler::release`]; what it is made for may end before it.
    pub id: ReservationId,
    /// Who computes.
    pub worker: WorkerId,
    /// Leading blocks of the prompt that are computed there.
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
        let prompt = request.token_ids.len() as u64;
        let cached_blocks = chosen.num_cached_tokens / chosen.block_size;
        let mut demand = Demand {
            num_seqs: 1,
            num_blocks: u64::from(chosen.num_blocks - cached_blocks),
            prefill_tokens: prompt - chosen.num_given_tokens(),
        };
        // First, so that a lack of reservations leaves the request with its own.
        let mut prefill = None;
        if let Some(split) = chosen.split
            && self.reservations.len() + 2 <= self.config.max_num_reservations as usize
        {
            prefill = self.reserve_prefill(&split, chosen.block_size, now);
        }
        if chosen.split.is_some() && prefill.is_none() {
            demand.prefill_tokens = prompt - u64::from(chosen.num_cached_tokens);
        }
        let id = self.hold(chosen.worker, demand, now)?;
        let move_wait = self.move_wait(&chosen, prefill.is_some());
        self.note_moves(id, &chosen, prefill.is_some());
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
            fetch: chosen.fetch,
            prefill,
            move_wait,
        })
    }

    /// Holds room on a worker.
    fn hold(
        &mut self,
        id: WorkerId,
        demand: Demand,
        now: Time,
    ) -> Result<ReservationId, SchedulerError> {
        let limit = self.config.max_num_reservations;
        if self.reservations.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "reservations",
                current: limit,
                limit,
            });
        }
        let worker = self.workers.get_mut(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        self.num_decisions += 1;
        worker.reserved.add(demand);
        worker.unreported.add(demand);
        let held = Held {
            worker: id,
            demand,
            num_reports: worker.num_reports,
            reserved_at: now,
        };
        let held = self.reservations.insert(self.num_decisions, held);
        self.workers.standings_mut()[id.slot as usize].last_chosen = self.num_decisions;
        self.refresh(id.slot);
        Ok(held)
    }

    /// Holds room for a prompt on the worker that computes it for another one.
    fn reserve_prefill(
        &mut self,
        split: &Split,
        block_size: u32,
        now: Time,
    ) -> Option<PrefillPart> {
        let num_cached_blocks = split.num_cached_tokens / block_size;
        let num_left = u64::from(split.num_blocks - num_cached_blocks);
        let demand = Demand {
            num_seqs: 1,
            num_blocks: num_left,
            prefill_tokens: num_left * u64::from(block_size),
        };
        let id = self.hold(split.worker, demand, now).ok()?;
        Some(PrefillPart {
            id,
            worker: split.worker,
            num_blocks: split.num_blocks,
        })
    }

    /// Remembers what the reservation's time will say about fetching.
    fn note_moves(&mut self, id: ReservationId, chosen: &Candidate, is_split: bool) {
        let moved = match chosen.fetch {
            _ if is_split => Moved::Pushed,
            Some(fetch) => {
                let held = chosen.num_cached_tokens / chosen.block_size;
                Moved::Fetched(fetch.num_blocks.saturating_sub(held).into())
            }
            None => {
                if chosen.declines_fetch
                    && let Some(worker) = self.workers.get(chosen.worker)
                {
                    self.exchanges.declined(&worker.spec, &self.config);
                }
                return;
            }
        };
        self.moved.insert(id, moved);
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
            // Where KV came from elsewhere the time says nothing about computing.
            if !self.moved.contains_key(&id) {
                let (tokens, took) = (prefill.prefill_tokens, now - started);
                worker.prefill_pace.sample(tokens, took);
                self.exchanges.computed(&worker.spec, tokens, took);
            }
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
        self.moved.remove(&id);
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
