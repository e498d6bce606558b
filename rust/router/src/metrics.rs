//! Every figure that the router publishes at `GET /metrics`, in one struct that is passed down.
//!
//! Names follow the field (vLLM's, with our prefix) so that dashboards carry over. Labels come from closed sets;
//! the one exception is `worker`, whose values are the workers attached now and which go when they detach.
//! `docs/metrics.md` has a row for each; a test keeps the two alike.
//!
//! A file per concern: [`requests`] and [`workers`] fill in families of [`Metrics`]. A further concern is a struct of
//! its own, made by its `register(&mut Registry)`, one public field of [`Metrics`] and a line in `tests::SOURCES`.

mod admission;
mod engines;
mod kv_events;
mod kv_moves;
mod observe;
mod operation;
mod requests;
#[cfg(test)]
mod tests;
mod workers;

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

pub use self::{
    admission::AdmissionMetrics,
    engines::EngineMetrics,
    kv_events::{CacheSeries, KvEventMetrics, KvEventSeries},
    kv_moves::KvMoveMetrics,
    observe::ObserveMetrics,
    operation::OperationMetrics,
    workers::WorkerMetrics,
};
pub(crate) use self::{
    engines::{ABANDONED, ANSWERED, EngineSeries, STOPPED},
    kv_moves::{MoveKind, MoveOutcome},
};
use self::{
    requests::{DoorLabel, E2E_BUCKETS, ReasonLabel, ResponseLabel, TPOT_BUCKETS, TTFT_BUCKETS},
    workers::{CacheConfigLabel, WorkerLabel},
};

/// Gauge of a share, 0..=1.
type RatioGauge = Gauge<f64, AtomicU64>;

/// The router's metric families. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Requests that have been dispatched and not ended. The corridor holds an [`InFlight`] per request.
    pub requests_running: Gauge,
    /// Requests admitted and not yet dispatched.
    pub requests_waiting: Gauge,
    /// From the moment a door read the request to its first token, seconds.
    pub time_to_first_token: Histogram,
    /// Mean seconds per output token after the first, observed once per choice.
    pub time_per_output_token: Histogram,
    /// From the moment a door read the request to its end, seconds.
    pub e2e_request_latency: Histogram,
    /// From admission to dispatch, seconds.
    pub request_queue_time: Histogram,
    /// Prompt tokens of dispatched requests; a request with several choices counts its prompt once.
    pub prompt_tokens: Counter,
    /// Tokens generated.
    pub generation_tokens: Counter,
    /// Prompt tokens whose KV a worker's prefix cache gave.
    pub prefix_cache_hit_tokens: Counter,
    /// Sequences that workers preempted; summed from the differences of their reports.
    pub preemptions: Counter,
    /// Steps that workers executed; summed like `preemptions`.
    pub worker_steps: Counter,
    /// Time that workers spent planning steps, seconds.
    pub worker_schedule: Counter<f64, AtomicU64>,
    /// Time that workers spent in the model, seconds.
    pub worker_execute: Counter<f64, AtomicU64>,
    /// Foreign engines and requests on them.
    pub engines: EngineMetrics,
    /// What engines say about their prefix caches.
    pub kv_events: KvEventMetrics,
    /// KV that moves between attached workers.
    pub kv_moves: KvMoveMetrics,
    /// Workers attached now.
    pub workers: Gauge,
    /// What operators do.
    pub operation: OperationMetrics,
    /// How requests get to a worker.
    pub admission: AdmissionMetrics,
    /// What logs and traces lose.
    pub observe: ObserveMetrics,
    requests_finished: Family<ReasonLabel, Counter>,
    requests_rejected: Family<ReasonLabel, Counter>,
    http_responses: Family<ResponseLabel, Counter>,
    connections: Family<DoorLabel, Gauge>,
    worker_requests_running: Family<WorkerLabel, Gauge>,
    worker_requests_waiting: Family<WorkerLabel, Gauge>,
    kv_cache_usage: Family<WorkerLabel, RatioGauge>,
    cache_config: Family<CacheConfigLabel, Gauge>,
}

impl Metrics {
    /// A fresh registry with every family in it.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("orchestra");
        let mut metrics = Self {
            engines: EngineMetrics::register(&mut registry),
            kv_events: KvEventMetrics::register(&mut registry),
            kv_moves: KvMoveMetrics::register(&mut registry),
            operation: OperationMetrics::register(&mut registry),
            admission: AdmissionMetrics::register(&mut registry),
            observe: ObserveMetrics::register(&mut registry),
            registry: Arc::default(),
            requests_running: Gauge::default(),
            requests_waiting: Gauge::default(),
            time_to_first_token: Histogram::new(TTFT_BUCKETS),
            time_per_output_token: Histogram::new(TPOT_BUCKETS),
            e2e_request_latency: Histogram::new(E2E_BUCKETS),
            request_queue_time: Histogram::new(E2E_BUCKETS),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            prefix_cache_hit_tokens: Counter::default(),
            preemptions: Counter::default(),
            worker_steps: Counter::default(),
            worker_schedule: Counter::default(),
            worker_execute: Counter::default(),
            workers: Gauge::default(),
            requests_finished: Family::default(),
            requests_rejected: Family::default(),
            http_responses: Family::default(),
            connections: Family::default(),
            worker_requests_running: Family::default(),
            worker_requests_waiting: Family::default(),
            kv_cache_usage: Family::default(),
            cache_config: Family::default(),
        };
        metrics.register_requests(&mut registry);
        metrics.register_latencies(&mut registry);
        metrics.register_workers(&mut registry);
        metrics.registry = Arc::new(registry);
        metrics.start_at_zero();
        metrics
    }

    /// Everything, in the `OpenMetrics` text format that Prometheus reads.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 << 10);
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// One more in a gauge until it drops.
#[derive(Debug)]
pub struct InFlight(Gauge);

impl InFlight {
    /// Counts one in.
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
