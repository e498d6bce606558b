//! Registering workers, and what they report.

use orchestra_core::{
    BlockHash, block_hashes,
    scheduler::{
        self as core, KvExchange, KvFeed, KvSource, Lora, SchedulerError, WorkerId, WorkerLoad,
        WorkerRole, WorkerSpec,
    },
    step::KvEvent,
};
use pyo3::prelude::*;

use super::{
    Scheduler,
    request::{Names, TokenIds},
    shared::State,
};
use crate::errors::Failure;

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
    taints: Names,
    slo_classes: Names,
    max_loras: u32,
    kv_exchange: Option<KvExchangeArg>,
    role: String,
}

/// What blocks of two workers have in common that can exchange them, from any object that has these attributes.
#[derive(FromPyObject)]
struct KvExchangeArg {
    layout: String,
    bytes_per_block: u64,
}

impl TryFrom<WorkerSpecArg> for WorkerSpec {
    type Error = Failure;

    fn try_from(spec: WorkerSpecArg) -> Result<Self, Failure> {
        let role = match spec.role.as_str() {
            "both" => WorkerRole::Both,
            "prefill" => WorkerRole::Prefill,
            "decode" => WorkerRole::Decode,
            _ => {
                let message = "role must be both, prefill or decode";
                return Err(Failure::invalid("role", message));
            }
        };
        Ok(Self {
            name: spec.name,
            model: spec.model,
            weights_epoch: spec.weights_epoch,
            block_size: spec.block_size,
            num_blocks: spec.num_blocks,
            max_num_seqs: spec.max_num_seqs,
            max_model_len: spec.max_model_len,
            taints: spec.taints.0,
            slo_classes: spec.slo_classes.0,
            max_loras: spec.max_loras,
            kv_source: KvSource::Reported,
            kv_exchange: spec.kv_exchange.map(|exchange| KvExchange {
                layout: exchange.layout,
                bytes_per_block: exchange.bytes_per_block,
            }),
            role,
            ..Self::default()
        })
    }
}

#[pymethods]
impl Scheduler {
    /// Registers a worker with an empty prefix cache and no load.
    fn add_worker(&self, py: Python<'_>, spec: WorkerSpecArg) -> PyResult<()> {
        let spec = WorkerSpec::try_from(spec)?;
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

    /// Takes a worker's report of the adapters, by id and version, that it has in memory.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "extracted from Python by value"
    )]
    fn set_loras(&self, py: Python<'_>, worker: &str, loras: Vec<(String, u64)>) -> PyResult<()> {
        self.change_worker(py, worker, |scheduler, id| {
            let loras: Vec<_> = loras.iter().map(lora).collect();
            scheduler.set_loras(id, &loras)
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
        adapter: Option<(String, u64)>,
    ) -> PyResult<Vec<u64>> {
        let hashes = self.decide(py, |State { scheduler, .. }| {
            let id = scheduler.worker_by_name(worker);
            let spec = id.and_then(|id| scheduler.worker_spec(id));
            let spec = spec.ok_or(SchedulerError::UnknownWorker)?;
            let (seed, block_size) = (
                spec.hash_seed(salt, adapter.as_ref().map(lora)),
                spec.block_size as usize,
            );
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

    /// Takes a worker's message number `sequence`: KV events by kind. Whether no message is missing.
    fn apply_kv_events(
        &self,
        py: Python<'_>,
        worker: &str,
        sequence: u64,
        events: Vec<(String, Vec<u64>)>,
    ) -> PyResult<bool> {
        let events: Vec<KvEvent> = events.into_iter().map(kv_event).collect::<PyResult<_>>()?;
        let feed = self.change_worker(py, worker, |scheduler, id| {
            scheduler.apply_kv_events(id, sequence, &events)
        })?;
        Ok(feed == KvFeed::InStep)
    }

    /// Takes all that the worker's prefix cache holds after its message number `sequence`.
    fn resync_kv(
        &self,
        py: Python<'_>,
        worker: &str,
        sequence: u64,
        hashes: Vec<u64>,
    ) -> PyResult<()> {
        let blocks = to_hashes(hashes);
        self.change_worker(py, worker, |scheduler, id| {
            scheduler.resync_kv(id, sequence, &blocks)
        })
    }
}

impl Scheduler {
    fn change_worker<R: Send>(
        &self,
        py: Python<'_>,
        worker: &str,
        change: impl FnOnce(&mut core::Scheduler, WorkerId) -> Result<R, SchedulerError> + Send,
    ) -> PyResult<R> {
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

fn lora((id, version): &(String, u64)) -> Lora<'_> {
    Lora {
        id,
        version: *version,
    }
}

fn to_hashes(hashes: Vec<u64>) -> Vec<BlockHash> {
    hashes.into_iter().map(BlockHash).collect()
}

fn kv_event((kind, hashes): (String, Vec<u64>)) -> PyResult<KvEvent> {
    match (kind.as_str(), hashes.is_empty()) {
        ("stored", _) => Ok(KvEvent::Stored(to_hashes(hashes))),
        ("removed", _) => Ok(KvEvent::Removed(to_hashes(hashes))),
        ("cleared", true) => Ok(KvEvent::Cleared),
        _ => {
            let message =
                "an event is (\"stored\", hashes), (\"removed\", hashes) or (\"cleared\", [])";
            Err(Failure::invalid("events", message).into())
        }
    }
}
