//! The scheduler behind its lock, and the callbacks of those that wait.
//!
//! The lock is taken by threads that may hold the interpreter (an object's destructor) and by threads that do not. So
//! nothing under it may call into Python: a change returns the grants that it made possible, and [`deliver`] calls
//! back once the lock is free.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::{
    Time,
    scheduler::{
        Grant, Granted, Scheduler, SchedulerError, SchedulerStats, TicketId, WorkerSnapshot,
    },
};
use parking_lot::{Mutex, MutexGuard};
use pyo3::prelude::*;
use rustc_hash::FxHashMap;

use super::held::{HeldPlacement, HeldReservation, Placement, Reservation};
use crate::{
    errors::Failure,
    snapshot::{Snapshot, Snapshots},
};

/// One scheduler, shared by its Python object and by everything that it gave out.
pub(super) struct Shared {
    state: Mutex<State>,
    snapshots: Snapshots<Figures>,
    started: Instant,
}

/// What can be read without stopping decisions.
pub(super) struct Figures {
    pub(super) stats: SchedulerStats,
    pub(super) workers: Vec<WorkerSnapshot>,
}

/// What the lock guards.
pub(super) struct State {
    pub(super) scheduler: Scheduler,
    /// Who waits: called once, with what the wait came to.
    pub(super) callbacks: FxHashMap<TicketId, Py<PyAny>>,
    /// Snapshots taken.
    num_snapshots: u64,
}

/// What a wait came to, with who is to hear it.
pub(super) struct Outcome {
    callback: Py<PyAny>,
    result: Result<HeldGrant, SchedulerError>,
}

enum HeldGrant {
    Reservation(HeldReservation),
    Placement(HeldPlacement),
}

impl State {
    /// Serves those that wait, as far as there is room.
    pub(super) fn take_outcomes(&mut self, now: Time) -> VecDeque<Outcome> {
        let grants = self.scheduler.take_grants(now).into_iter();
        grants.filter_map(|grant| self.outcome(grant)).collect()
    }

    fn outcome(&mut self, Grant { ticket, outcome }: Grant) -> Option<Outcome> {
        // Every ticket has a callback: both come and go under one lock.
        let callback = self.callbacks.remove(&ticket)?;
        let result = outcome.map(|granted| match granted {
            Granted::Reservation(reservation) => {
                HeldGrant::Reservation(HeldReservation::new(&self.scheduler, reservation))
            }
            Granted::Placement(placement) => {
                HeldGrant::Placement(HeldPlacement::new(&self.scheduler, &placement))
            }
        });
        Some(Outcome { callback, result })
    }
}

impl Shared {
    pub(super) fn new(scheduler: Scheduler) -> Self {
        let callbacks = FxHashMap::default();
        let state = State {
            scheduler,
            callbacks,
            num_snapshots: 0,
        };
        Self {
            state: Mutex::new(state),
            snapshots: Snapshots::default(),
            started: Instant::now(),
        }
    }

    pub(super) fn now(&self) -> Time {
        Time::ZERO + self.started.elapsed()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Figures not older than `max_age`, and how old they are. Readers share them, so that at most one of them in that
    /// time keeps decisions waiting.
    pub(super) fn figures(&self, max_age: Duration) -> (Arc<Snapshot<Figures>>, Duration) {
        let now = self.now();
        let snapshot = self.snapshots.read(now, max_age, || {
            let mut state = self.lock();
            state.num_snapshots += 1;
            let workers = state.scheduler.workers();
            let workers = workers.map(|(_, worker)| worker).collect();
            let stats = state.scheduler.stats(now);
            Snapshot {
                number: state.num_snapshots,
                taken_at: now,
                value: Figures { stats, workers },
            }
        });
        let age = now.0.saturating_sub(snapshot.taken_at.0);
        (snapshot, Duration::from_micros(age))
    }

    /// Makes a change, without the interpreter, and serves those that waited for it.
    pub(super) fn change<R: Send>(
        self: &Arc<Self>,
        py: Python<'_>,
        change: impl FnOnce(&mut State) -> R + Send,
    ) -> R {
        let now = self.now();
        let (result, outcomes) = py.detach(|| {
            let mut state = self.lock();
            let result = change(&mut state);
            (result, state.take_outcomes(now))
        });
        self.deliver(py, outcomes);
        result
    }

    /// Tells those that waited. What nobody takes (their event loop is closed) is given back, and may serve others.
    pub(super) fn deliver(self: &Arc<Self>, py: Python<'_>, mut outcomes: VecDeque<Outcome>) {
        while let Some(Outcome { callback, result }) = outcomes.pop_front() {
            let told = match result {
                Ok(HeldGrant::Reservation(held)) => {
                    let reservation = Py::new(py, Reservation::new(self, held));
                    reservation.and_then(|reservation| {
                        let told = callback.call1(py, (&reservation,));
                        told.inspect_err(|_| outcomes.extend(reservation.get().take_back()))
                    })
                }
                Ok(HeldGrant::Placement(held)) => {
                    let placement = Placement::new(py, self, held);
                    let placement = placement.and_then(|placement| Py::new(py, placement));
                    placement.and_then(|placement| {
                        let told = callback.call1(py, (&placement,));
                        told.inspect_err(|_| outcomes.extend(placement.get().take_back()))
                    })
                }
                Err(error) => callback.call1(py, (Failure::from(error).into_exception(py),)),
            };
            if let Err(error) = told {
                error.write_unraisable(py, Some(callback.bind(py)));
            }
        }
    }
}
