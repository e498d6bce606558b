//! The queues of those that wait, and what is known of them across queues: tickets, deadlines, tenants.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rustc_hash::FxHashMap;

use super::{
    admission::{AdmissionClass, Rules},
    error::SchedulerError,
    fair_queue::{Claim, FairQueue},
    loras::Lora,
    pace::Pace,
    place::PlaceRequest,
    route::{HashedPrompt, RouteRequest},
    waiting::{Grant, TicketId},
    worker::WorkerId,
};
use crate::{
    hash::{BlockHash, HashSeed},
    ids::TokenId,
    time::Time,
};

/// So many queues may be kept; one more lets those without a waiting request go.
const NUM_QUEUES_MAX: usize = 1_024;

/// A model, and the groups of its workers that take a kind of request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct QueueKey {
    pub(super) model: Arc<str>,
    pub(super) groups: Arc<[u32]>,
}

/// An owned [`RouteRequest`].
#[derive(Clone, Debug)]
pub(super) struct WaitingRoute {
    pub(super) ticket: TicketId,
    pub(super) tenant: Arc<str>,
    pub(super) class: AdmissionClass,
    pub(super) may_be_displaced: bool,
    deadline: Option<Time>,
    token_ids: Vec<TokenId>,
    max_tokens: u32,
    booked_tokens: Option<u32>,
    salt: String,
    lora: Option<(String, u64)>,
    weights_epoch: Option<u64>,
    slo_class: String,
    tolerations: Vec<String>,
    exclude: Vec<WorkerId>,
    session_key: String,
    pub(super) hashed: Option<Hashed>,
}

/// An owned [`HashedPrompt`].
#[derive(Clone, Debug)]
pub(super) struct Hashed {
    pub(super) seed: HashSeed,
    pub(super) block_size: u32,
    pub(super) blocks: Vec<BlockHash>,
}

/// A worker that takes nobody else until a request found room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    /// The request.
    pub(super) arrival: u64,
    pub(super) worker: WorkerId,
}

/// The waiting requests of one kind.
#[derive(Debug)]
pub(super) struct RouteQueue {
    pub(super) requests: FairQueue<WaitingRoute>,
    pub(super) hold: Option<Hold>,
    /// Grants while somebody waited, and the time that they took.
    pub(super) pace: Pace,
    /// The last grant, or when the first one began to wait.
    since: Time,
}

/// Where a ticket waits.
#[derive(Clone, Debug)]
struct Spot {
    key: QueueKey,
    arrival: u64,
}

/// All waiting requests. Tickets count up, so a map by ticket is a queue.
#[derive(Debug, Default)]
pub(super) struct WaitQueues {
    pub(super) queues: BTreeMap<QueueKey, RouteQueue>,
    tickets: FxHashMap<TicketId, Spot>,
    /// Of the waiting requests that have one.
    deadlines: BTreeSet<(Time, TicketId)>,
    /// Those that may be displaced by class, the oldest first.
    displaceable: [BTreeSet<TicketId>; 3],
    /// Waits that ended for others; nobody was told yet.
    pub(super) displaced: Vec<Grant>,
    pub(super) num_by_tenant: FxHashMap<Arc<str>, u32>,
    pub(super) places: BTreeMap<TicketId, PlaceRequest>,
    num_tickets: u64,
}

impl RouteQueue {
    fn new(rules: Rules) -> Self {
        Self {
            requests: FairQueue::new(rules),
            hold: None,
            pace: Pace::default(),
            since: Time::ZERO,
        }
    }
}

impl WaitQueues {
    pub(super) fn next_ticket(&mut self) -> TicketId {
        self.num_tickets += 1;
        TicketId(self.num_tickets)
    }

    /// Requests that wait for a worker, and gangs that wait for GPUs.
    pub(super) fn lengths(&self) -> (usize, usize) {
        (self.tickets.len(), self.places.len())
    }

    /// Whether nobody waits, and nobody is to be told of an end.
    pub(super) fn is_quiet(&self) -> bool {
        self.lengths() == (0, 0) && self.displaced.is_empty()
    }

    /// Whether a request of this class waits.
    pub(super) fn has_waiting(&self, class: AdmissionClass) -> bool {
        let mut queues = self.queues.values();
        queues.any(|queue| queue.requests.first_of(class).is_some())
    }

    /// The newest request of the lowest class, where that is below `class`.
    pub(super) fn newest_below(&self, class: AdmissionClass) -> Option<TicketId> {
        let below = &self.displaceable[class as usize + 1..];
        let lowest = below.iter().rev().find(|tickets| !tickets.is_empty());
        lowest?.last().copied()
    }

