//! What attached workers report. Their series go when they detach.

use prometheus_client::{
    encoding::EncodeLabelSet,
    registry::{Registry, Unit},
};

use super::{InFlight, Metrics};

/// An attached worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct WorkerLabel {
    pub(super) worker: String,
}

/// A worker's fixed KV figures.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct CacheConfigLabel {
    worker: String,
    block_size: u32,
    num_blocks: u32,
}

impl Metrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register_workers(&self, r: &mut Registry) {
        r.register("workers", "Workers attached", self.workers.clone());
        r.register("preemptions", "Sequences preempted by workers", self.preemptions.clone());
        r.register("worker_steps", "Steps executed by workers", self.worker_steps.clone());
        r.register_with_unit("worker_schedule", "Spent planning steps", Unit::Seconds, self.worker_schedule.clone());
        r.register_with_unit("worker_execute", "Spent in the model", Unit::Seconds, self.worker_execute.clone());
        r.register("worker_requests_running", "Sequences in a worker's batch", self.worker_requests_running.clone());
        r.register("worker_requests_waiting", "Sequences queued at a worker", self.worker_requests_waiting.clone());
        r.register("kv_cache_usage_ratio", "Share of a worker's KV blocks in use", self.kv_cache_usage.clone());
        r.register("cache_config_info", "A worker's KV figures", self.cache_config.clone());
    }

    /// The series of one attached worker; they go when the handle drops.
    pub fn worker(&self, worker_id: &str, block_size: u32, num_blocks: u32) -> WorkerMetrics {
        let worker = worker_id.to_owned();
        let cache_config = CacheConfigLabel {
            worker: worker.clone(),
            block_size,
            num_blocks,
        };
        WorkerMetrics {
            metrics: self.clone(),
            label: WorkerLabel { worker },
            cache_config,
            _attached: InFlight::new(&self.workers),
        }
    }
}

/// What one attached worker reports. Holds its place in `orchestra_workers`.
#[derive(Debug)]
pub struct WorkerMetrics {
    metrics: Metrics,
    label: WorkerLabel,
    cache_config: CacheConfigLabel,
    _attached: InFlight,
}

impl WorkerMetrics {
    /// Takes over a load report; `kv_usage` is a share, 0..=1.
    pub fn report(&self, num_running: u32, num_waiting: u32, kv_usage: f64) {
        let (metrics, label) = (&self.metrics, &self.label);
        metrics
            .worker_requests_running
            .get_or_create(label)
            .set(i64::from(num_running));
        metrics
            .worker_requests_waiting
            .get_or_create(label)
            .set(i64::from(num_waiting));
        metrics.kv_cache_usage.get_or_create(label).set(kv_usage);
        // Set with each report: where a worker came back before its old handle dropped, that drop took the series.
        metrics
            .cache_config
            .get_or_create(&self.cache_config)
            .set(1);
    }
}

impl Drop for WorkerMetrics {
    fn drop(&mut self) {
        self.metrics.worker_requests_running.remove(&self.label);
        self.metrics.worker_requests_waiting.remove(&self.label);
        self.metrics.kv_cache_usage.remove(&self.label);
        self.metrics.cache_config.remove(&self.cache_config);
    }
}
