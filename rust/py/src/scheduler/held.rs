//! What a scheduler gave out: released by hand, by `with`, or when the last reference goes.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use orchestra_core::scheduler::{self as core, PlacementId, ReservationId, Scheduler, TicketId};
use pyo3::{prelude::*, types::PyTuple};

use super::{
    moves::{HeldMoves, KvFetch, KvSplit},
    shared::{Outcome, Shared, State},
};

/// A reservation with the names that Python sees, made under the lock that made the decision.
pub(super) struct HeldReservation {
    id: ReservationId,
    worker: String,
    num_cached_tokens: u32,
    num_blocks: u32,
    moves: HeldMoves,
}

impl HeldReservation {
    pub(super) fn new(scheduler: &Scheduler, reservation: core::Reservation) -> Self {
        let spec = scheduler.worker_spec(reservation.worker);
        Self {
            id: reservation.id,
            worker: spec.map(|spec| spec.name.clone()).unwrap_or_default(),
            num_cached_tokens: reservation.num_cached_tokens,
            num_blocks: reservation.num_blocks,
            moves: HeldMoves::new(scheduler, &reservation),
        }
    }
}

/// A placement with the names that Python sees.
pub(super) struct HeldPlacement {
    id: PlacementId,
    /// Name, offset, length.
    gpus: Vec<(String, u64, u64)>,
    stages: Vec<u32>,
    preempted: Vec<u64>,
}

impl HeldPlacement {
    pub(super) fn new(scheduler: &Scheduler, placement: &core::Placement) -> Self {
        let row = |placed: &core::PlacedGpu| {
            let spec = scheduler.gpu_spec(placed.gpu);
            let name = spec.map(|spec| spec.name.clone()).unwrap_or_default();
            (name, placed.extent.offset_bytes, placed.extent.length_bytes)
        };
        Self {
            id: placement.id,
            gpus: placement.gpus.iter().map(row).collect(),
            stages: placement.gpus.iter().map(|placed| placed.stage).collect(),
            preempted: placement.preempted.iter().map(|id| id.number()).collect(),
        }
    }
}

/// Gives something back once.
struct Lease {
    shared: Arc<Shared>,
    is_over: AtomicBool,
}

impl Lease {
    fn new(shared: &Arc<Shared>) -> Self {
        Self {
            shared: Arc::clone(shared),
            is_over: AtomicBool::new(false),
        }
    }

    /// Whether this call is the one that ends the lease.
    fn end(&self) -> bool {
        !self.is_over.swap(true, Ordering::AcqRel)
    }

    /// Ends the lease and serves those that waited; whether there was something to give back.
    fn release(&self, py: Python<'_>, give_back: impl FnOnce(&mut State) -> bool + Send) -> bool {
        self.end() && self.shared.change(py, give_back)
    }

    /// Ends the lease; what that made possible is for the caller to deliver.
    fn take_back(&self, give_back: impl FnOnce(&mut State) -> bool) -> VecDeque<Outcome> {
        if !self.end() {
            return VecDeque::new();
        }
        let now = self.shared.now();
        let mut state = self.shared.lock();
        give_back(&mut state);
        state.take_outcomes(now)
    }

    /// Ends the lease when its object goes away, also where that happens without the interpreter.
    fn drop_with(&self, give_back: impl FnOnce(&mut State) -> bool) {
        let outcomes = self.take_back(give_back);
        if !outcomes.is_empty() {
            // At interpreter shutdown there is nobody left to tell.
            let _ = Python::try_attach(|py| self.shared.deliver(py, outcomes));
        }
    }
}

/// Room on a worker, held until it is released or the last reference to it goes.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Reservation {
    held: HeldReservation,
    lease: Lease,
}

impl Reservation {
    pub(super) fn new(shared: &Arc<Shared>, held: HeldReservation) -> Self {
        Self {
            held,
            lease: Lease::new(shared),
        }
    }

    fn give_back(&self) -> impl FnOnce(&mut State) -> bool + Send + use<> {
        let (id, helper) = (self.held.id, self.held.moves.helper);
        move |state| {
            release_helper(state, helper);
            state.scheduler.release(id)
        }
    }

    pub(super) fn take_back(&self) -> VecDeque<Outcome> {
        self.lease.take_back(self.give_back())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.lease.drop_with(self.give_back());
    }
}

#[pymethods]
impl Reservation {
    /// The chosen worker.
    #[getter]
    fn worker(&self) -> &str {
        &self.held.worker
    }

    /// Prompt tokens whose KV the worker held already.
    #[getter]
    fn num_cached_tokens(&self) -> u32 {
        self.held.num_cached_tokens
    }

    /// KV blocks of prompt and output together, cached ones included.
    #[getter]
    fn num_blocks(&self) -> u32 {
        self.held.num_blocks
    }

    /// What the worker should read from another one.
    #[getter]
    fn fetch(&self) -> Option<KvFetch> {
        self.held.moves.fetch.clone()
    }

    /// Who should compute the prompt for the worker.
    #[getter]
    fn split(&self) -> Option<KvSplit> {
        self.held.moves.split.clone()
    }

