//! The router's settings: one struct per concern, each default written once in its `Default`.
//!
//! Precedence is flag, then environment (`ORCHESTRA_…`), then file, then default; [`load`] puts them together. A setting
//! has one name: the flag `--max-body-size` is `ORCHESTRA_MAX_BODY_SIZE` and the file's `max_body_size`. The doc comment
//! of a field is its help text.

mod corridor;
mod file;
mod listen;
mod load;
mod log;
mod observe;
mod sources;
#[cfg(test)]
mod tests;
mod units;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use orchestra_core::config::ConfigIssue;

pub use self::{
    corridor::CorridorConfig,
    listen::ListenConfig,
    load::{LoadError, Loaded, Task, load},
    log::{LogConfig, LogFormat},
    observe::ObserveConfig,
    sources::{Setting, Source, to_toml},
    units::{ByteSize, Secret, Span},
};
pub(crate) use self::{load::join, units::secrets};
use crate::{
    engines::EnginesConfig,
    logging,
    tenants::{self, TenantConfig},
};

/// For so long, at most, workers let others touch a block of KV.
const MOVE_WAIT_MAX: Duration = Duration::from_secs(60);

/// All settings of `orchestra-router`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RouterConfig {
    /// Where clients and workers connect.
    #[command(flatten)]
    pub listen: ListenConfig,
    /// Bounds on requests.
    #[command(flatten)]
    pub corridor: CorridorConfig,
    /// Foreign engines.
    #[command(flatten)]
    pub engines: EnginesConfig,
    /// What the process prints.
    #[command(flatten)]
    pub log: LogConfig,
    /// What it writes about requests.
    #[command(flatten)]
    pub observe: ObserveConfig,
    /// Key that clients must send as `Authorization: Bearer KEY`; give it several times, or separated by commas,
    /// for several keys. Without any, everyone may call.
    #[arg(long = "api-key", value_name = "KEY", env = "ORCHESTRA_API_KEY")]
    #[arg(hide_env_values = true, value_delimiter = ',')]
    pub api_keys: Vec<Secret>,
    /// A file with further keys, one per line.
    #[arg(long, value_name = "PATH", env = "ORCHESTRA_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Key for the operators' listener, as `--api-key` for clients. Without any, whoever reaches it may operate.
    #[arg(long = "admin-key", value_name = "KEY", env = "ORCHESTRA_ADMIN_KEY")]
    #[arg(hide_env_values = true, value_delimiter = ',')]
    pub admin_keys: Vec<Secret>,
    /// A file with further keys for operators, one per line.
    #[arg(long, value_name = "PATH", env = "ORCHESTRA_ADMIN_KEY_FILE")]
    pub admin_key_file: Option<PathBuf>,
    /// A TOML file with a table `[[tenant]]` for each tenant: its name, keys, weight and limits. The settings file may
    /// have such tables too.
    #[arg(long, value_name = "PATH", env = "ORCHESTRA_TENANTS_FILE")]
    pub tenants_file: Option<PathBuf>,
    /// What is in that file.
    #[arg(skip)]
    pub tenants: Vec<TenantConfig>,
    /// Believe the header `x-orchestra-tenant`: only where all requests come through something that sets it.
    #[arg(long, env = "ORCHESTRA_TRUST_TENANT_HEADER")]
    pub trust_tenant_header: bool,
}

impl RouterConfig {
    /// Everything that is wrong, found before a port is bound.
    pub fn validate(&self) -> Result<(), Vec<ConfigIssue>> {
        let mut issues = Vec::new();
        let mut check = |key, is_fine: bool, message: &str| {
            if !is_fine {
                issues.push(ConfigIssue::new(key, message));
            }
        };
        let listen = &self.listen;
        let apart = |a: SocketAddr, b: SocketAddr| a != b || a.port() == 0;
        let doors = listen.doors();
        for (index, &(door, address)) in doors.iter().enumerate() {
            for &(earlier, taken) in &doors[..index] {
                let message = format!("the same address as {earlier}");
                check(door, apart(address, taken), &message);
            }
        }
        check(
            "max_connections",
            listen.max_connections > 0,
            "must be at least 1",
        );
        let body_fits = listen.max_body_size >= ByteSize(1 << 10);
        check("max_body_size", body_fits, "must be at least 1KiB");
        for (key, span) in self.spans().into_iter().chain(self.engines.spans()) {
            check(
                key,
                span.0 >= Duration::from_millis(1),
                "must be at least 1ms",
            );
        }
        let corridor = &self.corridor;
        for (key, wait) in [
            ("fetch_wait_max", corridor.fetch_wait_max),
            ("split_wait_max", corridor.split_wait_max),
        ] {
            check(key, wait.0 <= MOVE_WAIT_MAX, "must be at most 60s");
        }
        let runs_one = corridor.max_concurrent_requests > 0;
        check("max_concurrent_requests", runs_one, "must be at least 1");
        for (key, share) in self.observe.shares() {
            let is_share = (0.0..=1.0).contains(&share);
            check(key, is_share, "must be between 0 and 1");
        }
        let endpoint = self.observe.otlp_endpoint.as_deref();
        check(
            "otlp_endpoint",
            endpoint.is_none_or(observe::is_endpoint),
            "must be a URL like http://localhost:4317",
        );
        let tries_one = self.engines.engine_max_attempts > 0;
        check("engine_max_attempts", tries_one, "must be at least 1");
        for (key, secrets) in [("api_key", &self.api_keys), ("admin_key", &self.admin_keys)] {
            check(
                key,
                !secrets.iter().any(Secret::is_empty),
                "must not be empty",
            );
        }
        check(
            "log",
            logging::parse_filter(&self.log.filter).is_ok(),
            "not a level or directives",
        );
        issues.extend(self.engines.engine_issues());
        issues.extend(tenants::validate(&self.tenants));
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }

    /// The time limits for which zero would mean "never works". A drain or a wait of zero has a meaning.
    fn spans(&self) -> [(&'static str, Span); 9] {
        let (listen, corridor) = (&self.listen, &self.corridor);
        [
            ("header_timeout", listen.header_timeout),
            ("body_timeout", listen.body_timeout),
            ("idle_timeout", listen.idle_timeout),
            ("sse_keep_alive", listen.sse_keep_alive),
            ("request_timeout", corridor.request_timeout),
            ("heartbeat_timeout", corridor.heartbeat_timeout),
            ("hang_timeout", corridor.hang_timeout),
            ("fetch_wait_max", corridor.fetch_wait_max),
            ("split_wait_max", corridor.split_wait_max),
        ]
    }
}
