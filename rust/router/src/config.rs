//! The router's settings: one struct per concern, each default written once in its `Default`.
//!
//! Precedence is flag, then environment (`ORCHESTRA_…`), then default. The doc comment of a field is its help text.

mod units;

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use orchestra_core::config::ConfigIssue;

pub use self::units::{ByteSize, Secret, Span};
use crate::{engines::EnginesConfig, logging, state::CorridorLimits};

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
    /// Key that clients must send as `Authorization: Bearer KEY`; give it several times, or separated by commas,
    /// for several keys. Without any, everyone may call.
    #[arg(long = "api-key", value_name = "KEY", env = "ORCHESTRA_API_KEY")]
    #[arg(hide_env_values = true, value_delimiter = ',')]
    pub api_keys: Vec<Secret>,
    /// Print one line of JSON with the addresses once they are bound.
    #[arg(long)]
    pub print_addresses: bool,
}

/// The three listeners and what a connection may cost.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenConfig {
    /// OpenAI HTTP, health and metrics.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_HTTP")]
    #[arg(default_value_t = Self::default().http)]
    pub http: SocketAddr,
    /// gRPC `orchestra.v1.Inference`, health and reflection.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_GRPC")]
    #[arg(default_value_t = Self::default().grpc)]
    pub grpc: SocketAddr,
    /// Where workers attach. Whoever reaches it can serve models: keep it on an internal network.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_WORKERS")]
    #[arg(default_value_t = Self::default().workers)]
    pub workers: SocketAddr,
    /// Open connections per listener; more wait in the kernel's queue.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_MAX_CONNECTIONS")]
    #[arg(default_value_t = Self::default().max_connections)]
    pub max_connections: usize,
    /// The largest request body.
    #[arg(long, value_name = "SIZE", env = "ORCHESTRA_MAX_BODY_SIZE")]
    #[arg(default_value_t = Self::default().max_body_size)]
    pub max_body_size: ByteSize,
    /// How long a request's head may take to arrive, counted from the connection or from its first byte.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_HEADER_TIMEOUT")]
    #[arg(default_value_t = Self::default().header_timeout)]
    pub header_timeout: Span,
    /// How long a request's body may take to arrive.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_BODY_TIMEOUT")]
    #[arg(default_value_t = Self::default().body_timeout)]
    pub body_timeout: Span,
    /// How long an HTTP/1 connection may stay open between requests; above the 60 s of common load balancers, so
    /// that it is they who close.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_IDLE_TIMEOUT")]
    #[arg(default_value_t = Self::default().idle_timeout)]
    pub idle_timeout: Span,
    /// Silence after which a stream of events gets a comment, so that proxies keep it open.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_SSE_KEEP_ALIVE")]
    #[arg(default_value_t = Self::default().sse_keep_alive)]
    pub sse_keep_alive: Span,
    /// How long running requests may go on after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_DRAIN_TIMEOUT")]
    #[arg(default_value_t = Self::default().drain_timeout)]
    pub drain_timeout: Span,
}

impl Default for ListenConfig {
    fn default() -> Self {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            http: local(8000),
            grpc: local(8001),
            workers: local(8002),
            max_connections: 16_384,
            max_body_size: ByteSize(16 << 20),
            header_timeout: Span(Duration::from_secs(30)),
            body_timeout: Span(Duration::from_secs(30)),
            idle_timeout: Span(Duration::from_secs(120)),
            sse_keep_alive: Span(Duration::from_secs(15)),
            drain_timeout: Span(Duration::from_secs(30)),
        }
    }
}

/// [`CorridorLimits`] as flags; the defaults are its own.
#[derive(Clone, Debug, clap::Args)]
pub struct CorridorConfig {
    /// Requests that run at once; more wait.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_MAX_CONCURRENT_REQUESTS")]
    #[arg(default_value_t = Self::default().max_concurrent_requests)]
    pub max_concurrent_requests: usize,
    /// Requests that may wait; more are refused with `queue_full`.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_MAX_QUEUED_REQUESTS")]
    #[arg(default_value_t = Self::default().max_queued_requests)]
    pub max_queued_requests: usize,
    /// The longest a request may take; a client may ask for less.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_REQUEST_TIMEOUT")]
    #[arg(default_value_t = Self::default().request_timeout)]
    pub request_timeout: Span,
    /// A worker that sends nothing for this long is lost.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_HEARTBEAT_TIMEOUT")]
    #[arg(default_value_t = Self::default().heartbeat_timeout)]
    pub heartbeat_timeout: Span,
    /// A worker with running sequences that finishes no step for this long is lost.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_HANG_TIMEOUT")]
    #[arg(default_value_t = Self::default().hang_timeout)]
    pub hang_timeout: Span,
    /// How often a request may be continued on another worker.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_MAX_REPLAYS")]
    #[arg(default_value_t = Self::default().max_replays)]
    pub max_replays: u32,
    /// How long a request whose worker was lost waits for one to come.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_REPLAY_WAIT")]
    #[arg(default_value_t = Self::default().replay_wait)]
    pub replay_wait: Span,
}

