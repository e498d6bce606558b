//! Giving room to those that wait.
//!
//! A queue's requests are tried in order of their turns. Where the next one finds no room, others go on at other
//! workers: up to 16 are looked at, as long as any worker has a place in its batch. Before one of them goes first, the
//! worker that the next one would have gone to is *held* for it: that worker takes nobody else of the model's waiting
//! requests, so at the latest when all that runs there has ended there is room. So a large request holds up no more
//! than one worker, and does not starve. Where the model's workers are of several kinds the hold is made at once,
//! because requests of another queue could go first unseen. There is one hold to a queue; it stays until its request has
//! left, also where the turn of another comes first. A request that finds no open worker at all (all drain) holds nothing
//! and nobody up.
//!
//! *Starvation.* Let `N = max_overtakes + max_bypasses + 1`. At most `N` later requests of its queue are served before
//! any request that some open worker could take. Proof: let `n` be how often the oldest of them has been overtaken, at
//! least as often as any. While `n < max_overtakes + max_bypasses` whoever is served raises nobody's count above that
//! sum. After that only two are served: the oldest, which is later than nobody, and the one that the held worker is
//! held for. There is at most one such later request: the hold stays until that one leaves, and the next hold is for
//! the oldest.

use std::{collections::BTreeSet, mem, sync::Arc};

use super::{
    Scheduler,
    error::SchedulerError,
    reservation::Reservation,
    route::{Candidate, RouteRequest},
    wait_queues::{Hold, QueueKey, RouteQueue, WaitQueues, WaitingRoute},
    waiting::{Grant, Granted, TicketId, unless_waiting_helps},
    worker::WorkerId,
};
use crate::time::Time;

/// So many requests of a queue are looked at in the order of their turns, until one has room.
const LOOKAHEAD: usize = 16;
/// So many overdue ones are looked at before that.
const OVERDUE_LOOKAHEAD: usize = 8;

/// What came of looking for room for a waiting request.
enum Attempt {
    Granted(Reservation),
    /// It never will be.
    Ended(SchedulerError),
    /// No room now; where it would go.
    NoRoom(Option<WorkerId>),
    /// No worker takes it now.
    NoWorker,
}

/// What a look through a queue came to.
struct Scan {
    hold: Option<Hold>,
    /// The hold if somebody went first.
    next: Option<Hold>,
    /// Who left the queue, and how.
    end: Option<(u64, Result<Reservation, SchedulerError>)>,
}

impl RouteQueue {
    /// Whom to try, in this order, and how often overdue ones were overtaken. Some come twice.
    fn candidates(&self, hold: Option<Hold>) -> impl Iterator<Item = (u64, Option<u64>)> {
        let overdue = self.requests.overdue().take(OVERDUE_LOOKAHEAD);
        let overdue = overdue.map(|(arrival, overtakes)| (arrival, Some(overtakes)));
        let in_order = self.requests.in_order().take(LOOKAHEAD);
        let holder = hold.into_iter().map(|hold| hold.arrival);
        overdue.chain(in_order.chain(holder).map(|arrival| (arrival, None)))
    }
}

impl Scheduler {
    /// Serves the queues as far as there is room, and ends waits whose deadline has passed and those that were displaced.
    /// To be called after anything that may have made room (a release, a free seat, a load report, a KV event, a new
    /// worker or GPU, the end of a drain, a cancelled wait), after a wait began, and at
    /// [`next_deadline`](Self::next_deadline).
    ///
    /// O(log n) for each request that leaves, besides its decision, and up to 25 decisions for each queue that is
    /// blocked.
    pub fn take_grants(&mut self, now: Time) -> Vec<Grant> {
        if self.waiting.is_quiet() {
            return Vec::new();
        }
        let mut waiting = mem::take(&mut self.waiting);
        let mut grants = mem::take(&mut waiting.displaced);
        while let Some(ticket) = waiting.pop_late(now) {
            let outcome = Err(SchedulerError::DeadlineExceeded);
            grants.push(Grant { ticket, outcome });
        }
        self.serve_routes(&mut waiting, now, &mut grants);
        self.serve_places(&mut waiting, &mut grants);
        self.waiting = waiting;
        grants
    }