    /// Where `max_num_waiting` wait, ends the wait of one for a newcomer of this class.
    pub(super) fn displace_for(&mut self, class: AdmissionClass, max_num_waiting: usize) {
        if self.tickets.len() < max_num_waiting {
            return;
        }
        let Some(ticket) = self.newest_below(class) else {
            return;
        };
        let queue = self
            .tickets
            .get(&ticket)
            .and_then(|spot| self.queues.get(&spot.key));
        let retry_after = queue.and_then(|it| it.pace.time_for(it.requests.len() as u64));
        self.remove(ticket);
        self.displaced.push(Grant {
            ticket,
            outcome: Err(SchedulerError::Displaced { retry_after }),
        });
    }

    /// The queue, where somebody waits in it.
    pub(super) fn occupied(&self, key: &QueueKey) -> Option<&RouteQueue> {
        let queue = self.queues.get(key);
        queue.filter(|queue| queue.requests.len() > 0)
    }

    /// The queue; made where there is none.
    pub(super) fn queue_mut(&mut self, key: &QueueKey, rules: Rules) -> &mut RouteQueue {
        if self.queues.len() >= NUM_QUEUES_MAX && !self.queues.contains_key(key) {
            self.queues.retain(|_, queue| queue.requests.len() > 0);
        }
        let queue = self.queues.entry(key.clone());
        queue.or_insert_with(|| RouteQueue::new(rules))
    }

    /// Workers that the model's other queues hold.
    pub(super) fn held_by_others(&self, key: &QueueKey) -> Vec<WorkerId> {
        let others = self.of_model(&key.model).filter(|&(other, _)| other != key);
        let holds = others.filter_map(|(_, queue)| queue.hold);
        holds.map(|hold| hold.worker).collect()
    }

    /// The queues of a model.
    pub(super) fn of_model(
        &self,
        model: &Arc<str>,
    ) -> impl Iterator<Item = (&QueueKey, &RouteQueue)> {
        let first = QueueKey {
            model: Arc::clone(model),
            groups: Arc::default(),
        };
        let queues = self.queues.range(first..);
        queues.take_while(move |(key, _)| key.model == *model)
    }

    /// When its oldest request came.
    pub(super) fn oldest(&self, key: &QueueKey) -> Option<TicketId> {
        let oldest = self.queues.get(key)?.requests.oldest()?;
        Some(oldest.ticket)
    }

