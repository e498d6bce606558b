//! Waiting for room: requests until a worker can start them, gangs until their GPUs are free.
//!
//! Requests wait in one queue for each model and kind: of a kind are those that the same workers take by their terms
//! (weights epoch, taints, service classes, adapters), so that a queue whose workers are full does not hold up
//! requests for others. `fair_queue` has the order within a queue; between the queues of a model, the one with the
//! oldest request is served first. `serve` says what happens where the next one finds no room.
//!
//! Gangs wait in one queue, strictly in order.
//!
//! Waiting helps against a lack of room (all batches full, all workers draining, no GPU memory free); what no
//! registered worker or GPU could ever take is refused at once, or when its turn comes where it became impossible
//! meanwhile.

use std::sync::Arc;

use super::{
    Scheduler,
    admission::AdmissionClass,
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
    ///
    /// Where as many wait as may, the newest request of the lowest class below this one's loses its place to it: its wait
    /// ends with [`Displaced`](SchedulerError::Displaced) at the next `take_grants`.
    pub fn acquire(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Wait<Reservation>, SchedulerError> {
        self.acquire_as(request, false, now)
    }

    /// The same for a request that ran, was [stopped](Self::preempt) and is to go on. The queue takes it however many
    /// wait, and it does not lose its place there: it was admitted once.
    pub fn reacquire(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Wait<Reservation>, SchedulerError> {
        self.acquire_as(request, true, now)
    }

    fn acquire_as(
        &mut self,
        request: &RouteRequest<'_>,
        is_resumed: bool,
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
            && self.seats.is_free()
            && let Some(best) = best
            && let Some(reservation) = self.grant_now(request, &key, best, now)?
        {
            return Ok(Wait::Granted(reservation));
        }
        if !is_resumed {
            self.make_way(request, &key, best.as_ref())?;
        }
        let ticket = self.waiting.next_ticket();
        let (claim, mut waiting) = self.claim(request, best.as_ref(), ticket);
        waiting.may_be_displaced = !is_resumed;
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
            self.charge_now(request, key, reservation);
            self.seats.take();
        }
        Ok(reservation)
    }

    /// Places one more sequence of a request that was granted: another choice of it, or the rest of one that lost its
    /// worker. As with [`route`](Self::route) that is done at once and ahead of all that wait, so that nobody holds half of
    /// what it needs; it takes no seat, and the tenant is charged.
    pub fn accompany(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Reservation, SchedulerError> {
        let reservation = self.route(request, now)?;
        self.charge_now(request, &self.queue_key(request), &reservation);
        Ok(reservation)
    }

    /// Charges for what was granted without a wait.
    fn charge_now(
        &mut self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        reservation: &Reservation,
    ) {
        let tenant: Arc<str> = request.tenant.into();
        let charge = self.record_charge(request, &tenant, key, reservation);
        let queue = self.waiting.queue_mut(key, self.rules);
        queue
            .requests
            .charge_unqueued(&tenant, request.class, charge);
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

    /// Whether some worker of the model takes requests now, be it full: without one, waiting may be in vain.
    pub fn has_open_worker(&self, model: &str) -> bool {
        let model = self.groups.model(model);
        let mut groups = model.into_iter().flat_map(|model| model.groups.values());
        groups.any(|&group| self.groups.get(group).grid.least().is_some())
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

    /// Refuses what [`acquire`](Self::acquire) would refuse because as many wait as may, whatever else the request asks.
    /// O(1), so it can come before work on the request. Says nothing while nobody waits: there may be room.
    pub fn check_queue(&self, model: &str, class: AdmissionClass) -> Result<(), SchedulerError> {
        match self.full_for(class) {
            Some(current) if current > 0 => Err(SchedulerError::QueueFull {
                kind: "waiting requests",
                current,
                limit: self.config.max_num_waiting,
                retry_after: self.queue_wait(model),
            }),
            _ => Ok(()),
        }
    }

    /// How many wait, where no further request of this class may.
    fn full_for(&self, class: AdmissionClass) -> Option<u32> {
        let (all, _) = self.waiting.lengths();
        let is_full = all >= self.config.max_num_waiting as usize;
        (is_full && self.waiting.newest_below(class).is_none()).then_some(all as u32)
    }

    /// Room for one more in the queue: refuses, or displaces one of a lower class.
    fn make_way(
        &mut self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        best: Option<&Candidate>,
    ) -> Result<(), SchedulerError> {
        let of_tenant = self.waiting.num_by_tenant.get(request.tenant);
        let of_tenant = of_tenant.copied().unwrap_or(0);
        let limit = self.config.max_num_waiting_per_tenant;
        let limit = request.queue_limit.map_or(limit, |own| own.min(limit));
        // A limit that is not below the one on all says nothing of its own.
        let is_own = limit < self.config.max_num_waiting;
        let (kind, current, limit) = if is_own && of_tenant >= limit {
            ("waiting requests of this tenant", of_tenant, limit)
        } else if let Some(current) = self.full_for(request.class) {
            ("waiting requests", current, self.config.max_num_waiting)
        } else {
            self.waiting
                .displace_for(request.class, self.config.max_num_waiting as usize);
            return Ok(());
        };
        Err(SchedulerError::QueueFull {
            kind,
            current,
            limit,
            retry_after: self.predict_wait(request, key, best),
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