    fn serve_routes(&mut self, waiting: &mut WaitQueues, now: Time, grants: &mut Vec<Grant>) {
        // By the oldest request of each queue.
        let mut agenda: BTreeSet<(TicketId, QueueKey)> = BTreeSet::new();
        let turn = |(key, queue): (&QueueKey, &RouteQueue)| {
            let oldest = queue.requests.oldest()?;
            Some((oldest.ticket, key.clone()))
        };
        agenda.extend(waiting.queues.iter().filter_map(turn));
        while self.seats.is_free()
            && let Some((_, key)) = agenda.pop_first()
        {
            let hold = |waiting: &WaitQueues| waiting.queues.get(&key)?.hold;
            let was_held = hold(waiting).is_some();
            let Some(grant) = self.serve_next(waiting, &key, now) else {
                continue;
            };
            grants.push(grant);
            if was_held && hold(waiting).is_none() {
                // What was kept for it is free for the model's other queues too.
                agenda.extend(waiting.of_model(&key.model).filter_map(turn));
            }
            if let Some(oldest) = waiting.oldest(&key) {
                agenda.insert((oldest, key));
            } else if self.groups.model(&key.model).is_none() {
                waiting.forget_model(&key.model);
            }
        }
    }

    fn serve_places(&mut self, waiting: &mut WaitQueues, grants: &mut Vec<Grant>) {
        while let Some(head) = waiting.places.first_entry() {
            let outcome = unless_waiting_helps(self.place(head.get()).map(Some));
            let Some(outcome) = outcome.transpose() else {
                return;
            };
            let (ticket, _) = head.remove_entry();
            grants.push(Grant {
                ticket,
                outcome: outcome.map(Granted::Placement),
            });
        }
    }

    /// Ends one wait of a queue, if one can be ended.
    fn serve_next(&mut self, waiting: &mut WaitQueues, key: &QueueKey, now: Time) -> Option<Grant> {
        let held = waiting.held_by_others(key);
        let model = self.groups.model(&key.model);
        let is_alone = model.is_none_or(|model| model.groups.len() == 1);
        let queue = waiting.queues.get(key)?;
        let Scan { hold, next, end } = self.scan(queue, key, &held, now);
        // Those of other kinds do not ask who was there first.
        let hold = if is_alone || end.is_some() {
            hold
        } else {
            next
        };
        waiting.queues.get_mut(key)?.hold = hold;
        let (arrival, outcome) = end?;
        let outcome = match outcome {
            Ok(reservation) => {
                let request = waiting.queues.get(key)?.requests.get(arrival)?;
                let tolerations = request.tolerations();
                let tenant = Arc::clone(&request.tenant);
                let request = request.as_request(&key.model, &tolerations);
                let charge = self.record_charge(&request, &tenant, key, &reservation);
                self.seats.take();
                let ticket = waiting.take(key, arrival, Some((now, charge)))?.ticket;
                (ticket, Ok(Granted::Reservation(reservation)))
            }
            Err(error) => (waiting.take(key, arrival, None)?.ticket, Err(error)),
        };
        let (ticket, outcome) = outcome;
        Some(Grant { ticket, outcome })
    }

