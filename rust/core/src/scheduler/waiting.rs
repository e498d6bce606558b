//! Waiting for room: requests until a worker can start them, gangs until their GPUs are free.
//!
//! Requests wait in one queue for each model and kind: of a kind are those that the same workers take by their terms
//! (weights epoch, taints, service classes, adapters), so that a queue whose workers are full does not hold up
//! requests for others. The order within a queue is [`fair_queue`](super::fair_queue)'s; between the queues of a
//! model, the one with the oldest request is served first. [`serve`](super::serve) says what happens where the next
//! one finds no room.
//!
//! Gangs wait in one queue, strictly in order.
//!
//! Waiting helps against a lack of room (all batches full, all workers draining, no GPU memory free); what no
//! registered worker or GPU could ever take is refused at once, or when its turn comes where it became impossible
//! meanwhile.

use std::sync::Arc;

use super::{
    Scheduler,
    error::SchedulerError,
    fair_queue::Claim,
    place::{PlaceRequest, Placement},
    reservation::Reservation,
    route::{Candidate, RouteRequest},
    wait_queues::{Hashed, QueueKey, WaitingRoute},
};
use crate::{hash::block_hashes, time::Time};

/// Names a waiting request. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketId(pub(super) u64);

/// The answer to a request that may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait<T> {
    /// There was room.
    Granted(T),
    /// There was none; [`Scheduler::take_grants`] will name this ticket.
    Waiting(TicketId),
}

/// What a waiting request got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Granted {
    /// It wanted a worker.
    Reservation(Reservation),
    /// It wanted GPUs.
    Placement(Placement),
}

/// The end of one wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who waited.
    pub ticket: TicketId,
    /// What it got, or why it never will.
    pub outcome: Result<Granted, SchedulerError>,
}

impl Scheduler {
    /// A worker that has room for the request now, or a ticket to wait for one.
    ///
    /// A request that waits behind others may still be the first to find room, so
    /// [`take_grants`](Self::take_grants) is to be called after every wait that begins.
    ///
    /// Unlike [`route`](Self::route), which places at once on the best worker and leaves the waiting to it. Only here
    /// do tenant, class and deadline count. O(log n) in the number of waiting requests, besides the decision.
    pub fn acquire(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Wait<Reservation>, SchedulerError> {
        // What cannot be need not wait to hear it.
        let best = unless_waiting_helps(self.choose(request).map(Some))?;
        if request.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(SchedulerError::DeadlineExceeded);
        }
        let key = self.queue_key(request);
        self.check_hope(request, &key, best.as_ref(), now)?;
        // Behind others, taking room now would be overtaking.
        if self.waiting.occupied(&key).is_none()
            && let Some(best) = best
            && let Some(reservation) = self.grant_now(request, &key, best, now)?
        {
            return Ok(Wait::Granted(reservation));
        }
        self.check_queue(request, &key, best.as_ref())?;
        let ticket = self.waiting.next_ticket();
        let (claim, waiting) = self.claim(request, best.as_ref(), ticket);
        self.waiting.push(key, claim, waiting, self.rules, now);
        Ok(Wait::Waiting(ticket))
    }

    /// Reserves for a request that has nobody before it, if there is room that no other queue holds.
    fn grant_now(
        &mut self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        best: Candidate,
        now: Time,
    ) -> Result<Option<Reservation>, SchedulerError> {
        let held = self.waiting.held_by_others(key);
        let Some(best) = self
            .beside(request, best, &held)
            .filter(|best| best.has_room)
        else {
            return Ok(None);
        };
        let reservation = unless_waiting_helps(self.reserve(request, best, now).map(Some))?;
        if let Some(reservation) = &reservation {
            let tenant: Arc<str> = request.tenant.into();
            let charge = self.record_charge(request, &tenant, key, reservation);
            let queue = self.waiting.queue_mut(key, self.rules);
            queue
                .requests
                .charge_unqueued(&tenant, request.class, charge);
        }
        Ok(reservation)
    }

