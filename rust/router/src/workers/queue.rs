//! Admission of requests to workers: room on one and a seat for the request, or a wait for both in the core's queue.
//!
//! ```text
//! acquire ── room ──────────→ Admitted: Reserved on a worker, and the request's Seat
//!         └─ none → Waiting ─→ the same, or why not; dropped, it leaves the queue at once
//! ```
//!
//! Nothing here knows what a worker is or what runs on it. Who asks names in a [`RouteRequest`] the model, what to look
//! up in the prefix index (token ids, or the `hashed` blocks of whatever the prompt consists of), how much output must fit
//! (`max_tokens`) and for how much room is kept (`booked_tokens`, by default what the model's outputs usually come to),
//! and whose request it is: tenant, class and deadline. What comes back is a [`WorkerId`] and two values that give
//! everything back when they drop. The holder tells [`Reserved`] when the prompt is computed and how many tokens came, and
//! [`Workers::output_ended`] how long an output was that ended by itself: from that the core learns speeds and lengths.
//!
//! One request has one seat. Its further sequences, and those that continue it after a worker was lost, are placed by
//! [`Workers::accompany`]: at once and before the queue, so they need not wait for others and nobody waits for half of
//! what it needs.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use orchestra_core::{
    Time,
    scheduler::{
        AdmissionClass, Fetch, Granted, Reservation, ReservationId, RouteRequest, Scheduler,
        SchedulerError, TicketId, Wait, WorkerId,
    },
};
use tokio::{
    sync::oneshot,
    time::{self, Instant},
};

use super::{
    Pool, Workers,
    stopping::{Stop, Stoppable},
};
use crate::tenants::{self, Tenants};

/// What a request got, or why it got nothing.
pub(crate) type Outcome = Result<Admitted, SchedulerError>;

/// How the core is asked.
type Acquire =
    fn(&mut Scheduler, &RouteRequest<'_>, Time) -> Result<Wait<Reservation>, SchedulerError>;

/// A request that may start: room for its first sequence, and its seat.
pub(crate) struct Admitted {
    pub(crate) reserved: Reserved,
    pub(crate) seat: Seat,
}

/// One of the seats for running requests, left on drop.
pub(crate) struct Seat {
    workers: Arc<Workers>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.workers.change(|pool| pool.scheduler.leave_seat());
    }
}

/// Room on a worker, given back on drop.
pub(crate) struct Reserved {
    workers: Arc<Workers>,
    id: ReservationId,
    worker: WorkerId,
    predicted_cached_tokens: u32,
    num_output_tokens: u32,
    to_move: Option<ToMove>,
}

/// KV that is to come to the worker from another one.
pub(crate) struct ToMove {
    pub(crate) from: MoveFrom,
    /// How long the worker waits for it.
    pub(crate) wait: Duration,
}

/// Where it comes from.
pub(crate) enum MoveFrom {
    /// From who holds it.
    Fetch(Fetch),
    /// From who is to compute so many blocks of the prompt, with the room for that.
    Prefill(Box<Reserved>, u32),
}

impl Reserved {
    fn new(workers: &Arc<Workers>, reservation: &Reservation) -> Self {
        let on = |id, worker| Self {
            workers: Arc::clone(workers),
            id,
            worker,
            predicted_cached_tokens: 0,
            num_output_tokens: 0,
            to_move: None,
        };
        let prefill = reservation.prefill.map(|part| {
            let helper = Box::new(on(part.id, part.worker));
            MoveFrom::Prefill(helper, part.num_blocks)
        });
        let mut reserved = on(reservation.id, reservation.worker);
        reserved.predicted_cached_tokens = reservation.num_cached_tokens;
        let from = prefill.or(reservation.fetch.map(MoveFrom::Fetch));
        reserved.to_move = from.map(|from| ToMove {
            from,
            wait: reservation.move_wait,
        });
        reserved
    }

    /// What is to come from another worker, to be told once.
    pub(crate) const fn take_moves(&mut self) -> Option<ToMove> {
        self.to_move.take()
    }

    pub(crate) const fn worker(&self) -> WorkerId {
        self.worker
    }

    /// Prompt tokens whose KV the worker should hold.
    pub(crate) const fn predicted_cached_tokens(&self) -> u32 {
        self.predicted_cached_tokens
    }

    /// Says when the prompt is computed: its tokens no longer queue on the worker then.
    pub(crate) fn prefill(&self) -> Prefill {
        Prefill {
            workers: Arc::clone(&self.workers),
            id: self.id,
            fetched: None,
        }
    }

