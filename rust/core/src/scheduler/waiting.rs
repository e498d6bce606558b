//! Waiting for room, first come first served.
//!
//! Requests for one model wait in one queue, gangs in another. A queue is served strictly in order: a small request
//! does not overtake a large one at the head, so nothing starves. Waiting helps against a lack of room (all batches
//! full, all workers draining, no GPU memory free); what no registered worker or GPU could ever take is refused at
//! once, or when its turn comes where it became impossible meanwhile.

use std::{collections::BTreeMap, mem};

use super::{
    Scheduler,
    error::SchedulerError,
    loras::Lora,
    place::{PlaceRequest, Placement},
    reservation::Reservation,
    route::RouteRequest,
    worker::WorkerId,
};
use crate::{ids::TokenId, time::Time};

/// Names a waiting request. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketId(u64);

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

/// An owned [`RouteRequest`].
#[derive(Clone, Debug)]
struct WaitingRoute {
    token_ids: Vec<TokenId>,
    max_tokens: u32,
    salt: String,
    lora: Option<(String, u64)>,
    weights_epoch: Option<u64>,
    slo_class: String,
    tolerations: Vec<String>,
    exclude: Vec<WorkerId>,
    session_key: String,
}

/// All waiting requests. Tickets count up, so a map by ticket is a queue.
#[derive(Debug, Default)]
pub(super) struct WaitQueues {
    /// By model; no queue is empty.
    routes: BTreeMap<String, BTreeMap<TicketId, WaitingRoute>>,
    num_routes: usize,
    places: BTreeMap<TicketId, PlaceRequest>,
    num_tickets: u64,
}

impl WaitQueues {
    fn next_ticket(&mut self) -> TicketId {
        self.num_tickets += 1;
        TicketId(self.num_tickets)
    }

    /// Requests that wait for a worker, and gangs that wait for GPUs.
    pub(super) fn lengths(&self) -> (usize, usize) {
        (self.num_routes, self.places.len())
    }

    pub(super) fn check_integrity(&self) {
        assert!(
            self.routes.values().all(|queue| !queue.is_empty()),
            "an empty queue is kept"
        );
        assert_eq!(
            self.routes.values().map(BTreeMap::len).sum::<usize>(),
            self.num_routes
        );
    }
}

impl WaitingRoute {
    fn new(request: &RouteRequest<'_>) -> Self {
        Self {
            token_ids: request.token_ids.to_vec(),
            max_tokens: request.max_tokens,
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
        }
    }

    fn tolerations(&self) -> Vec<&str> {
        self.tolerations.iter().map(String::as_str).collect()
    }

    fn as_request<'a>(&'a self, model: &'a str, tolerations: &'a [&'a str]) -> RouteRequest<'a> {
        let lora = self.lora.as_ref();
        RouteRequest {
            model,
            token_ids: &self.token_ids,
            max_tokens: self.max_tokens,
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
            hashed: None,
        }
    }
}

impl Scheduler {
    /// A worker that has room for the request now, or a ticket to wait for one.
    ///
    /// Unlike [`route`](Self::route), which places at once on the best worker and leaves the waiting to it.
    pub fn acquire(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Wait<Reservation>, SchedulerError> {
        if self.waiting.routes.contains_key(request.model) {
            // Taking room now would be overtaking, but what cannot be need not wait to hear it.
            unless_waiting_helps(self.choose(request).map(Some))?;
        } else if let Some(reservation) = self.try_route(request, now)? {
            return Ok(Wait::Granted(reservation));
        }
        self.check_queue(self.waiting.num_routes)?;
        let ticket = self.waiting.next_ticket();
        let queue = self
            .waiting
            .routes
            .entry(request.model.to_owned())
            .or_default();
        queue.insert(ticket, WaitingRoute::new(request));
        self.waiting.num_routes += 1;
        Ok(Wait::Waiting(ticket))
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
        self.check_queue(self.waiting.places.len())?;
        let ticket = self.waiting.next_ticket();
        self.waiting.places.insert(ticket, *request);
        Ok(Wait::Waiting(ticket))
    }

    /// Ends a wait without an outcome. `false` where it has ended already. Those behind may be served now.
    pub fn cancel(&mut self, ticket: TicketId) -> bool {
        if self.waiting.places.remove(&ticket).is_some() {
            return true;
        }
        let mut queues = self.waiting.routes.iter();
        let model = queues.find_map(|(model, queue)| queue.contains_key(&ticket).then_some(model));
        let Some(model) = model.cloned() else {
            return false;
        };
        if let Some(queue) = self.waiting.routes.get_mut(&model) {
            queue.remove(&ticket);
            self.waiting.num_routes -= 1;
            if queue.is_empty() {
                self.waiting.routes.remove(&model);
            }
        }
        true
    }

    /// Serves the queues as far as there is room. To be called after anything that may have made room: a release, a
    /// load report, a KV event, a new worker or GPU, the end of a drain, a cancelled wait.
    pub fn take_grants(&mut self, now: Time) -> Vec<Grant> {
        if self.waiting.lengths() == (0, 0) {
            return Vec::new();
        }
        let mut waiting = mem::take(&mut self.waiting);
        let mut grants = Vec::new();
        for (model, queue) in &mut waiting.routes {
            while let Some(head) = queue.first_entry() {
                let tolerations = head.get().tolerations();
                let outcome = self.try_route(&head.get().as_request(model, &tolerations), now);
                let Some(outcome) = outcome.transpose() else {
                    break;
                };
                let (ticket, _) = head.remove_entry();
                grants.push(Grant {
                    ticket,
                    outcome: outcome.map(Granted::Reservation),
                });
            }
        }
        waiting.routes.retain(|_, queue| !queue.is_empty());
        waiting.num_routes = waiting.routes.values().map(BTreeMap::len).sum();
        while let Some(head) = waiting.places.first_entry() {
            let outcome = unless_waiting_helps(self.place(head.get()).map(Some));
            let Some(outcome) = outcome.transpose() else {
                break;
            };
            let (ticket, _) = head.remove_entry();
            grants.push(Grant {
                ticket,
                outcome: outcome.map(Granted::Placement),
            });
        }
        self.waiting = waiting;
        grants
    }

    /// Places the request where there is room now; `None` where waiting may help.
    fn try_route(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Option<Reservation>, SchedulerError> {
        let outcome = match self.choose(request) {
            Ok(best) if best.has_room => self.reserve(request, best, now).map(Some),
            Ok(_) => Ok(None),
            Err(error) => Err(error),
        };
        unless_waiting_helps(outcome)
    }

    fn check_queue(&self, length: usize) -> Result<(), SchedulerError> {
        let limit = self.config.max_num_waiting;
        if length >= limit as usize {
            let kind = "waiting requests";
            return Err(SchedulerError::LimitReached {
                kind,
                current: limit,
                limit,
            });
        }
        Ok(())
    }
}

/// Turns a refusal that time may cure into `None`.
fn unless_waiting_helps<T>(
    outcome: Result<Option<T>, SchedulerError>,
) -> Result<Option<T>, SchedulerError> {
    match outcome {
        Err(error) if error.code().retryable() => Ok(None),
        outcome => outcome,
    }
}
