//! Every figure that the router publishes at `GET /metrics`, in one struct that is passed down.
//!
//! Names follow the field (vLLM's, with our prefix) so that dashboards carry over. Labels come from closed sets;
//! the one exception is `worker`, whose values are the workers attached now and which go when they detach.
//! `docs/metrics.md` has a row for each; a test keeps the two alike.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
};

use orchestra_core::{ErrorCode, step::FinishReason};
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

/// Time to first token: 1 ms is a cached prompt on a small model, 60 s a full queue. Steps of about 2, finer
/// around the usual targets of 100 to 500 ms.
const TTFT_BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0,
];
/// Time per output token: a decode step, 1 ms to 1 s; the usual targets are 10 to 100 ms.
const TPOT_BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0,
];
/// Whole requests and waits: 1 ms to the ten minutes that the default deadline allows.
const E2E_BUCKETS: [f64; 15] = [
    0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0,
];

/// Gauge of a share, 0..=1.
type RatioGauge = Gauge<f64, AtomicU64>;

/// Why something ended: the spelling of a closed enum.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// An attached worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabel {
    worker: String,
}

/// A worker's fixed KV figures.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheConfigLabel {
    worker: String,
    block_size: u32,
    num_blocks: u32,
}

/// A route of ours (never the path that a client typed) and the status it answered with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResponseLabel {
    route: &'static str,
    status: u16,
}

/// One of the listeners.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DoorLabel {
    door: &'static str,
}

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
    /// Workers attached now.
    pub workers: Gauge,
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
        let mut metrics = Self {
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
        let mut registry = Registry::with_prefix("orchestra");
        metrics.register_requests(&mut registry);
        metrics.register_latencies(&mut registry);
        metrics.register_workers(&mut registry);
        metrics.registry = Arc::new(registry);
        metrics.start_at_zero();
        metrics
    }

    #[rustfmt::skip] // A table: one row per metric.
    fn register_requests(&self, r: &mut Registry) {
        r.register("build", "What is running", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        r.register("requests_running", "Requests being generated", self.requests_running.clone());
        r.register("requests_waiting", "Requests waiting", self.requests_waiting.clone());
        r.register("requests_finished", "Choices that ended", self.requests_finished.clone());
        r.register("requests_rejected", "Requests refused", self.requests_rejected.clone());
        r.register("prompt_tokens", "Prompt tokens dispatched", self.prompt_tokens.clone());
        r.register("generation_tokens", "Tokens generated", self.generation_tokens.clone());
        r.register("prefix_cache_hit_tokens", "Prompt tokens not computed again", self.prefix_cache_hit_tokens.clone());
        r.register("http_responses", "Answers by route and status", self.http_responses.clone());
        r.register("connections", "Open connections", self.connections.clone());
    }

    #[rustfmt::skip] // A table: one row per metric.
    fn register_latencies(&self, registry: &mut Registry) {
        let mut seconds = |name: &str, help: &str, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        seconds("time_to_first_token", "Arrival to first token", &self.time_to_first_token);
        seconds("time_per_output_token", "Mean per later token", &self.time_per_output_token);
        seconds("e2e_request_latency", "Arrival to end", &self.e2e_request_latency);
        seconds("request_queue_time", "Admission to dispatch", &self.request_queue_time);
    }

    #[rustfmt::skip] // A table: one row per metric.
    fn register_workers(&self, r: &mut Registry) {
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

    /// Creates each series of a closed label set, so that a rate over the first event is seen.
    fn start_at_zero(&self) {
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Abort,
            FinishReason::Error,
        ] {
            let _ = self
                .requests_finished
                .get_or_create_owned(&finished_label(reason));
        }
        for code in ErrorCode::ALL
            .into_iter()
            .filter(|&code| code != ErrorCode::InvalidConfig)
        {
            let _ = self
                .requests_rejected
                .get_or_create_owned(&rejected_label(code));
        }
    }

    /// Counts the end of one choice. The corridor calls it, once per choice that was dispatched.
    pub fn finished(&self, reason: FinishReason) {
        self.requests_finished
            .get_or_create(&finished_label(reason))
            .inc();
    }

    /// Counts a request that was refused before its first token. The doors call it where they render the
    /// refusal, so the corridor does not.
    pub fn rejected(&self, code: ErrorCode) {
        self.requests_rejected
            .get_or_create(&rejected_label(code))
            .inc();
    }

    /// Counts one HTTP answer. `route` is a route of ours, not a path.
    pub fn http_response(&self, route: &'static str, status: u16) {
        self.http_responses
            .get_or_create(&ResponseLabel { route, status })
            .inc();
    }

    /// Counts one open connection at `door` until the guard drops.
    pub fn connection(&self, door: &'static str) -> InFlight {
        InFlight::new(&self.connections.get_or_create(&DoorLabel { door }))
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

fn finished_label(reason: FinishReason) -> ReasonLabel {
    ReasonLabel {
        reason: reason.as_str(),
    }
}

fn rejected_label(code: ErrorCode) -> ReasonLabel {
    ReasonLabel {
        reason: code.as_str(),
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Names as the text format shows them, each family touched once.
    fn published_names() -> BTreeSet<String> {
        let metrics = Metrics::new();
        metrics.http_response("/live", 200);
        let _connection = metrics.connection("http");
        let worker = metrics.worker("w0", 16, 100);
        worker.report(1, 2, 0.5);
        let text = metrics.encode().unwrap();
        let counters = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        counters
            .map(|line| match line.split_once(' ').unwrap() {
                (name, "counter") => format!("{name}_total"),
                (name, "info") => format!("{name}_info"),
                (name, _) => name.to_owned(),
            })
            .collect()
    }

    #[test]
    fn each_metric_has_its_row_in_the_docs_and_each_row_its_metric() {
        let documented: BTreeSet<String> = include_str!("../../../docs/metrics.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .filter_map(|line| line.split(['`', '{']).next())
            .map(str::to_owned)
            .collect();
        assert_eq!(published_names(), documented);
    }

    #[test]
    fn the_test_above_touches_every_family() {
        let source = include_str!("metrics.rs")
            .split("mod tests")
            .next()
            .unwrap();
        let rows = ["r.register(\"", "r.register_with_unit(\"", "seconds(\""];
        let registered: usize = rows.iter().map(|row| source.matches(row).count()).sum();
        assert_eq!(published_names().len(), registered);
    }

    #[test]
    fn a_worker_s_series_go_when_it_detaches() {
        let metrics = Metrics::new();
        let worker = metrics.worker("w\"0\n", 16, 100);
        worker.report(3, 0, 0.25);
        let text = metrics.encode().unwrap();
        assert!(text.contains("orchestra_workers 1\n"), "{text}");
        assert!(
            text.contains(r#"orchestra_kv_cache_usage_ratio{worker="w\"0\n"} 0.25"#),
            "{text}"
        );
        drop(worker);
        let text = metrics.encode().unwrap();
        assert!(!text.contains("worker="), "{text}");
        assert!(text.contains("orchestra_workers 0\n"), "{text}");
    }

    #[test]
    fn gauges_count_back_down() {
        let metrics = Metrics::new();
        let guard = InFlight::new(&metrics.requests_running);
        assert_eq!(metrics.requests_running.get(), 1);
        drop(guard);
        assert_eq!(metrics.requests_running.get(), 0);
    }
}
