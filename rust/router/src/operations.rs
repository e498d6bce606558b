//! What an operator changes while the router runs: the settings, read again, and what is logged.

use std::{
    ffi::OsString,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use crate::{
    config::{LoadError, Loaded, Setting, load},
    logging::LogControl,
    settings::LIVE,
    state::RouterState,
};

/// The process's side of the settings.
#[derive(Debug, Default)]
pub struct Operations {
    pub(crate) log: LogControl,
    /// Those in effect, with their sources.
    settings: Mutex<Arc<[Setting]>>,
}

impl Operations {
    /// `settings` are those that the router starts with.
    pub fn new(log: LogControl, settings: Vec<Setting>) -> Self {
        Self {
            log,
            settings: Mutex::new(settings.into()),
        }
    }

    pub(crate) fn settings(&self) -> Arc<[Setting]> {
        Arc::clone(&self.settings.lock())
    }

    /// Reads everything again, as the process did at start from the same `args`. What may change counts from the next
    /// request on; what needs a restart is named and kept. Settings that cannot be used change nothing.
    pub(crate) async fn reload(&self, state: &Arc<RouterState>, args: Vec<OsString>) {
        let loaded = state.tasks.run_blocking(move || load(&args)).await;
        let is_applied = match loaded {
            Ok(Ok(loaded)) => {
                self.apply(state, loaded);
                true
            }
            Ok(Err(LoadError::Config(issues))) => {
                for issue in issues {
                    tracing::error!(
                        key = issue.key,
                        reason = issue.message,
                        "setting not usable"
                    );
                }
                false
            }
            // The arguments are those that the process started with.
            Ok(Err(LoadError::Usage(error))) => {
                tracing::error!(kind = ?error.kind(), "settings not usable");
                false
            }
            Err(error) => {
                tracing::error!(%error, "settings not read");
                false
            }
        };
        if is_applied {
            tracing::info!("settings read again");
        } else {
            tracing::error!("nothing changed: the settings cannot be used");
        }
        state.observers().reopen();
        state.metrics.operation.reloaded(is_applied);
        if is_applied {
            state.metrics.operation.settings_read_at(unix_seconds());
        }
    }

    fn apply(&self, state: &Arc<RouterState>, loaded: Loaded) {
        let mut settings = self.settings.lock();
        let kept = take_live(&settings, loaded.settings);
        for key in &kept.needs_restart {
            tracing::warn!(
                key,
                "the setting changed, which takes a restart: the old value is kept"
            );
        }
        let before = &state.settings().engines;
        state.set_settings((&loaded.config).into());
        state.change_engines(before, &state.settings().engines);
        if let Err(error) = self.log.set(&loaded.config.log.filter) {
            tracing::warn!(%error, "the log filter is kept");
        }
        *settings = kept.settings.into();
    }
}

struct Kept {
    settings: Vec<Setting>,
    needs_restart: Vec<String>,
}

/// The new settings where they may change while the router runs, the old ones where not.
fn take_live(old: &[Setting], new: Vec<Setting>) -> Kept {
    let mut needs_restart = Vec::new();
    let settings = new.into_iter().map(|setting| {
        let key = setting.key.as_str();
        match old.iter().find(|old| old.key == key) {
            Some(old) if !LIVE.contains(&key) && old.values != setting.values => {
                needs_restart.push(setting.key);
                old.clone()
            }
            _ => setting,
        }
    });
    Kept {
        settings: settings.collect(),
        needs_restart,
    }
}

/// Now, as Prometheus counts time.
pub(crate) fn unix_seconds() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command};

    use super::*;
    use crate::config::{RouterConfig, Source};

    #[test]
    fn each_live_key_is_a_setting() {
        let command = RouterConfig::augment_args(Command::new("orchestra-router"));
        let known: Vec<_> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long())
            .map(|long| long.replace('-', "_"))
            .collect();
        for key in LIVE {
            assert!(known.iter().any(|known| known == key), "{key}");
        }
    }

    #[test]
    fn only_live_settings_change() {
        let setting = |key: &str, value: &str, source: Source| Setting {
            key: key.to_owned(),
            values: vec![value.to_owned()],
            is_list: false,
            source,
        };
        let old = [
            setting("http", "127.0.0.1:8000", Source::Default),
            setting("grpc", "127.0.0.1:8001", Source::Default),
            setting("log", "info", Source::Default),
        ];
        let new = vec![
            setting("http", "127.0.0.1:9000", Source::Flag),
            setting("grpc", "127.0.0.1:8001", Source::Flag),
            setting("log", "debug", Source::Flag),
        ];
        let kept = take_live(&old, new.clone());
        assert_eq!(kept.needs_restart, ["http"]);
        assert_eq!(
            kept.settings,
            [old[0].clone(), new[1].clone(), new[2].clone()]
        );
    }
}