impl Default for CorridorConfig {
    fn default() -> Self {
        let limits = CorridorLimits::default();
        Self {
            max_concurrent_requests: limits.max_concurrent_requests,
            max_queued_requests: limits.max_queued_requests,
            request_timeout: Span(limits.request_timeout),
            heartbeat_timeout: Span(limits.heartbeat_timeout),
            hang_timeout: Span(limits.hang_timeout),
            max_replays: limits.max_replays,
            replay_wait: Span(limits.replay_wait),
        }
    }
}

impl CorridorConfig {
    /// The limits as the corridor takes them.
    pub fn limits(&self) -> CorridorLimits {
        CorridorLimits {
            max_concurrent_requests: self.max_concurrent_requests,
            max_queued_requests: self.max_queued_requests,
            request_timeout: self.request_timeout.0,
            heartbeat_timeout: self.heartbeat_timeout.0,
            hang_timeout: self.hang_timeout.0,
            max_replays: self.max_replays,
            replay_wait: self.replay_wait.0,
        }
    }
}

/// What the process prints, always to standard error.
#[derive(Clone, Debug, clap::Args)]
pub struct LogConfig {
    /// What is logged: a level, or directives such as `info,orchestra_router=debug`.
    #[arg(long = "log", value_name = "FILTER", env = "ORCHESTRA_LOG")]
    #[arg(default_value_t = Self::default().filter)]
    pub filter: String,
    /// How it is written.
    #[arg(
        long = "log-format",
        value_name = "FORMAT",
        env = "ORCHESTRA_LOG_FORMAT"
    )]
    #[arg(value_enum, default_value_t = Self::default().format)]
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
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
        check(
            "grpc",
            apart(listen.grpc, listen.http),
            "the same address as http",
        );
        check(
            "workers",
            apart(listen.workers, listen.http),
            "the same address as http",
        );
        check(
            "workers",
            apart(listen.workers, listen.grpc),
            "the same address as grpc",
        );
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
        let runs_one = corridor.max_concurrent_requests > 0;
        check("max_concurrent_requests", runs_one, "must be at least 1");
        let tries_one = self.engines.engine_max_attempts > 0;
        check("engine_max_attempts", tries_one, "must be at least 1");
        check(
            "api_key",
            !self.api_keys.iter().any(Secret::is_empty),
            "must not be empty",
        );
        check(
            "log",
            logging::parse_filter(&self.log.filter).is_ok(),
            "not a level or directives",
        );
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }

    /// The time limits for which zero would mean "never works". A drain or a wait of zero has a meaning.
    fn spans(&self) -> [(&'static str, Span); 7] {
        let (listen, corridor) = (&self.listen, &self.corridor);
        [
            ("header_timeout", listen.header_timeout),
            ("body_timeout", listen.body_timeout),
            ("idle_timeout", listen.idle_timeout),
            ("sse_keep_alive", listen.sse_keep_alive),
            ("request_timeout", corridor.request_timeout),
            ("heartbeat_timeout", corridor.heartbeat_timeout),
            ("hang_timeout", corridor.hang_timeout),
        ]
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    fn parse(args: &[&str]) -> Result<RouterConfig, clap::Error> {
        let command = RouterConfig::augment_args(clap::Command::new("orchestra-router"));
        let matches = command.try_get_matches_from([&["orchestra-router"], args].concat())?;
        RouterConfig::from_arg_matches(&matches)
    }

    #[test]
    fn without_flags_every_setting_has_its_default() {
        let parsed = parse(&[]).unwrap();
        assert_eq!(
            format!("{parsed:?}"),
            format!("{:?}", RouterConfig::default())
        );
        assert_eq!(parsed.corridor.limits(), CorridorLimits::default());
        assert_eq!(parsed.validate(), Ok(()));
    }

    #[test]
    fn flags_reach_their_settings_and_keys_do_not_print() {
        let args = [
            "--http",
            "0.0.0.0:0",
            "--max-body-size",
            "1MiB",
            "--drain-timeout",
            "250ms",
        ];
        let keys = ["--api-key", "sk-a,sk-b", "--api-key", "sk-c"];
        let config = parse(&[&args[..], &keys[..]].concat()).unwrap();
        assert_eq!(config.listen.http, SocketAddr::from(([0, 0, 0, 0], 0)));
        assert_eq!(config.listen.max_body_size, ByteSize(1 << 20));
        assert_eq!(
            config.listen.drain_timeout,
            Span(Duration::from_millis(250))
        );
        assert_eq!(config.api_keys.len(), 3);
        assert!(!format!("{config:?}").contains("sk-"));
    }

    #[test]
    fn all_issues_are_reported_at_once() {
        let mut config = RouterConfig::default();
        config.listen.grpc = config.listen.http;
        config.listen.max_connections = 0;
        config.listen.max_body_size = ByteSize(0);
        config.listen.header_timeout = Span(Duration::ZERO);
        config.corridor.max_concurrent_requests = 0;
        config.log.filter = "a=b=c".to_owned();
        config.api_keys = vec!["".parse().unwrap()];
        let keys: Vec<_> = config
            .validate()
            .unwrap_err()
            .iter()
            .map(|issue| issue.key.clone())
            .collect();
        let expected = [
            "grpc",
            "max_connections",
            "max_body_size",
            "header_timeout",
            "max_concurrent_requests",
            "api_key",
            "log",
        ];
        assert_eq!(keys, expected);
    }
}
