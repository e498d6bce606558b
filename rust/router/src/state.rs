//! What every request and every worker session shares.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use orchestra_core::scheduler::SchedulerConfig;
use serde::{Deserialize, Serialize};

pub use crate::models::ModelInfo;
use crate::{
    clock::Clock,
    config::ObserveConfig,
    corridor::Admission,
    engines::Engines,
    metrics::Metrics,
    models::Models,
    observe::Observers,
    settings::{Live, Settings},
    tasks::Tasks,
    workers::Workers,
};

/// Bounds of the corridor. The router's configuration nests them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CorridorLimits {
    /// Requests that run at once; more wait.
    pub max_concurrent_requests: usize,
    /// Requests that may wait; more are refused with `queue_full`.
    pub max_queued_requests: usize,
    /// The longest a request may take; a client may ask for less.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// A worker that sends nothing for this long is lost.
    #[serde(with = "humantime_serde")]
    pub heartbeat_timeout: Duration,
    /// A worker with running sequences that finishes no step for this long is lost. One step of a long prefill on a
    /// CPU, or the first on a GPU, may take many seconds.
    #[serde(with = "humantime_serde")]
    pub hang_timeout: Duration,
    /// How often a request may be continued on another worker.
    pub max_replays: u32,
    /// How long a request whose worker was lost waits for one to come, and from the loss on one that found no other.
    #[serde(with = "humantime_serde")]
    pub replay_wait: Duration,
    /// Refuse a request at once whose first token is predicted to come too late for it.
    pub refuse_hopeless: bool,
    /// The longest that a worker waits for KV that another one holds, before it computes for itself; at most a minute.
    #[serde(with = "humantime_serde")]
    pub fetch_wait_max: Duration,
    /// The same for KV that another one has yet to compute for it.
    #[serde(with = "humantime_serde")]
    pub split_wait_max: Duration,
}

impl Default for CorridorLimits {
    fn default() -> Self {
        let scheduler = SchedulerConfig::default();
        Self {
            max_concurrent_requests: 1024,
            max_queued_requests: 4096,
            request_timeout: Duration::from_secs(600),
            heartbeat_timeout: Duration::from_millis(500),
            hang_timeout: Duration::from_secs(30),
            max_replays: 3,
            replay_wait: Duration::from_secs(10),
            refuse_hopeless: false,
            fetch_wait_max: Duration::from_millis(scheduler.fetch_wait_max_ms.into()),
            split_wait_max: Duration::from_millis(scheduler.split_wait_max_ms.into()),
        }
    }
}

/// The router's shared state.
pub struct RouterState {
    /// What `GET /metrics` shows.
    pub metrics: Metrics,
    /// Background tasks and the shutdown token.
    pub tasks: Tasks,
    /// The models served here.
    pub models: Models,
    pub(crate) admission: Arc<Admission>,
    pub(crate) workers: Arc<Workers>,
    pub(crate) engines: Engines,
    pub(crate) clock: Clock,
    settings: Live,
    observers: OnceLock<Arc<Observers>>,
}

impl RouterState {
    /// State without workers and models.
    pub fn new(limits: CorridorLimits, metrics: Metrics) -> Arc<Self> {
        Self::with_engines(limits, metrics, Engines::default())
    }

    /// As [`Self::new`], with other limits for foreign engines, or another network to them.
    pub fn with_engines(limits: CorridorLimits, metrics: Metrics, engines: Engines) -> Arc<Self> {
        Self::with_tasks(limits, metrics, engines, Tasks::default())
    }

    /// The same for a simulation, where all work is done on the one thread in one order.
    pub fn for_simulation(limits: CorridorLimits, metrics: Metrics) -> Arc<Self> {
        Self::simulated_with_engines(limits, metrics, Engines::default())
    }

    /// As [`Self::for_simulation`], with engines on the simulated network.
    pub fn simulated_with_engines(
        limits: CorridorLimits,
        metrics: Metrics,
        engines: Engines,
    ) -> Arc<Self> {
        Self::with_tasks(limits, metrics, engines, Tasks::on_one_thread())
    }

    fn with_tasks(
        limits: CorridorLimits,
        metrics: Metrics,
        engines: Engines,
        tasks: Tasks,
    ) -> Arc<Self> {
        let clock = Clock::start();
        Arc::new(Self {
            admission: Admission::new(&metrics, limits.max_queued_requests),
            workers: Workers::new(&limits, clock, metrics.kv_moves.clone()),
            settings: Live::new(Settings {
                limits,
                ..Settings::default()
            }),
            observers: OnceLock::new(),
            metrics,
            tasks,
            models: Models::default(),
            engines,
            clock,
        })
    }

    /// The settings in effect now.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.get()
    }

    /// From the next request on these settings count, as far as they may change while the router runs.
    pub fn set_settings(&self, settings: Settings) {
        self.workers
            .set_tenant_weights(&self.settings().tenants, &settings.tenants);
        self.observers().set_limits(&settings.observe);
        self.settings.set(settings);
    }

    /// Whether a request could be served now: a worker that takes work is attached, and no shutdown has begun.
    pub fn is_ready(&self) -> bool {
        let has_available = self.workers.has_available() || self.engines.has_available();
        has_available && !self.admission.is_draining()
    }

    /// Where the records of requests go; before [`Self::observe_by`], into memory only.
    pub(crate) fn observers(&self) -> &Arc<Observers> {
        self.observers.get_or_init(|| {
            let config = ObserveConfig::default();
            Arc::new(Observers::new(&config, self.metrics.clone(), None, None))
        })
    }

    /// The records of requests go there. To be called before the first of them.
    pub(crate) fn observe_by(&self, observers: Observers) {
        // It is set once, at start.
        let _ = self.observers.set(Arc::new(observers));
    }

    /// The models that a request could name now, by name.
    pub fn list_models(&self) -> Vec<ModelInfo> {
        let mut models = self.models.list();
        let is_up = |worker| {
            let worker = self.engines.worker(worker);
            worker.is_some_and(|worker| worker.engine.status.lock().is_up)
        };
        models.extend(self.models.list_foreign(is_up));
        models.sort_by(|a, b| a.id.cmp(&b.id));
        models
    }

    /// From now on new requests are refused with `shutting_down`; those that are in go on.
    pub fn begin_drain(&self) {
        self.admission.begin_drain();
    }

    /// Returns when no request runs or waits any more. To be called after [`Self::begin_drain`].
    pub async fn drained(&self) {
        self.admission.drained().await;
    }

    /// Ends what is left: streams get a `shutting_down` error, worker sessions close, tasks are joined.
    pub async fn shut_down(&self) {
        self.begin_drain();
        self.tasks.shut_down().await;
    }
}