    /// What holds the room may be stopped for a more urgent request, until it drops.
    pub(crate) fn offer(&self, stoppable: Stoppable) {
        let mut pool = self.workers.pool.lock();
        pool.stoppable.insert(self.id, stoppable);
    }

    /// It may not be stopped any more.
    pub(crate) fn withdraw(&self) {
        self.workers.pool.lock().stoppable.remove(&self.id);
    }

    /// So many tokens came while the room was held; the tenant is charged for these instead of `max_tokens`.
    pub(crate) const fn set_num_output_tokens(&mut self, count: u32) {
        self.num_output_tokens = count;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.workers.change(|pool| {
            pool.stoppable.remove(&self.id);
            pool.scheduler.finish(self.id, self.num_output_tokens)
        });
    }
}

/// The prompt of a reservation.
pub(crate) struct Prefill {
    workers: Arc<Workers>,
    id: ReservationId,
    /// Tokens that came by a fetch, where one was to be made.
    fetched: Option<u32>,
}

impl Prefill {
    /// The same where the worker was to fetch a part: KV of so many tokens came.
    pub(crate) fn with_fetched(self, num_tokens: Option<u32>) -> Self {
        Self {
            fetched: num_tokens,
            ..self
        }
    }

    /// It is computed. Room may have been made, so this is not to be called under a lock.
    pub(crate) fn done(&self) {
        let now = self.workers.clock.now();
        self.workers.change(|pool| {
            if let Some(num_tokens) = self.fetched {
                pool.scheduler.fetch_done(self.id, num_tokens, now);
            }
            pool.scheduler.prefill_done(self.id, now)
        });
    }
}

/// A request that came to the queue.
pub(crate) enum Entered {
    Admitted(Admitted),
    Waiting(Waiting),
}

/// A request in the queue. Dropping it leaves the queue at once; what was granted meanwhile is given back.
pub(crate) struct Waiting {
    workers: Arc<Workers>,
    ticket: TicketId,
    outcome: oneshot::Receiver<Outcome>,
}

impl Future for Waiting {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        // The other end goes without a word only with the queue itself.
        let gone = |_| Err(SchedulerError::NoWorkers { registered: 0 });
        Pin::new(&mut self.outcome)
            .poll(cx)
            .map(|outcome| outcome.unwrap_or_else(gone))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.workers.change(|pool| {
            if pool.waiting.remove(&self.ticket).is_some() {
                pool.scheduler.cancel(self.ticket);
            }
        });
    }
}