    /// How long the worker should wait for either before it computes for itself, seconds.
    #[getter]
    fn move_wait_s(&self) -> f64 {
        self.held.moves.wait.as_secs_f64()
    }

    /// Tells what came of the fetch, before `prefill_done`. `False` where none was to be made.
    fn fetch_done(&self, py: Python<'_>, num_tokens: u32) -> bool {
        let id = self.held.id;
        let shared = &self.lease.shared;
        let now = shared.now();
        shared.change(py, |state| state.scheduler.fetch_done(id, num_tokens, now))
    }

    /// Tells that the helper has computed its part, and gives its room back. `False` where it has none.
    fn split_done(&self, py: Python<'_>) -> bool {
        let Some(helper) = self.held.moves.helper else {
            return false;
        };
        let shared = &self.lease.shared;
        let now = shared.now();
        shared.change(py, |state| {
            state.scheduler.prefill_done(helper, now);
            state.scheduler.release(helper)
        })
    }

    /// Tells that the prompt is computed: its tokens no longer queue on the worker.
    fn prefill_done(&self, py: Python<'_>) -> bool {
        let id = self.held.id;
        let shared = &self.lease.shared;
        let now = shared.now();
        shared.change(py, |state| state.scheduler.prefill_done(id, now))
    }

    /// Gives the room back and settles what the tenant is charged. `False` where it is gone already.
    fn finish(&self, py: Python<'_>, num_output_tokens: u32) -> bool {
        let (id, helper) = (self.held.id, self.held.moves.helper);
        self.lease.release(py, move |state| {
            release_helper(state, helper);
            state.scheduler.finish(id, num_output_tokens)
        })
    }

    /// Gives the room back. `False` where it is gone already: released before, or its worker was removed.
    fn release(&self, py: Python<'_>) -> bool {
        self.lease.release(py, self.give_back())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.release(py);
    }

    fn __repr__(&self) -> String {
        let HeldReservation {
            worker,
            num_cached_tokens,
            num_blocks,
            ..
        } = &self.held;
        format!(
            "Reservation(worker={worker:?}, num_cached_tokens={num_cached_tokens}, num_blocks={num_blocks})"
        )
    }
}

/// Gives back the room for a prompt that is computed for another worker; it may be gone already.
fn release_helper(state: &mut State, helper: Option<ReservationId>) {
    if let Some(helper) = helper {
        state.scheduler.release(helper);
    }
}

/// Memory on a gang of GPUs, held until it is released or the last reference to it goes.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Placement {
    id: PlacementId,
    gpus: Py<PyTuple>,
    stages: Vec<u32>,
    preempted: Vec<u64>,
    lease: Lease,
}

impl Placement {
    pub(super) fn new(py: Python<'_>, shared: &Arc<Shared>, held: HeldPlacement) -> PyResult<Self> {
        // Made first: should the tuple fail, the lease gives the memory back.
        let lease = Lease::new(shared);
        let id = held.id;
        match PyTuple::new(py, held.gpus) {
            Ok(gpus) => Ok(Self {
                id,
                gpus: gpus.unbind(),
                stages: held.stages,
                preempted: held.preempted,
                lease,
            }),
            Err(error) => {
                lease.release(py, move |state| state.scheduler.release_placement(id));
                Err(error)
            }
        }
    }

    fn give_back(&self) -> impl FnOnce(&mut State) -> bool + Send + use<> {
        let id = self.id;
        move |state| state.scheduler.release_placement(id)
    }

    pub(super) fn take_back(&self) -> VecDeque<Outcome> {
        self.lease.take_back(self.give_back())
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        self.lease.drop_with(self.give_back());
    }
}

#[pymethods]
impl Placement {
    /// Names it in the `preempted` of those that displaced it.
    #[getter]
    fn id(&self) -> u64 {
        self.id.number()
    }

    /// The stage of each of `gpus`.
    #[getter]
    fn stages<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.stages)
    }

    /// The placements of lower priority whose memory it took.
    #[getter]
    fn preempted<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.preempted)
    }

    /// `(name, offset_bytes, length_bytes)` of each GPU or piece of one, by stage and then in order of registration.
    #[getter]
    fn gpus(&self, py: Python<'_>) -> Py<PyTuple> {
        self.gpus.clone_ref(py)
    }

    /// Gives the memory back. `False` where it is gone already: released before, or one of its GPUs was removed.
    fn release(&self, py: Python<'_>) -> bool {
        self.lease.release(py, self.give_back())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.release(py);
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("Placement(gpus={})", self.gpus.bind(py).repr()?))
    }
}

/// A place in the queue of those that wait for room.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    id: TicketId,
}

impl Ticket {
    pub(super) fn new(shared: &Arc<Shared>, id: TicketId) -> Self {
        Self {
            shared: Arc::clone(shared),
            id,
        }
    }
}

#[pymethods]
impl Ticket {
    /// Ends the wait: the callback will not be called. `False` where it was called or is about to be.
    fn cancel(&self, py: Python<'_>) -> bool {
        let cancelled = self.shared.change(py, |state| {
            let callback = state.callbacks.remove(&self.id);
            state.scheduler.cancel(self.id);
            callback
        });
        cancelled.is_some()
    }
}
