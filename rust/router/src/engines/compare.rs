//! The engines of each model beside each other: one that fails much more often is ejected.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::{self, MissedTickBehavior};

use super::{breaker::BreakerState, engine::Engine, outlier::outliers};
use crate::state::RouterState;

/// How often the engines are compared with each other.
const COMPARISON_PERIOD: Duration = Duration::from_secs(1);

/// Compares the engines of each model with each other, and ejects those that fail much more often.
pub(super) async fn compare(state: Arc<RouterState>) {
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