impl Workers {
    /// Waits for a seat, and for a worker with room for the request's first sequence, at most until the instant.
    ///
    /// Each wait has its own timer, since whoever waits is polled anyway; the core's deadlines end it as well, where
    /// something else happens first.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        request: &RouteRequest<'_>,
        until: Instant,
    ) -> Outcome {
        let waiting = match self.enter(request, Scheduler::acquire)? {
            Entered::Admitted(admitted) => return Ok(admitted),
            Entered::Waiting(waiting) => waiting,
        };
        tokio::select! {
            biased;
            outcome = waiting => outcome,
            () = time::sleep_until(until) => Err(SchedulerError::DeadlineExceeded),
        }
    }

    /// Back to the queue with a request that was stopped. It is not refused, however many wait.
    pub(crate) fn rejoin(
        self: &Arc<Self>,
        request: &RouteRequest<'_>,
    ) -> Result<Entered, SchedulerError> {
        self.enter(request, Scheduler::reacquire)
    }

    fn enter(
        self: &Arc<Self>,
        request: &RouteRequest<'_>,
        acquire: Acquire,
    ) -> Result<Entered, SchedulerError> {
        let mut pool = self.pool.lock();
        // Waiting may be in vain; whoever asks elsewhere, or again, fares better.
        if !pool.scheduler.has_open_worker(request.model) {
            return Err(SchedulerError::NoWorkers { registered: 0 });
        }
        let request = pool.booked(request);
        let entered = match acquire(&mut pool.scheduler, &request, self.clock.now())? {
            Wait::Granted(reservation) => Entered::Admitted(self.admitted(&reservation)),
            Wait::Waiting(ticket) => {
                let (sender, outcome) = oneshot::channel();
                pool.waiting.insert(ticket, sender);
                Entered::Waiting(Waiting {
                    workers: Arc::clone(self),
                    ticket,
                    outcome,
                })
            }
        };
        // One that waits behind others may be the first to find room.
        let served = self.serve(&mut pool);
        drop(pool);
        served.deliver();
        Ok(entered)
    }

    /// Room for one more sequence of a request that has a seat, before all that wait: on the best worker, also where
    /// that is full and has to queue it.
    pub(crate) fn accompany(
        self: &Arc<Self>,
        request: &RouteRequest<'_>,
    ) -> Result<Reserved, SchedulerError> {
        let mut pool = self.pool.lock();
        let request = pool.booked(request);
        let reservation = pool.scheduler.accompany(&request, self.clock.now())?;
        Ok(Reserved::new(self, &reservation))
    }

    /// Refuses what [`Self::acquire`] would refuse now because too many wait. Costs next to nothing, so it comes before
    /// work on the request.
    pub(crate) fn check_queue(
        &self,
        model: &str,
        class: AdmissionClass,
    ) -> Result<(), SchedulerError> {
        self.pool.lock().scheduler.check_queue(model, class)
    }

    /// How long those that wait for the model now will wait, where that can be said.
    pub(crate) fn queue_wait(&self, model: &str) -> Option<Duration> {
        self.pool.lock().scheduler.queue_wait(model)
    }

    /// An output of the model ended by itself after so many tokens.
    pub(crate) fn output_ended(&self, model: &str, num_output_tokens: u32) {
        let mut pool = self.pool.lock();
        pool.scheduler.output_ended(model, num_output_tokens);
    }

    /// Tenants that were configured get the weights that they have now.
    pub(crate) fn set_tenant_weights(&self, old: &Tenants, new: &Tenants) {
        let mut pool = self.pool.lock();
        let forgotten = old.iter().map(|tenant| (&tenant.name, tenants::WEIGHT));
        let weights = new.iter().map(|tenant| (&tenant.name, tenant.weight));
        for (name, weight) in forgotten.chain(weights) {
            if let Err(error) = pool.scheduler.set_tenant_weight(name, weight) {
                // Names, weights and their number were checked when they were read.
                tracing::error!(%error, "a tenant's weight cannot be set");
            }
        }
    }

    /// Looks again at who waits: there may be somebody now who can stop for them.
    pub(crate) fn reconsider(self: &Arc<Self>) {
        self.change(|_| ());
    }

    /// Changes the pool, then gives out the room that this may have made.
    pub(super) fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut Pool) -> T) -> T {
        let mut pool = self.pool.lock();
        let result = change(&mut pool);
        let served = self.serve(&mut pool);
        drop(pool);
        served.deliver();
        result
    }

    /// Takes the grants that are due, to be delivered once the lock is free: what nobody wants any more takes it again.
    fn serve(self: &Arc<Self>, pool: &mut Pool) -> Served {
        let now = self.clock.now();
        let mut grants = pool.scheduler.take_grants(now);
        let stopped = pool.preempt(&mut grants, now);
        let outcomes = grants.into_iter().filter_map(|grant| {
            let outcome = match grant.outcome {
                Ok(Granted::Reservation(reservation)) => Ok(self.admitted(&reservation)),
                // Nobody asks this scheduler for GPUs.
                Ok(Granted::Placement(_)) => return None,
                Err(error) => Err(error),
            };
            Some((pool.waiting.remove(&grant.ticket), outcome))
        });
        Served {
            stopped,
            outcomes: outcomes.collect(),
        }
    }

    fn admitted(self: &Arc<Self>, reservation: &Reservation) -> Admitted {
        Admitted {
            reserved: Reserved::new(self, reservation),
            seat: Seat {
                workers: Arc::clone(self),
            },
        }
    }
}

impl Pool {
    /// The request with what its model's outputs usually come to, where it does not say itself what to book.
    fn booked<'a>(&self, request: &RouteRequest<'a>) -> RouteRequest<'a> {
        let expected = self
            .scheduler
            .expected_output(request.model, request.max_tokens);
        RouteRequest {
            booked_tokens: request.booked_tokens.or(Some(expected)),
            ..*request
        }
    }
}

/// What was decided and is to be done.
#[must_use]
struct Served {
    /// Who has to stop.
    stopped: Vec<Arc<dyn Stop>>,
    /// Ends of waits, and who hears of each.
    outcomes: Vec<(Option<oneshot::Sender<Outcome>>, Outcome)>,
}

impl Served {
    fn deliver(self) {
        // First: a worker hears of the end before it hears of what takes the place.
        for work in self.stopped {
            work.stop();
        }
        for (waiting, outcome) in self.outcomes {
            // Where the other side left in this moment, what it was granted drops here and is given back.
            if let Some(waiting) = waiting {
                let _ = waiting.send(outcome);
            }
        }
    }
}
