//! The engines of a router: who they are, which of them take requests, and what failures mean for that.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use orchestra_core::{
    Time,
    config::ConfigIssue,
    scheduler::{NAME_BYTES_MAX, WorkerId},
};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;
use serde::Serialize;
use tokio::time::{self, MissedTickBehavior};

use super::{
    breaker::BreakerState,
    budget::RetryBudget,
    caching::Caching,
    config::{EngineConfig, EngineLimits},
    connect::{Network, Tcp},
    engine::{Engine, EngineKind, EngineWorker, Status},
    exact, health,
    outlier::outliers,
    probe::{EngineModel, Identity},
    url::EngineUrl,
};
use crate::{models::ForeignModelError, state::RouterState};

/// Most engines of a router.
const ENGINES_MAX: usize = 4096;
/// "Tokens" of a chunk of text, each four bytes of it: the scheduler's block on engines.
pub(crate) const CHUNK_TOKENS: u32 = 32;
/// KV blocks of an engine that does not say how many it has: more than any has.
pub(super) const NUM_BLOCKS_UNKNOWN: u32 = 1 << 24;
/// Chunks that an engine is taken to remember at most: 2 MiB of text, which is about half a million tokens.
pub(super) const CHUNKS_ASSUMED_MAX: u32 = 16 << 10;
/// How often the engines are compared with each other.
const COMPARISON_PERIOD: Duration = Duration::from_secs(1);

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
    set: RwLock<BTreeMap<EngineUrl, Arc<Engine>>>,
    workers: RwLock<FxHashMap<WorkerId, Arc<EngineWorker>>>,
    budget: Mutex<RetryBudget>,
    num_available: AtomicUsize,
    is_comparing: AtomicBool,
}

impl Default for Engines {
    fn default() -> Self {
        Self::new(EngineLimits::default())
    }
}