    /// Finds the first whose wait can be ended; reserves for it.
    fn scan(&mut self, queue: &RouteQueue, key: &QueueKey, held: &[WorkerId], now: Time) -> Scan {
        let is_open = |id| {
            let worker = self.workers.get(id);
            worker.is_some_and(|worker| !worker.is_draining)
        };
        let hold = queue.hold.filter(|hold| is_open(hold.worker));
        let strict_from = self.rules.max_overtakes + u64::from(self.config.max_bypasses);
        let mut tried = Vec::new();
        // Of the first that found no room: whether all must wait for it, and the hold if somebody goes first.
        let mut blocked: Option<(bool, Option<Hold>)> = None;
        let mut may_survey = true;
        for (arrival, overtakes) in queue.candidates(hold) {
            let Some(request) = queue.requests.get(arrival) else {
                continue;
            };
            if tried.contains(&arrival) {
                continue;
            }
            tried.push(arrival);
            let hold = blocked.map_or(hold, |(_, hold)| hold);
            let is_holder = hold.is_some_and(|hold| hold.arrival == arrival);
            let own_hold = hold.filter(|_| !is_holder).map(|hold| hold.worker);
            let held: Vec<WorkerId> = held.iter().copied().chain(own_hold).collect();
            if let Some((is_strict, _)) = blocked
                && !is_holder
                && (is_strict || !self.has_place(key, &held))
            {
                continue;
            }
            let attempt = if blocked.is_some() && !is_holder {
                self.attempt_beside(request, key, &held, now)
            } else {
                self.attempt(request, key, &held, may_survey, now)
            };
            match attempt {
                Attempt::Granted(reservation) => {
                    let end = Some((arrival, Ok(reservation)));
                    return Scan {
                        hold,
                        next: hold,
                        end,
                    };
                }
                Attempt::Ended(error) => {
                    let end = Some((arrival, Err(error)));
                    return Scan {
                        hold,
                        next: hold,
                        end,
                    };
                }
                Attempt::NoRoom(worker) => {
                    let is_strict = overtakes.is_some_and(|overtakes| overtakes >= strict_from);
                    let new = worker.map(|worker| Hold { arrival, worker });
                    blocked.get_or_insert((is_strict, hold.or(new)));
                }
                Attempt::NoWorker => may_survey = false,
            }
        }
        Scan {
            hold,
            next: blocked.map_or(hold, |(_, hold)| hold),
            end: None,
        }
    }

    /// Looks for room beside the held workers, and reserves it.
    fn attempt(
        &mut self,
        request: &WaitingRoute,
        key: &QueueKey,
        held: &[WorkerId],
        may_survey: bool,
        now: Time,
    ) -> Attempt {
        let tolerations = request.tolerations();
        let request = request.as_request(&key.model, &tolerations);
        let best = match self.find(&request) {
            // Whether any worker ever could is asked of one request only: it means judging all workers.
            Ok(None) if may_survey => self.choose(&request),
            Ok(None) => return Attempt::NoWorker,
            Ok(Some(best)) => Ok(best),
            Err(error) => Err(error),
        };
        let best = match best {
            Ok(best) => best,
            Err(error) if error.code().retryable() => return Attempt::NoWorker,
            Err(error) => return Attempt::Ended(error),
        };
        match self.beside(&request, best, held) {
            Some(best) if best.has_room => {
                let reserved = self.reserve(&request, best, now);
                // All that can fail is the limit of reservations.
                reserved.map_or(Attempt::NoRoom(None), Attempt::Granted)
            }
            other => Attempt::NoRoom(other.map(|best| best.worker)),
        }
    }

    /// The same for a request that would go ahead of another: only what has room counts.
    fn attempt_beside(
        &mut self,
        request: &WaitingRoute,
        key: &QueueKey,
        held: &[WorkerId],
        now: Time,
    ) -> Attempt {
        let tolerations = request.tolerations();
        let request = request.as_request(&key.model, &tolerations);
        let exclude = [request.exclude, held].concat();
        let request = RouteRequest {
            exclude: &exclude,
            ..request
        };
        let found = self.find_room(&request);
        let reserved = found.and_then(|best| self.reserve(&request, best, now).ok());
        reserved.map_or(Attempt::NoRoom(None), Attempt::Granted)
    }

    /// The best worker, or where that is held, the best of those that are not.
    pub(super) fn beside(
        &self,
        request: &RouteRequest<'_>,
        best: Candidate,
        held: &[WorkerId],
    ) -> Option<Candidate> {
        if !held.contains(&best.worker) {
            return Some(best);
        }
        let exclude = [request.exclude, held].concat();
        let request = RouteRequest {
            exclude: &exclude,
            ..*request
        };
        self.find(&request).ok().flatten()
    }

    /// Whether a worker of the model that is not held has a place in its batch.
    fn has_place(&self, key: &QueueKey, held: &[WorkerId]) -> bool {
        let model = self.groups.model(&key.model);
        let mut groups = model.into_iter().flat_map(|model| model.groups.values());
        groups.any(|&group| {
            let room = self.groups.get(group).room(0);
            let is_held = |slot: u32| held.iter().any(|id| id.slot == slot);
            room.len() > held.len() || room.iter().any(|slot| !is_held(slot))
        })
    }
}
