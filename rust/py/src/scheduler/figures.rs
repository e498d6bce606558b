//! What there is: every figure of the scheduler, as of now or as of a moment ago.

use std::time::Duration;

use orchestra_core::scheduler::{KvFeed, WorkerSnapshot};
use pyo3::{prelude::*, types::PyDict};

use super::Scheduler;
use crate::values::to_dict;

/// A worker's figures as a dictionary.
#[derive(IntoPyObject)]
pub(crate) struct WorkerRow {
    name: String,
    model: String,
    is_draining: bool,
    batch: u32,
    queued_prefill_tokens: u64,
    kv_blocks_free: u64,
    kv_blocks_total: u32,
    num_cached_blocks: u32,
    is_kv_in_step: bool,
    num_reservations: u32,
    prefill_tokens_per_s: u64,
}

impl From<&WorkerSnapshot> for WorkerRow {
    fn from(worker: &WorkerSnapshot) -> Self {
        Self {
            name: worker.spec.name.clone(),
            model: worker.spec.model.clone(),
            is_draining: worker.is_draining,
            batch: worker.batch,
            queued_prefill_tokens: worker.queued_prefill_tokens,
            kv_blocks_free: worker.kv_blocks_free,
            kv_blocks_total: worker.spec.num_blocks,
            num_cached_blocks: worker.num_cached_blocks,
            is_kv_in_step: worker.kv_feed == KvFeed::InStep,
            num_reservations: worker.num_reservations,
            prefill_tokens_per_s: worker.prefill_tokens_per_s,
        }
    }
}

#[pymethods]
impl Scheduler {
    /// Every worker's figures, in order of registration.
    fn workers(&self, py: Python<'_>) -> Vec<WorkerRow> {
        py.detach(|| {
            let scheduler = &self.shared.lock().scheduler;
            let workers = scheduler.workers();
            workers.map(|(_, worker)| (&worker).into()).collect()
        })
    }

    /// How old the figures are, microseconds, then what `stats` and `workers` say.
    fn snapshot<'py>(
        &self,
        py: Python<'py>,
        max_age_us: u64,
    ) -> PyResult<(u64, Bound<'py, PyDict>, Vec<WorkerRow>)> {
        let max_age = Duration::from_micros(max_age_us);
        let (snapshot, age) = py.detach(|| self.shared.figures(max_age));
        let stats = to_dict(py, &snapshot.value.stats)?;
        let rows = snapshot.value.workers.iter().map(WorkerRow::from);
        Ok((age.as_micros() as u64, stats, rows.collect()))
    }

    /// Figures, by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let now = self.shared.now();
        let stats = py.detach(|| self.shared.lock().scheduler.stats(now));
        to_dict(py, &stats)
    }
}