    /// The request as it waits, and its claim to a turn.
    fn claim(
        &self,
        request: &RouteRequest<'_>,
        best: Option<&Candidate>,
        ticket: TicketId,
    ) -> (Claim, WaitingRoute) {
        let mut waiting = WaitingRoute::new(request, ticket);
        let mut num_cached_tokens = 0;
        let mut next_block = None;
        if let Some(best) = best
            && let Some(spec) = self.worker_spec(best.worker)
        {
            num_cached_tokens = best.num_cached_tokens;
            let seed = spec.hash_seed(request.salt, request.lora);
            let block_size = spec.block_size;
            let is_usable = |it: &Hashed| (it.seed, it.block_size) == (seed, block_size);
            // Hashed once here instead of at every look at it.
            let hashed = waiting.hashed.take().filter(is_usable);
            let hashed = hashed.unwrap_or_else(|| Hashed {
                seed,
                block_size,
                blocks: block_hashes(seed, request.token_ids, block_size as usize),
            });
            let num_cached_blocks = (num_cached_tokens / block_size) as usize;
            next_block = hashed.blocks.get(num_cached_blocks).copied();
            waiting.hashed = Some(hashed);
        }
        let claim = Claim {
            tenant: Arc::clone(&waiting.tenant),
            class: request.class,
            num_prefill_tokens: request.token_ids.len() as u64 - u64::from(num_cached_tokens),
            next_block,
        };
        (claim, waiting)
    }

    /// Memory for a gang, or a ticket to wait for it.
    pub fn acquire_gpus(
        &mut self,
        request: &PlaceRequest,
    ) -> Result<Wait<Placement>, SchedulerError> {
        if self.waiting.places.is_empty() {
            if let Some(placement) = unless_waiting_helps(self.place(request).map(Some))? {
                return Ok(Wait::Granted(placement));
            }
        } else {
            unless_waiting_helps(self.check_place(request).map(Some))?;
        }
        let (current, limit) = (self.waiting.places.len(), self.config.max_num_waiting);
        if current >= limit as usize {
            return Err(SchedulerError::QueueFull {
                kind: "waiting requests",
                current: current as u32,
                limit,
                retry_after: None,
            });
        }
        let ticket = self.waiting.next_ticket();
        self.waiting.places.insert(ticket, *request);
        Ok(Wait::Waiting(ticket))
    }

    /// Ends a wait without an outcome. `false` where it has ended already. Those behind may be served now.
    pub fn cancel(&mut self, ticket: TicketId) -> bool {
        self.waiting.places.remove(&ticket).is_some() || self.waiting.remove(ticket)
    }

    /// When the first deadline of a waiting request passes; [`take_grants`](Self::take_grants) then ends its wait.
    pub fn next_deadline(&self) -> Option<Time> {
        self.waiting.next_deadline()
    }

    /// The queue of a request's kind.
    pub(super) fn queue_key(&self, request: &RouteRequest<'_>) -> QueueKey {
        let model = self.groups.model(request.model);
        let groups = model.into_iter().flat_map(|model| &model.groups);
        let taking = groups.filter(|(key, _)| key.refusal(request).is_none());
        QueueKey {
            model: request.model.into(),
            groups: taking.map(|(_, &group)| group).collect(),
        }
    }

    fn check_queue(
        &self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        best: Option<&Candidate>,
    ) -> Result<(), SchedulerError> {
        let of_tenant = self.waiting.num_by_tenant.get(request.tenant);
        let (all, _) = self.waiting.lengths();
        let (limit, tenant_limit) = (
            self.config.max_num_waiting,
            self.config.max_num_waiting_per_tenant,
        );
        let lengths = [
            ("waiting requests", all as u32, limit),
            (
                "waiting requests of this tenant",
                of_tenant.copied().unwrap_or(0),
                tenant_limit,
            ),
        ];
        let full = lengths
            .into_iter()
            .find(|&(_, length, limit)| length >= limit);
        full.map_or(Ok(()), |(kind, current, limit)| {
            Err(SchedulerError::QueueFull {
                kind,
                current,
                limit,
                retry_after: self.predict_wait(request, key, best),
            })
        })
    }
}

/// Turns a refusal that time may cure into `None`.
pub(super) fn unless_waiting_helps<T>(
    outcome: Result<Option<T>, SchedulerError>,
) -> Result<Option<T>, SchedulerError> {
    match outcome {
        Err(error) if error.code().retryable() => Ok(None),
        outcome => outcome,
    }
}