    pub(super) fn push(
        &mut self,
        key: QueueKey,
        claim: Claim,
        request: WaitingRoute,
        rules: Rules,
        now: Time,
    ) {
        let ticket = request.ticket;
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, ticket));
        }
        let num_waiting = self.num_by_tenant.entry(Arc::clone(&claim.tenant));
        *num_waiting.or_default() += 1;
        if request.may_be_displaced {
            self.displaceable[claim.class as usize].insert(ticket);
        }
        let queue = self.queue_mut(&key, rules);
        if queue.requests.len() == 0 {
            queue.since = now;
        }
        let arrival = queue.requests.push(claim, request);
        self.tickets.insert(ticket, Spot { key, arrival });
    }

    /// Takes out a request: one that was served at a time and for a charge, or one whose wait ended otherwise.
    pub(super) fn take(
        &mut self,
        key: &QueueKey,
        arrival: u64,
        served: Option<(Time, u64)>,
    ) -> Option<WaitingRoute> {
        let queue = self.queues.get_mut(key)?;
        let request = match served {
            Some((now, charge)) => {
                queue.pace.sample(1, now - queue.since);
                queue.since = now;
                queue.requests.serve(arrival, charge)?
            }
            None => queue.requests.remove(arrival)?,
        };
        queue.hold = queue.hold.filter(|hold| hold.arrival != arrival);
        self.tickets.remove(&request.ticket);
        self.displaceable[request.class as usize].remove(&request.ticket);
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, request.ticket));
        }
        if let Some(num_waiting) = self.num_by_tenant.get_mut(&request.tenant) {
            *num_waiting -= 1;
            if *num_waiting == 0 {
                self.num_by_tenant.remove(&request.tenant);
            }
        }
        Some(request)
    }

    pub(super) fn remove(&mut self, ticket: TicketId) -> bool {
        let spot = self.tickets.get(&ticket).cloned();
        spot.is_some_and(|spot| self.take(&spot.key, spot.arrival, None).is_some())
    }

    /// The first deadline of a waiting request.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Takes out a request whose deadline has passed.
    pub(super) fn pop_late(&mut self, now: Time) -> Option<TicketId> {
        let &(deadline, ticket) = self.deadlines.first()?;
        (deadline <= now && self.remove(ticket)).then_some(ticket)
    }

    /// Forgets what was served where nobody waits and the model is gone.
    pub(super) fn forget_model(&mut self, model: &str) {
        self.queues
            .retain(|key, queue| &*key.model != model || queue.requests.len() > 0);
    }

    /// # Panics
    /// If queues, tickets, deadlines and counts do not agree.
    pub(super) fn check_integrity(&self) {
        let mut num_waiting = 0;
        for queue in self.queues.values() {
            queue.requests.check_integrity();
            num_waiting += queue.requests.len();
            let holder = queue.hold.map(|hold| hold.arrival);
            assert!(
                holder.is_none_or(|arrival| queue.requests.get(arrival).is_some()),
                "a worker is held for nobody"
            );
        }
        assert_eq!(num_waiting, self.tickets.len(), "tickets");
        let num_by_tenant: u32 = self.num_by_tenant.values().sum();
        assert_eq!(num_waiting, num_by_tenant as usize, "requests by tenant");
        let mut num_deadlines = 0;
        for (ticket, Spot { key, arrival }) in &self.tickets {
            let queue = self.queues.get(key);
            let request = queue.and_then(|queue| queue.requests.get(*arrival));
            assert_eq!(request.map(|request| request.ticket), Some(*ticket));
            num_deadlines += usize::from(request.is_some_and(|it| it.deadline.is_some()));
        }
        assert_eq!(num_deadlines, self.deadlines.len(), "deadlines");
        for (class, tickets) in AdmissionClass::ALL.into_iter().zip(&self.displaceable) {
            let is_displaceable = |ticket: &TicketId| {
                let spot = &self.tickets[ticket];
                let request = self.queues[&spot.key].requests.get(spot.arrival);
                request.is_some_and(|it| it.class == class && it.may_be_displaced)
            };
            let due = self.tickets.keys().filter(|&it| is_displaceable(it));
            assert!(
                due.clone().all(|ticket| tickets.contains(ticket)),
                "{class:?}"
            );
            assert_eq!(due.count(), tickets.len(), "{class:?}");
        }
    }
}

impl WaitingRoute {
    pub(super) fn new(request: &RouteRequest<'_>, ticket: TicketId) -> Self {
        Self {
            ticket,
            tenant: request.tenant.into(),
            class: request.class,
            may_be_displaced: true,
            deadline: request.deadline,
            token_ids: request.token_ids.to_vec(),
            max_tokens: request.max_tokens,
            booked_tokens: request.booked_tokens,
            salt: request.salt.to_owned(),
            lora: request.lora.map(|lora| (lora.id.to_owned(), lora.version)),
            weights_epoch: request.weights_epoch,
            slo_class: request.slo_class.to_owned(),
            tolerations: request
                .tolerations
                .iter()
                .map(ToString::to_string)
                .collect(),
            exclude: request.exclude.to_vec(),
            session_key: request.session_key.to_owned(),
            hashed: request.hashed.map(|hashed| Hashed {
                seed: hashed.seed,
                block_size: hashed.block_size,
                blocks: hashed.blocks.to_vec(),
            }),
        }
    }

    pub(super) fn tolerations(&self) -> Vec<&str> {
        self.tolerations.iter().map(String::as_str).collect()
    }

    pub(super) fn as_request<'a>(
        &'a self,
        model: &'a str,
        tolerations: &'a [&'a str],
    ) -> RouteRequest<'a> {
        let lora = self.lora.as_ref();
        let hashed = self.hashed.as_ref();
        RouteRequest {
            model,
            token_ids: &self.token_ids,
            max_tokens: self.max_tokens,
            booked_tokens: self.booked_tokens,
            salt: &self.salt,
            lora: lora.map(|(id, version)| Lora {
                id,
                version: *version,
            }),
            weights_epoch: self.weights_epoch,
            slo_class: &self.slo_class,
            tolerations,
            exclude: &self.exclude,
            session_key: &self.session_key,
            tenant: &self.tenant,
            queue_limit: None,
            class: self.class,
            deadline: self.deadline,
            hashed: hashed.map(|hashed| HashedPrompt {
                seed: hashed.seed,
                block_size: hashed.block_size,
                blocks: &hashed.blocks,
            }),
        }
    }
}