/// What a request says about the engine that it ran on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It answered.
    Fine,
    /// It could not be reached, or its connection broke.
    Unreachable,
    /// It answered with an error of its own, with what is no answer, or too late.
    Failed,
    /// Nothing: the client left, or the request was wrong.
    Nothing,
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
            self.tasks.spawn(compare(Arc::clone(self)));
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

    /// A request is about to go to the engine; false where it must not.
    pub(crate) fn engine_begin(&self, engine: &Engine) -> bool {
        let mut status = engine.status.lock();
        let passes = status.is_up && status.breaker.begin();
        self.publish(engine, &mut status);
        passes
    }

    /// A request on the engine has ended.
    pub(crate) fn engine_end(&self, engine: &Engine, verdict: Verdict) {
        let may_open = match verdict {
            Verdict::Fine | Verdict::Nothing => false,
            // Whether it is there at all does not depend on the others.
            Verdict::Unreachable => true,
            Verdict::Failed => self.may_lose(engine),
        };
        let now = self.clock.now();
        let mut status = engine.status.lock();
        let before = status.breaker.state();
        match verdict {
            Verdict::Fine => {
                status.breaker.succeed();
                status.window.record(now, false);
            }
            Verdict::Unreachable | Verdict::Failed => {
                status.breaker.fail(now, may_open);
                status.window.record(now, true);
            }
            Verdict::Nothing => status.breaker.abandon(),
        }
        let after = status.breaker.state();
        if before != after {
            let url = &engine.config.url;
            tracing::info!(%url, breaker = after.as_str(), "engine's circuit breaker changed");
        }
        self.publish(engine, &mut status);
        drop(status);
        if verdict == Verdict::Unreachable {
            engine.doubted.notify_one();
        }
    }

    /// Whether at least half of the engines of the same models would be left without this one.
    fn may_lose(&self, engine: &Engine) -> bool {
        let models: Vec<_> = engine.status.lock().workers.clone();
        let engines: Vec<_> = self.engines.set.read().values().cloned().collect();
        let (mut num_all, mut num_out) = (0, 0);
        for peer in engines {
            let status = peer.status.lock();
            let is_peer =
                |worker: &Arc<EngineWorker>| models.iter().any(|own| own.model == worker.model);
            if status.workers.iter().any(is_peer) {
                num_all += 1;
                num_out += usize::from(!status.is_available());
            }
        }
        (num_out + 1) * 2 <= num_all
    }

    /// The engine answers, and says this of itself.
    pub(super) fn engine_up(&self, engine: &Arc<Engine>, identity: Identity) {
        let mut status = engine.status.lock();
        // It may have been removed while it was asked.
        if engine.removed.is_cancelled() {
            return;
        }
        let was_up = status.is_up;
        status.kind = identity.kind;
        self.update_models(engine, &mut status, &identity.models);
        status.is_up = true;
        if !was_up {
            status.breaker.come_back();
            status.window.clear();
            let models: Vec<_> = status.workers.iter().map(|worker| &worker.model).collect();
            tracing::info!(url = %engine.config.url, kind = ?status.kind, ?models, "engine up");
        }
        self.publish(engine, &mut status);
    }

    /// The engine does not answer as it should.
    pub(super) fn engine_down(&self, engine: &Engine, reason: &str) {
        engine.forget_connections();
        let mut status = engine.status.lock();
        if std::mem::replace(&mut status.is_up, false) {
            tracing::warn!(url = %engine.config.url, reason, "engine down");
        }
        self.publish(engine, &mut status);
    }

    /// What has to be done now and then.
    pub(super) fn engine_tick(&self, engine: &Engine) {
        engine.sweep();
        let mut status = engine.status.lock();
        status.breaker.advance(self.clock.now());
        self.publish(engine, &mut status);
    }

    /// Tells the scheduler where an engine takes requests now and did not, or the other way round.
    fn publish(&self, engine: &Engine, status: &mut Status) {
        let shown = (status.is_up, status.breaker.state());
        if status.shown != Some(shown) {
            status.shown = Some(shown);
            engine.series.report(shown.0, shown.1.as_str());
        }
        let is_available = status.is_available() && !status.workers.is_empty();
        if is_available == status.was_available {
            return;
        }
        status.was_available = is_available;
        for worker in &status.workers {
            self.workers.set_foreign_available(worker.id, is_available);
        }
        let count = &self.engines.num_available;
        if is_available {
            count.fetch_add(1, Ordering::Relaxed);
        } else {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes in the models that the engine has now, and lets go of those that it had.
    fn update_models(&self, engine: &Arc<Engine>, status: &mut Status, models: &[EngineModel]) {
        let is_listed =
            |worker: &Arc<EngineWorker>| models.iter().any(|model| model.id == worker.model);
        let (kept, gone) = std::mem::take(&mut status.workers)
            .into_iter()
            .partition(is_listed);
        status.workers = kept;
        gone.iter().for_each(|worker| self.detach_model(worker));
        for model in models {
            if status.workers.iter().any(|worker| worker.model == model.id) {
                continue;
            }
            // Events tell of the engine's one cache, which its first model fills; the others are adapters of that.
            let has_events = engine.has_events() && models[0].id == model.id;
            match self.attach_model(engine, model, has_events) {
                Ok(worker) => {
                    self.workers
                        .set_foreign_available(worker.id, status.was_available);
                    status.workers.push(worker);
                }
                Err(error) => {
                    let (url, model) = (&engine.config.url, &model.id);
                    tracing::warn!(%url, model, %error, "the engine's model is not served");
                }
            }
        }
    }

    fn attach_model(
        &self,
        engine: &Arc<Engine>,
        model: &EngineModel,
        has_events: bool,
    ) -> Result<Arc<EngineWorker>, AttachModelError> {
        let name = worker_name(engine.config.url.as_str(), &model.id);
        let spec = exact::spec(engine, name.clone(), &model.id, has_events);
        let id = self.workers.add_foreign(spec.clone())?;
        let text = engine.text.get();
        let attached = self
            .models
            .attach_foreign(&model.id, id, model.max_model_len, text);
        if let Err(error) = attached {
            self.workers.remove_foreign(id);
            return Err(error.into());
        }
        let series = self.metrics.kv_events.cache(&name);
        let worker = Arc::new(EngineWorker {
            id,
            caching: Arc::new(Caching::new(name.clone(), has_events, series)),
            name,
            model: model.id.clone(),
            engine: Arc::clone(engine),
            gone: engine.removed.child_token(),
        });
        if has_events {
            self.follow_kv_events(&worker, spec);
        }
        self.engines.workers.write().insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    fn detach_model(&self, worker: &EngineWorker) {
        worker.gone.cancel();
        self.engines.workers.write().remove(&worker.id);
        self.workers.remove_foreign(worker.id);
        self.models.detach_foreign(&worker.model, worker.id);
    }
}

/// Why a model of an engine is not served.
#[derive(Debug, thiserror::Error)]
enum AttachModelError {
    #[error(transparent)]
    Scheduler(#[from] orchestra_core::scheduler::SchedulerError),
    #[error(transparent)]
    Model(#[from] ForeignModelError),
}

/// Unique, the same after a restart, and within the length of a name.
fn worker_name(url: &str, model: &str) -> String {
    let name = format!("{url} {model}");
    if name.len() <= NAME_BYTES_MAX {
        return name;
    }
    let hash = orchestra_core::hash::SeedParts {
        model,
        ..Default::default()
    };
    let room = NAME_BYTES_MAX - 17;
    format!("{} {:016x}", &url[..url.len().min(room)], hash.seed().0)
}

/// Compares the engines of each model with each other, and ejects those that fail much more often.
async fn compare(state: Arc<RouterState>) {
    let shutdown = state.tasks.shutdown_token().clone();
    let mut ticks = time::interval(COMPARISON_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let comparing = async {
        loop {
            ticks.tick().await;
            state.eject_outliers();
        }
    };
    let _: Option<()> = shutdown.run_until_cancelled(comparing).await;
}

impl RouterState {
    fn eject_outliers(&self) {
        let now = self.clock.now();
        let engines: Vec<_> = self.engines.set.read().values().cloned().collect();
        let mut pools: BTreeMap<String, Vec<&Arc<Engine>>> = BTreeMap::new();
        for engine in &engines {
            for worker in &engine.status.lock().workers {
                pools.entry(worker.model.clone()).or_default().push(engine);
            }
        }
        for pool in pools.values() {
            let tallies: Vec<_> = pool
                .iter()
                .map(|engine| engine.status.lock().window.tally(now))
                .collect();
            let is_out = |engine: &&&Arc<Engine>| !engine.status.lock().is_available();
            let num_out = pool.iter().filter(is_out).count();
            for index in outliers(&tallies, num_out) {
                let engine = pool[index];
                let mut status = engine.status.lock();
                if status.breaker.state() != BreakerState::Closed {
                    continue;
                }
                status.breaker.open(now);
                status.window.clear();
                self.metrics.engines.ejected();
                let (url, tally) = (&engine.config.url, tallies[index]);
                tracing::warn!(%url, requests = tally.requests, failures = tally.failures, "engine ejected: it fails much more often than the others");
                self.publish(engine, &mut status);
            }
        }
    }
}
