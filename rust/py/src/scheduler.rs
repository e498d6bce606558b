//! `orchestra_core::scheduler` for Python: workers and GPUs by name, reservations that give themselves back.

mod figures;
mod held;
mod moves;
mod placing;
mod register;
mod request;
mod shared;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use orchestra_core::{
    TokenId,
    scheduler::{self as core, SchedulerConfig, SchedulerError, Wait},
};
use pyo3::{IntoPyObjectExt, prelude::*, types::PyDict};

use self::{
    held::HeldReservation,
    request::{CandidateRow, IneligibleRow, TokenIds},
    shared::{Shared, State},
};
pub(crate) use self::{
    held::{Placement, Reservation, Ticket},
    moves::{KvFetch, KvSplit},
    placing::PlaceRequest,
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
            let reservation = request.ask(scheduler, |core, request| core.route(request, now))?;
            Ok(HeldReservation::new(scheduler, reservation))
        })?;
        Ok(Reservation::new(&self.shared, held))
    }

    /// Places many requests in order under one lock, without the interpreter: `prompts` end to end, each beginning
    /// where the one before it ends in `ends`; their other fields from `request`, whose own prompt is not used.
    ///
    /// Each gets a reservation, or the exception that refuses it.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "extracted from Python by value"
    )]
    fn decide_batch(
        &self,
        py: Python<'_>,
        request: &Bound<'_, RouteRequest>,
        prompts: TokenIds,
        ends: Vec<usize>,
    ) -> PyResult<Vec<Py<PyAny>>> {
        let prompts = split(&prompts.0, &ends)?;
        let (options, now) = (request.get().options(), self.shared.now());
        let outcomes = self.decide(py, |State { scheduler, .. }| {
            Ok(options.ask(scheduler, |scheduler, request| {
                let route = |token_ids: &[TokenId]| {
                    let request = core::RouteRequest {
                        token_ids,
                        ..*request
                    };
                    let reservation = scheduler.route(&request, now)?;
                    Ok(HeldReservation::new(scheduler, reservation))
                };
                prompts
                    .into_iter()
                    .map(route)
                    .collect::<Vec<Result<_, SchedulerError>>>()
            }))
        })?;
        // All become leases before anything here can fail, so that nothing is held by nobody.
        let leased = outcomes.into_iter();
        let leased: Vec<_> = leased
            .map(|outcome| outcome.map(|held| Reservation::new(&self.shared, held)))
            .collect();
        let outcome = |outcome: Result<Reservation, SchedulerError>| match outcome {
            Ok(reservation) => reservation.into_py_any(py),
            Err(error) => Failure::from(error).into_exception(py).into_py_any(py),
        };
        leased.into_iter().map(outcome).collect()
    }

    /// A worker that has room for the request now, or a ticket; then `on_outcome` is called once, from any thread,
    /// with the reservation or with the exception that ends the wait. The first token is wanted within `deadline_us`.
    fn acquire(
        &self,
        py: Python<'_>,
        request: &Bound<'_, RouteRequest>,
        on_outcome: Py<PyAny>,
        deadline_us: Option<u64>,
    ) -> PyResult<Py<PyAny>> {
        let (request, now) = (request.get(), self.shared.now());
        let deadline = deadline_us.map(|micros| now + Duration::from_micros(micros));
        let (answer, outcomes) = self.decide(py, |state| {
            let scheduler = &mut state.scheduler;
            let answer = request.ask(scheduler, |core, request| {
                let request = core::RouteRequest {
                    deadline,
                    ..*request
                };
                core.acquire(&request, now)
            })?;
            Ok(match answer {
                Wait::Granted(reservation) => {
                    let held = HeldReservation::new(scheduler, reservation);
                    (Wait::Granted(held), VecDeque::new())
                }
                Wait::Waiting(ticket) => {
                    state.callbacks.insert(ticket, on_outcome);
                    // Its turn may have come before that of others who find no room.
                    (Wait::Waiting(ticket), state.take_outcomes(now))
                }
            })
        })?;
        self.shared.deliver(py, outcomes);
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
            let explanation = request.ask(scheduler, |core, request| core.explain(request, k))?;
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

    /// Predicted time to the request's first token, microseconds; `None` where it is not known.
    fn predict_ttft(
        &self,
        py: Python<'_>,
        request: &Bound<'_, RouteRequest>,
    ) -> PyResult<Option<u64>> {
        let request = request.get();
        let predicted = self.decide(py, |State { scheduler, .. }| {
            Ok(request.ask(scheduler, |core, request| core.predict_ttft(request)))
        })?;
        Ok(predicted.map(|predicted| u64::try_from(predicted.as_micros()).unwrap_or(u64::MAX)))
    }

    /// Gives a tenant another share than the weight 100 that every tenant has.
    fn set_tenant_weight(&self, py: Python<'_>, tenant: &str, weight: u32) -> PyResult<()> {
        self.decide(py, |State { scheduler, .. }| {
            scheduler.set_tenant_weight(tenant, weight)
        })
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

/// The prompts that lie end to end.
fn split<'a>(token_ids: &'a [TokenId], ends: &[usize]) -> PyResult<Vec<&'a [TokenId]>> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let prompts: Option<Vec<_>> = starts
        .zip(ends)
        .map(|(start, &end)| token_ids.get(start..end))
        .collect();
    let is_whole = ends.last().copied().unwrap_or(0) == token_ids.len();
    prompts.filter(|_| is_whole).ok_or_else(|| {
        let message = "ends must rise and the last one must be the number of token ids";
        Failure::invalid("ends", message).into()
    })
}
