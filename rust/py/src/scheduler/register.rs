//! Registering workers and GPUs, what they report, and what there is: the part of the class that is not a decision.

use orchestra_core::{
    BlockHash, block_hashes,
    scheduler::{self as core, GpuSpec, SchedulerError, WorkerId, WorkerLoad, WorkerSpec},
    step::KvEvent,
};
use pyo3::{prelude::*, types::PyDict};

use super::{Scheduler, request::TokenIds, shared::State};
use crate::{errors::Failure, values::to_dict};

/// The attributes of a worker, from any object that has them.
#[derive(FromPyObject)]
struct WorkerSpecArg {
    name: String,
    model: String,
    weights_epoch: u64,
    block_size: u32,
    num_blocks: u32,
    max_num_seqs: u32,
    max_model_len: u32,
}

impl From<WorkerSpecArg> for WorkerSpec {
    fn from(spec: WorkerSpecArg) -> Self {
        Self {
            name: spec.name,
            model: spec.model,
            weights_epoch: spec.weights_epoch,
            block_size: spec.block_size,
            num_blocks: spec.num_blocks,
            max_num_seqs: spec.max_num_seqs,
            max_model_len: spec.max_model_len,
        }
    }
}

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
    num_reservations: u32,
}

#[pymethods]
impl Scheduler {
    /// Registers a worker with an empty prefix cache and no load.
    fn add_worker(&self, py: Python<'_>, spec: WorkerSpecArg) -> PyResult<()> {
        let spec = WorkerSpec::from(spec);
        let added = self
            .shared
            .change(py, |state| state.scheduler.add_worker(spec));
        added.map_err(Failure::from)?;
        Ok(())
    }

    /// Forgets a worker, what it cached, and every reservation on it. `False` where it is not registered.
    fn remove_worker(&self, py: Python<'_>, name: &str) -> bool {
        self.shared.change(py, |state| {
            let id = state.scheduler.worker_by_name(name);
            id.is_some_and(|id| state.scheduler.remove_worker(id))
        })
    }

    /// A draining worker takes no new requests and keeps its reservations.
    fn set_draining(&self, py: Python<'_>, worker: &str, is_draining: bool) -> PyResult<()> {
        self.change_worker(py, worker, |scheduler, id| {
            scheduler.set_draining(id, is_draining);
            Ok(())
        })
    }

    /// Takes a worker's load report.
    #[pyo3(signature = (worker, *, num_running, num_waiting, kv_blocks_used, queued_prefill_tokens))]
    #[expect(clippy::too_many_arguments, reason = "a report's figures, by keyword")]
    fn update_load(
        &self,
        py: Python<'_>,
        worker: &str,
        num_running: u32,
        num_waiting: u32,
        kv_blocks_used: u32,
        queued_prefill_tokens: u64,
    ) -> PyResult<()> {
        let load = WorkerLoad {
            num_running,
            num_waiting,
            kv_blocks_used,
            queued_prefill_tokens,
        };
        self.change_worker(py, worker, |scheduler, id| {
            scheduler.update_load(id, load);
            Ok(())
        })
    }

    /// Hashes of the full KV blocks of `token_ids` on this worker.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "extracted from Python by value"
    )]
    fn block_hashes(
        &self,
        py: Python<'_>,
        worker: &str,
        token_ids: TokenIds,
        salt: &str,
    ) -> PyResult<Vec<u64>> {
        let hashes = self.decide(py, |State { scheduler, .. }| {
            let id = scheduler.worker_by_name(worker);
            let spec = id.and_then(|id| scheduler.worker_spec(id));
            let spec = spec.ok_or(SchedulerError::UnknownWorker)?;
            let (seed, block_size) = (spec.hash_seed(salt), spec.block_size as usize);
            Ok(block_hashes(seed, &token_ids.0, block_size))
        })?;
        Ok(hashes.into_iter().map(|hash| hash.0).collect())
    }

    /// The worker's prefix cache holds these blocks from now on.
    fn kv_stored(&self, py: Python<'_>, worker: &str, hashes: Vec<u64>) -> PyResult<()> {
        self.apply_kv_event(py, worker, &KvEvent::Stored(to_hashes(hashes)))
    }

    /// The worker's prefix cache holds these blocks no longer.
    fn kv_removed(&self, py: Python<'_>, worker: &str, hashes: Vec<u64>) -> PyResult<()> {
        self.apply_kv_event(py, worker, &KvEvent::Removed(to_hashes(hashes)))
    }

    /// The worker's prefix cache is empty from now on.
    fn kv_cleared(&self, py: Python<'_>, worker: &str) -> PyResult<()> {
        self.apply_kv_event(py, worker, &KvEvent::Cleared)
    }

    /// Registers a GPU, all of its memory free.
    fn add_gpu(
        &self,
        py: Python<'_>,
        name: String,
        domain: String,
        node: String,
        memory_bytes: u64,
    ) -> PyResult<()> {
        let spec = GpuSpec {
            name,
            domain,
            node,
            rack: None,
            memory_bytes,
        };
        let added = self
            .shared
            .change(py, |state| state.scheduler.add_gpu(spec));
        added.map_err(Failure::from)?;
        Ok(())
    }

    /// Forgets a GPU and every placement that it was part of. `False` where it is not registered.
    fn remove_gpu(&self, py: Python<'_>, name: &str) -> bool {
        self.shared.change(py, |state| {
            let id = state.scheduler.gpu_by_name(name);
            id.is_some_and(|id| state.scheduler.remove_gpu(id).is_some())
        })
    }

    /// Every worker's figures, in order of registration.
    fn workers(&self, py: Python<'_>) -> Vec<WorkerRow> {
        py.detach(|| {
            let scheduler = &self.shared.lock().scheduler;
            let row = |(_, worker): (WorkerId, core::WorkerSnapshot)| WorkerRow {
                kv_blocks_total: worker.spec.num_blocks,
                name: worker.spec.name,
                model: worker.spec.model,
                is_draining: worker.is_draining,
                batch: worker.batch,
                queued_prefill_tokens: worker.queued_prefill_tokens,
                kv_blocks_free: worker.kv_blocks_free,
                num_cached_blocks: worker.num_cached_blocks,
                num_reservations: worker.num_reservations,
            };
            scheduler.workers().map(row).collect()
        })
    }

    /// Figures, by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let now = self.shared.now();
        let stats = py.detach(|| self.shared.lock().scheduler.stats(now));
        to_dict(py, &stats)
    }
}

impl Scheduler {
    fn change_worker(
        &self,
        py: Python<'_>,
        worker: &str,
        change: impl FnOnce(&mut core::Scheduler, WorkerId) -> Result<(), SchedulerError> + Send,
    ) -> PyResult<()> {
        let changed = self.shared.change(py, |State { scheduler, .. }| {
            let id = scheduler.worker_by_name(worker);
            change(scheduler, id.ok_or(SchedulerError::UnknownWorker)?)
        });
        Ok(changed.map_err(Failure::from)?)
    }

    fn apply_kv_event(&self, py: Python<'_>, worker: &str, event: &KvEvent) -> PyResult<()> {
        self.change_worker(py, worker, |scheduler, id| {
            scheduler.apply_kv_event(id, event)
        })
    }
}

fn to_hashes(hashes: Vec<u64>) -> Vec<BlockHash> {
    hashes.into_iter().map(BlockHash).collect()
}
