//! Stopping a running request of class `batch` for one of class `interactive` that waits.
//!
//! Only where the waiting one cannot start otherwise: it is asked after [`take_grants`](Scheduler::take_grants) has
//! given out all the room there is. Of the requests that the caller is ready to stop, the one with the fewest computed
//! tokens is taken whose room and what is free beside it are enough; of equals the newest. Its room goes straight to the
//! waiting one, in one decision: nobody comes between, and nobody is stopped for nothing.
//!
//! Grants of this kind stand outside of the order, as the class of those who get them and what their tenants are charged
//! do not: they count towards both. The caller bounds how often it offers a request.

use super::{
    Scheduler,
    admission::AdmissionClass,
    explain::judge,
    held::Held,
    reservation::ReservationId,
    route::{Candidate, RouteRequest},
    wait_queues::{QueueKey, WaitingRoute},
    waiting::{Grant, Granted},
};
use crate::time::Time;

/// A running request that may be stopped and resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preemptible {
    /// What it holds.
    pub reservation: ReservationId,
    /// Prompt and output tokens whose KV is computed: what is lost at worst.
    pub num_computed_tokens: u64,
    /// Output tokens so far, for the settlement of what its tenant was charged.
    pub num_output_tokens: u32,
}

/// A request that has to stop, and who got its room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preemption {
    /// The reservation, which is gone. Its request is to be stopped before the grant's is started; its seat is its own
    /// to leave.
    pub victim: ReservationId,
    /// The grant of a ticket.
    pub grant: Grant,
}

/// Who makes room for whom.
struct Plan {
    key: QueueKey,
    arrival: u64,
    victim: Preemptible,
    candidate: Candidate,
}

impl Scheduler {
    /// Whether a request waits that others may be stopped for.
    pub fn has_urgent(&self) -> bool {
        self.waiting.has_waiting(AdmissionClass::Interactive)
    }

    /// Stops requests of class `batch` among `running` for those of class `interactive` that wait; to be called after
    /// [`take_grants`](Self::take_grants). O(running) for each that is stopped.
    pub fn preempt(&mut self, mut running: Vec<Preemptible>, now: Time) -> Vec<Preemption> {
        running.retain(|it| self.class_of(it.reservation) == Some(AdmissionClass::Batch));
        running.sort_unstable_by_key(|it| {
            let newest_first = std::cmp::Reverse(it.reservation);
            (it.num_computed_tokens, newest_first)
        });
        let mut preemptions = Vec::new();
        while let Some(plan) = self.plan(&running) {
            running.retain(|it| *it != plan.victim);
            preemptions.extend(self.carry_out(plan, now));
        }
        preemptions
    }

    /// The first queue, by its oldest request, whose next interactive request somebody can make room for.
    fn plan(&self, running: &[Preemptible]) -> Option<Plan> {
        let urgent = self.waiting.queues.iter().filter_map(|(key, queue)| {
            let arrival = queue.requests.first_of(AdmissionClass::Interactive)?;
            Some((queue.requests.get(arrival)?, arrival, key))
        });
        let mut urgent: Vec<_> = urgent.collect();
        urgent.sort_unstable_by_key(|(request, ..)| request.ticket);
        urgent
            .into_iter()
            .find_map(|(request, arrival, key)| self.plan_for(request, arrival, key, running))
    }

    fn plan_for(
        &self,
        waiting: &WaitingRoute,
        arrival: u64,
        key: &QueueKey,
        running: &[Preemptible],
    ) -> Option<Plan> {
        let tolerations = waiting.tolerations();
        let request = waiting.as_request(&key.model, &tolerations);
        running.iter().find_map(|&victim| {
            let held = self.reservations.get(victim.reservation)?;
            let candidate = self.in_place_of(&request, key, held)?;
            Some(Plan {
                key: key.clone(),
                arrival,
                victim,
                candidate,
            })
        })
    }

    /// The reservation's worker as a candidate for the request, were the reservation given back, if that makes room.
    fn in_place_of(
        &self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        held: &Held,
    ) -> Option<Candidate> {
        let worker = self.workers.get(held.worker)?;
        if !key.groups.contains(&worker.group) || judge(held.worker, worker, request).is_some() {
            return None;
        }
        let model = self.groups.model(&key.model)?;
        let chains = self.chains(model, request);
        let chain = chains.iter().find(|chain| chain.group == worker.group)?;
        let depth = self.index.depth_of(&chain.blocks, worker.holder);
        let costs = self.cost_model(request, chain);
        let mut candidate = self.candidate(request, chain, held.worker.slot, depth, &costs)?;
        let mut after = worker.clone();
        after.give_back(held, held.demand);
        let needed = u64::from(candidate.num_blocks) - depth as u64;
        candidate.has_room =
            after.batch() < after.spec.max_num_seqs && needed <= after.kv_blocks_free();
        candidate.has_room.then_some(candidate)
    }

    fn carry_out(&mut self, plan: Plan, now: Time) -> Option<Preemption> {
        let Plan {
            key,
            arrival,
            victim,
            candidate,
        } = plan;
        self.finish(victim.reservation, victim.num_output_tokens);
        let waiting = self
            .waiting
            .queues
            .get(&key)?
            .requests
            .get(arrival)?
            .clone();
        let tolerations = waiting.tolerations();
        let request = waiting.as_request(&key.model, &tolerations);
        // One was given back just now, so the limit of reservations is not reached.
        let reservation = self.reserve(&request, candidate, now).ok()?;
        let charge = self.record_charge(&request, &waiting.tenant, &key, &reservation);
        self.seats.take();
        self.waiting.take(&key, arrival, Some((now, charge)));
        let grant = Grant {
            ticket: waiting.ticket,
            outcome: Ok(Granted::Reservation(reservation)),
        };
        Some(Preemption {
            victim: victim.reservation,
            grant,
        })
    }
}
