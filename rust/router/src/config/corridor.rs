//! Bounds on requests.

use super::Span;
use crate::state::CorridorLimits;

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
    /// How long a request whose worker was lost waits for one to come, and from the loss on one that found no other.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_REPLAY_WAIT")]
    #[arg(default_value_t = Self::default().replay_wait)]
    pub replay_wait: Span,
    /// Refuse a request at once whose first token is predicted to come too late for it.
    #[arg(long, env = "ORCHESTRA_REFUSE_HOPELESS")]
    pub refuse_hopeless: bool,
    /// The longest that a worker waits for KV that another one holds, before it computes for itself; at most 60s.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_FETCH_WAIT_MAX")]
    #[arg(default_value_t = Self::default().fetch_wait_max)]
    pub fetch_wait_max: Span,
    /// The longest that a worker waits for KV that another one is to compute for it; at most 60s.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_SPLIT_WAIT_MAX")]
    #[arg(default_value_t = Self::default().split_wait_max)]
    pub split_wait_max: Span,
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
            refuse_hopeless: limits.refuse_hopeless,
            fetch_wait_max: Span(limits.fetch_wait_max),
            split_wait_max: Span(limits.split_wait_max),
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
            refuse_hopeless: self.refuse_hopeless,
            fetch_wait_max: self.fetch_wait_max.0,
            split_wait_max: self.split_wait_max.0,
        }
    }
}
