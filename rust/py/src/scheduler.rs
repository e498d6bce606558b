//! `orchestra_core::scheduler` for Python: workers and GPUs by name, reservations that give themselves back.

mod held;
mod register;
mod request;
mod shared;

use std::sync::Arc;

use orchestra_core::scheduler::{
    self as core, PlaceRequest, SchedulerConfig, SchedulerError, Wait,
};
use pyo3::{IntoPyObjectExt, prelude::*, types::PyDict};

use self::{
    held::{HeldPlacement, HeldReservation},
    request::{CandidateRow, IneligibleRow},
    shared::{Shared, State},
};
pub(crate) use self::{
    held::{Placement, Reservation, Ticket},
    request::RouteRequest,
};
use crate::{
    errors::Failure,
    values::{config_from, to_dict},
};

/// The settings of a scheduler, with their defaults.
#[pyfunction]
pub(crate) fn default_scheduler_config(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    to_dict(py, &SchedulerConfig::default())
}

/// Chooses workers for requests and GPUs for gangs. Safe to call from any thread.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
}

#[pymethods]
impl Scheduler {
    #[new]
    fn new(config: &Bound<'_, PyDict>) -> PyResult<Self> {
        let config: SchedulerConfig = config_from(config)?;
        let scheduler = core::Scheduler::new(config).map_err(|issues| Failure::config(&issues))?;
        let shared = Arc::new(Shared::new(scheduler));
        Ok(Self { shared })
    }

    /// Places the request on the best worker, whether or not that has room now.
    fn route(&self, py: Python<'_>, request: &Bound<'_, RouteRequest>) -> PyResult<Reservation> {
        let (request, now) = (request.get(), self.shared.now());
        let held = self.decide(py, |State { scheduler, .. }| {
            let exclude = request.exclude(scheduler);
            let reservation = scheduler.route(&request.as_core(&exclude), now)?;
            Ok(HeldReservation::new(scheduler, reservation))
        })?;
        Ok(Reservation::new(&self.shared, held))
    }

    /// A worker that has room for the request now, or a ticket; then `on_outcome` is called once, from any thread,
    /// with the reservation or with the exception that ends the wait.
    fn acquire(
        &self,
        py: Python<'_>,
        request: &Bound<'_, RouteRequest>,
        on_outcome: Py<PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let (request, now) = (request.get(), self.shared.now());
        let answer = self.decide(py, |state| {
            let scheduler = &mut state.scheduler;
            let exclude = request.exclude(scheduler);
            Ok(match scheduler.acquire(&request.as_core(&exclude), now)? {
                Wait::Granted(reservation) => {
                    Wait::Granted(HeldReservation::new(scheduler, reservation))
                }
                Wait::Waiting(ticket) => {
                    state.callbacks.insert(ticket, on_outcome);
                    Wait::Waiting(ticket)
                }
            })
        })?;
        match answer {
            Wait::Granted(held) => Reservation::new(&self.shared, held).into_py_any(py),
            Wait::Waiting(ticket) => Ticket::new(&self.shared, ticket).into_py_any(py),
        }
    }

    /// The best `k` workers for the request, how many more there are, and why the others may not take it.
    fn explain(
        &self,
        py: Python<'_>,
        request: &Bound<'_, RouteRequest>,
        k: usize,
    ) -> PyResult<(Vec<CandidateRow>, u32, Vec<IneligibleRow>)> {
        let request = request.get();
        self.decide(py, |State { scheduler, .. }| {
            let exclude = request.exclude(scheduler);
            let explanation = scheduler.explain(&request.as_core(&exclude), k)?;
            let candidates = explanation.candidates.iter();
            let candidates = candidates.map(|candidate| CandidateRow::new(scheduler, candidate));
            let ineligible = explanation.ineligible.iter();
            let ineligible =
                ineligible.map(|&(worker, why)| IneligibleRow::new(scheduler, worker, why));
            Ok((
                candidates.collect(),
                explanation.num_more_candidates,
                ineligible.collect(),
            ))
        })
    }

    /// Finds and takes memory for a gang.
    fn place(&self, py: Python<'_>, num_gpus: u32, bytes_per_gpu: u64) -> PyResult<Placement> {
        let request = PlaceRequest {
            num_gpus,
            bytes_per_gpu,
            ..PlaceRequest::default()
        };
        let held = self.decide(py, |State { scheduler, .. }| {
            let placement = scheduler.place(&request)?;
            Ok(HeldPlacement::new(scheduler, &placement))
        })?;
        Placement::new(py, &self.shared, held)
    }

    /// Memory for a gang, or a ticket; then `on_outcome` is called once, as by `acquire`.
    fn acquire_gpus(
        &self,
        py: Python<'_>,
        num_gpus: u32,
        bytes_per_gpu: u64,
        on_outcome: Py<PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let request = PlaceRequest {
            num_gpus,
            bytes_per_gpu,
            ..PlaceRequest::default()
        };
        let answer = self.decide(py, |state| {
            Ok(match state.scheduler.acquire_gpus(&request)? {
                Wait::Granted(placement) => {
                    Wait::Granted(HeldPlacement::new(&state.scheduler, &placement))
                }
                Wait::Waiting(ticket) => {
                    state.callbacks.insert(ticket, on_outcome);
                    Wait::Waiting(ticket)
                }
            })
        })?;
        match answer {
            Wait::Granted(held) => Placement::new(py, &self.shared, held)?.into_py_any(py),
            Wait::Waiting(ticket) => Ticket::new(&self.shared, ticket).into_py_any(py),
        }
    }

    /// Asserts every invariant; for tests. Walks all state.
    fn check_integrity(&self, py: Python<'_>) {
        py.detach(|| self.shared.lock().scheduler.check_integrity());
    }
}

impl Scheduler {
    /// Asks the scheduler something, without the interpreter.
    fn decide<R: Send>(
        &self,
        py: Python<'_>,
        decide: impl FnOnce(&mut State) -> Result<R, SchedulerError> + Send,
    ) -> PyResult<R> {
        let decided = py.detach(|| decide(&mut self.shared.lock()));
        Ok(decided.map_err(Failure::from)?)
    }
}
