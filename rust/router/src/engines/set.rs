//! The engines of a router: added, drained, removed and listed here.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use orchestra_core::{Time, config::ConfigIssue, scheduler::WorkerId};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;
use serde::Serialize;

use super::{
    budget::RetryBudget,
    compare,
    config::{EngineConfig, EngineLimits},
    connect::{Network, Tcp},
    engine::{Engine, EngineKind, EngineWorker},
    health,
    url::EngineUrl,
};
use crate::state::RouterState;

/// Engines of a model that are asked where any of them will do.
const WORKERS_ASKED_MAX: usize = 3;
/// Most engines of a router.
const ENGINES_MAX: usize = 4096;

/// Why an engine was not added, drained or removed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// Its settings cannot be used.
    #[error("the engine's settings cannot be used")]
    Invalid(Vec<ConfigIssue>),
    /// One with this URL is here already.
    #[error("an engine with this URL is here already")]
    Duplicate,
    /// None with this URL is here.
    #[error("there is no engine with this URL")]
    Unknown,
    /// There are as many as there may be.
    #[error("there are {ENGINES_MAX} engines already, the most that there may be")]
    TooMany,
}

/// An engine as operators see it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineStatus {
    /// Its settings; keys do not show.
    pub config: EngineConfig,
    /// What it is.
    pub kind: EngineKind,
    /// It answers.
    pub is_up: bool,
    /// It takes no new requests, because an operator said so.
    pub is_draining: bool,
    /// `closed`, `open` or `half_open`.
    pub breaker: &'static str,
    /// Its models.
    pub models: Vec<String>,
    /// Requests on it now.
    pub num_running: u32,
}

/// The engines of a router.
pub struct Engines {
    pub(crate) limits: EngineLimits,
    network: Network,
    pub(super) set: RwLock<BTreeMap<EngineUrl, Arc<Engine>>>,
    pub(super) workers: RwLock<FxHashMap<WorkerId, Arc<EngineWorker>>>,
    budget: Mutex<RetryBudget>,
    pub(super) num_available: AtomicUsize,
    is_comparing: AtomicBool,
}

impl Default for Engines {
    fn default() -> Self {
        Self::new(EngineLimits::default())
    }
}

impl Engines {
    /// No engines yet.
    pub fn new(limits: EngineLimits) -> Self {
        Self::on_network(limits, Arc::new(Tcp))
    }

    /// As [`Self::new`], on another network than TCP.
    pub fn on_network(limits: EngineLimits, network: Network) -> Self {
        Self {
            budget: Mutex::new(RetryBudget::new(limits.retry_percent)),
            limits,
            network,
            set: RwLock::default(),
            workers: RwLock::default(),
            num_available: AtomicUsize::new(0),
            is_comparing: AtomicBool::new(false),
        }
    }

    /// Whether some engine takes requests.
    pub(crate) fn has_available(&self) -> bool {
        self.num_available.load(Ordering::Relaxed) > 0
    }

    /// The engine and model behind a worker that the scheduler chose.
    pub(crate) fn worker(&self, id: WorkerId) -> Option<Arc<EngineWorker>> {
        self.workers.read().get(&id).cloned()
    }

    /// A few engines of a model.
    pub(crate) fn workers_of(&self, model: &str) -> Vec<Arc<EngineWorker>> {
        let workers = self.workers.read();
        let of_model = workers.values().filter(|worker| worker.model == model);
        of_model.take(WORKERS_ASKED_MAX).cloned().collect()
    }

    /// A request came in; it counts towards the retries that there may be.
    pub(crate) fn count_request(&self, now: Time) {
        self.budget.lock().request(now);
    }

    /// Takes a retry out of the budget; false where it is used up.
    pub(crate) fn take_retry(&self, now: Time) -> bool {
        self.budget.lock().take(now)
    }

    fn get(&self, url: &EngineUrl) -> Result<Arc<Engine>, EngineError> {
        self.set
            .read()
            .get(url)
            .cloned()
            .ok_or(EngineError::Unknown)
    }
}

impl RouterState {
    /// Adds an engine. It gets requests once it answers, which is looked after from now on.
    pub fn add_engine(self: &Arc<Self>, config: EngineConfig) -> Result<(), EngineError> {
        config.validate().map_err(EngineError::Invalid)?;
        let engines = &self.engines;
        let mut set = engines.set.write();
        if set.contains_key(&config.url) {
            return Err(EngineError::Duplicate);
        }
        if set.len() >= ENGINES_MAX {
            return Err(EngineError::TooMany);
        }
        let url = config.url.clone();
        let engine = Arc::new(Engine::new(
            config,
            Arc::clone(&engines.network),
            &self.metrics.engines,
        ));
        tracing::info!(%url, "engine added");
        set.insert(url, Arc::clone(&engine));
        drop(set);
        self.tasks
            .spawn(health::look_after(Arc::clone(self), engine));
        if !engines.is_comparing.swap(true, Ordering::Relaxed) {
            self.tasks.spawn(compare::compare(Arc::clone(self)));
        }
        Ok(())
    }

    /// Lets an engine take no new requests, or take them again. What runs on it goes on.
    pub fn drain_engine(&self, url: &EngineUrl, is_draining: bool) -> Result<(), EngineError> {
        let engine = self.engines.get(url)?;
        let mut status = engine.status.lock();
        status.is_draining = is_draining;
        self.publish(&engine, &mut status);
        tracing::info!(%url, is_draining, "engine drains, or takes requests again");
        Ok(())
    }

    /// Takes an engine off the router. What runs on it goes elsewhere.
    pub fn remove_engine(&self, url: &EngineUrl) -> Result<(), EngineError> {
        let removed = self.engines.set.write().remove(url);
        let engine = removed.ok_or(EngineError::Unknown)?;
        engine.removed.cancel();
        engine.forget_connections();
        let mut status = engine.status.lock();
        status.is_up = false;
        self.publish(&engine, &mut status);
        for worker in std::mem::take(&mut status.workers) {
            self.detach_model(&worker);
        }
        tracing::info!(%url, "engine removed");
        Ok(())
    }

    /// The engines, by URL.
    pub fn list_engines(&self) -> Vec<EngineStatus> {
        let engines: Vec<_> = self.engines.set.read().values().cloned().collect();
        let status_of = |engine: &Arc<Engine>| {
            let status = engine.status.lock();
            EngineStatus {
                config: engine.config.clone(),
                kind: status.kind,
                is_up: status.is_up,
                is_draining: status.is_draining,
                breaker: status.breaker.state().as_str(),
                models: status
                    .workers
                    .iter()
                    .map(|worker| worker.model.clone())
                    .collect(),
                num_running: engine.series.running.get().try_into().unwrap_or(0),
            }
        };
        engines.iter().map(status_of).collect()
    }
}
