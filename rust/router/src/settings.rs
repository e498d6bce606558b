//! The settings that may change while the router runs. A request looks when it needs one; what it has taken it keeps.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::{
    auth::ApiKeys,
    config::{ListenConfig, ObserveConfig, RouterConfig},
    engines::EngineConfig,
    state::CorridorLimits,
};

/// The keys whose new value counts from the next request, connection or worker on. The others need a restart: they
/// size or open something at start.
pub(crate) const LIVE: [&str; 20] = [
    "admin_key",
    "admin_key_file",
    "api_key",
    "api_key_file",
    "body_timeout",
    "drain_timeout",
    "explain_share",
    "hang_timeout",
    "header_timeout",
    "heartbeat_timeout",
    "idle_timeout",
    "log",
    "max_replays",
    "otlp_sample_share",
    "replay_wait",
    "request_timeout",
    "slow_total",
    "slow_ttft",
    "sse_keep_alive",
    "worker",
];

/// One state of them.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Bounds of the corridor.
    pub limits: CorridorLimits,
    /// What a connection may cost.
    pub listen: ListenConfig,
    /// What is written about requests.
    pub observe: ObserveConfig,
    /// The engines that the settings name.
    pub engines: Vec<EngineConfig>,
    /// Who may call.
    pub(crate) keys: ApiKeys,
    /// Who may operate.
    pub(crate) admin_keys: ApiKeys,
}

impl From<&RouterConfig> for Settings {
    fn from(config: &RouterConfig) -> Self {
        Self {
            limits: config.corridor.limits(),
            listen: config.listen.clone(),
            observe: config.observe.clone(),
            engines: config.engines.engines().collect(),
            keys: ApiKeys::new(&config.api_keys),
            admin_keys: ApiKeys::new(&config.admin_keys),
        }
    }
}

/// The settings in effect. Readers take a share and never wait for each other.
#[derive(Debug, Default)]
pub(crate) struct Live(RwLock<Arc<Settings>>);

impl Live {
    pub(crate) fn new(settings: Settings) -> Self {
        Self(RwLock::new(Arc::new(settings)))
    }

    /// As they are now.
    pub(crate) fn get(&self) -> Arc<Settings> {
        Arc::clone(&self.0.read())
    }

    /// From now on these count.
    pub(crate) fn set(&self, settings: Settings) {
        *self.0.write() = Arc::new(settings);
    }
}
