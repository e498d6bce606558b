//! KV that is to come to a reservation's worker from another one, with the names that Python sees.

use std::time::Duration;

use orchestra_core::scheduler::{self as core, ReservationId, Scheduler, WorkerId};
use pyo3::prelude::*;

/// Blocks that the worker should read from another one, which holds them, instead of computing them.
#[pyclass(frozen, get_all, module = "orchestra._core")]
#[derive(Clone)]
pub(crate) struct KvFetch {
    /// Who holds them.
    source: String,
    /// Leading blocks of the prompt that the source holds, those that the worker has itself included.
    num_blocks: u32,
    /// How much less that costs than computing, in tokens of prefill.
    saved_tokens: u64,
}

/// Blocks that another worker, the helper, should compute for the worker and write to it.
#[pyclass(frozen, get_all, module = "orchestra._core")]
#[derive(Clone)]
pub(crate) struct KvSplit {
    /// Who computes.
    helper: String,
    /// Leading blocks of the prompt that are computed there.
    num_blocks: u32,
}

/// What is to come to a reservation's worker.
pub(super) struct HeldMoves {
    pub(super) fetch: Option<KvFetch>,
    pub(super) split: Option<KvSplit>,
    /// Room on the helper.
    pub(super) helper: Option<ReservationId>,
    pub(super) wait: Duration,
}

impl HeldMoves {
    pub(super) fn new(scheduler: &Scheduler, reservation: &core::Reservation) -> Self {
        let name = |worker: WorkerId| {
            let spec = scheduler.worker_spec(worker);
            spec.map(|spec| spec.name.clone()).unwrap_or_default()
        };
        Self {
            fetch: reservation.fetch.map(|fetch| KvFetch {
                source: name(fetch.source),
                num_blocks: fetch.num_blocks,
                saved_tokens: fetch.saved_tokens,
            }),
            split: reservation.prefill.map(|part| KvSplit {
                helper: name(part.worker),
                num_blocks: part.num_blocks,
            }),
            helper: reservation.prefill.map(|part| part.id),
            wait: reservation.move_wait,
        }
    }
}

#[pymethods]
impl KvFetch {
    fn __repr__(&self) -> String {
        let Self {
            source,
            num_blocks,
            saved_tokens,
        } = self;
        format!("KvFetch(source={source:?}, num_blocks={num_blocks}, saved_tokens={saved_tokens})")
    }
}

#[pymethods]
impl KvSplit {
    fn __repr__(&self) -> String {
        let Self { helper, num_blocks } = self;
        format!("KvSplit(helper={helper:?}, num_blocks={num_blocks})")
    }
}
