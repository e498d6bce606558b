//! Letting an engine go without breaking what runs on it.

use std::{sync::Arc, time::Duration};

use super::{EngineConfig, EngineError, EngineUrl};
use crate::state::RouterState;

/// How often an engine that is to go is looked at for requests that still run.
const LOOK: Duration = Duration::from_millis(50);

impl RouterState {
    /// Drains the engine, and removes it once nothing runs on it or the drain timeout is over; what runs then goes on
    /// elsewhere. Where it is to be replaced by one with other settings, that comes then.
    ///
    /// # Errors
    /// There is no such engine, or its successor's settings cannot be used.
    pub fn retire_engine(
        self: &Arc<Self>,
        url: &EngineUrl,
        successor: Option<EngineConfig>,
    ) -> Result<(), EngineError> {
        if let Some(successor) = &successor {
            successor.validate().map_err(EngineError::Invalid)?;
        }
        self.drain_engine(url, true)?;
        let (state, url) = (Arc::clone(self), url.clone());
        let limit = self.settings().listen.drain_timeout.0;
        self.tasks.spawn(async move {
            let idle = async {
                while state.is_engine_busy(&url) {
                    tokio::time::sleep(LOOK).await;
                }
            };
            let shutdown = state.tasks.shutdown_token();
            let waited = tokio::time::timeout(limit, idle);
            if shutdown.run_until_cancelled(waited).await.is_none() {
                return;
            }
            // An operator may have removed it meanwhile.
            let _ = state.remove_engine(&url);
            if let Some(Err(error)) = successor.map(|config| state.add_engine(config)) {
                tracing::warn!(%url, %error, "engine not added");
            }
        });
        Ok(())
    }

    fn is_engine_busy(&self, url: &EngineUrl) -> bool {
        let engines = self.list_engines();
        let engine = engines.iter().find(|engine| engine.config.url == *url);
        engine.is_some_and(|engine| engine.num_running > 0)
    }

    /// Makes of the engines that the settings named those that they name now. Engines that were added by other means
    /// stay.
    pub(crate) fn change_engines(self: &Arc<Self>, before: &[EngineConfig], now: &[EngineConfig]) {
        let find = |engines: &[EngineConfig], url: &EngineUrl| {
            engines.iter().find(|engine| engine.url == *url).cloned()
        };
        for old in before {
            let new = find(now, &old.url);
            if new.as_ref() == Some(old) {
                continue;
            }
            if let Err(error) = self.retire_engine(&old.url, new) {
                tracing::warn!(url = %old.url, %error, "engine not changed");
            }
        }
        let is_new = |engine: &&EngineConfig| find(before, &engine.url).is_none();
        for engine in now.iter().filter(is_new) {
            if let Err(error) = self.add_engine(engine.clone()) {
                tracing::warn!(url = %engine.url, %error, "engine not added");
            }
        }
    }
}
