//! What an engine's successes and failures mean for the requests that it gets.

use std::sync::{Arc, atomic::Ordering};

use super::{
    engine::{Engine, EngineWorker, Status},
    probe::Identity,
};
use crate::state::RouterState;

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

/// Engines that have a model in common.
#[derive(Clone, Copy, Debug, Default)]
struct Peers {
    all: usize,
    /// Those of them that take requests.
    available: usize,
}

impl RouterState {
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
        let peers = self.count_peers(engine);
        let num_out = peers.all - peers.available;
        (num_out + 1) * 2 <= peers.all
    }

    /// The engines of the same models, itself among them.
    fn count_peers(&self, engine: &Engine) -> Peers {
        let models: Vec<_> = engine.status.lock().workers.clone();
        let engines: Vec<_> = self.engines.set.read().values().cloned().collect();
        let mut peers = Peers::default();
        for peer in engines {
            let status = peer.status.lock();
            let is_peer =
                |worker: &Arc<EngineWorker>| models.iter().any(|own| own.model == worker.model);
            if status.workers.iter().any(is_peer) {
                peers.all += 1;
                peers.available += usize::from(status.is_available());
            }
        }
        peers
    }

    /// The engine answers, and says this of itself.
    pub(super) fn engine_up(&self, engine: &Arc<Engine>, identity: &Identity) {
        let mut status = engine.status.lock();
        // It may have been removed while it was asked.
        if engine.removed.is_cancelled() {
            return;
        }
        let was_up = status.is_up;
        status.kind = identity.kind;
        self.update_models(engine, &mut status, &identity.models);
        status.is_up = true;
        status.away_since = None;
        engine.come_back();
        if !was_up {
            status.breaker.come_back();
            status.window.clear();
            let models: Vec<_> = status.workers.iter().map(|worker| &worker.model).collect();
            tracing::info!(url = %engine.config.url, kind = ?status.kind, ?models, "engine up");
        }
        self.publish(engine, &mut status);
    }

    /// The engine does not answer as it should. Where it has given no sign of life for the stall timeout, requests that
    /// it was given before leave it too, if there is another engine for them.
    pub(super) fn engine_down(&self, engine: &Engine, reason: &str) {
        engine.forget_connections();
        let now = self.clock.now();
        let mut status = engine.status.lock();
        if std::mem::replace(&mut status.is_up, false) {
            tracing::warn!(url = %engine.config.url, reason, "engine down");
        }
        let since = *status.away_since.get_or_insert(now);
        self.publish(engine, &mut status);
        drop(status);
        let is_silent =
            now - since >= self.engines.limits.stall_timeout && !engine.was_heard_since(since);
        if is_silent && self.count_peers(engine).available > 0 {
            engine.lose();
        }
    }

    /// What has to be done now and then.
    pub(super) fn engine_tick(&self, engine: &Engine) {
        engine.sweep();
        let mut status = engine.status.lock();
        status.breaker.advance(self.clock.now());
        self.publish(engine, &mut status);
    }

    /// Tells the scheduler and the metrics where an engine takes requests now and did not, or the other way round.
    pub(super) fn publish(&self, engine: &Engine, status: &mut Status) {
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
}
