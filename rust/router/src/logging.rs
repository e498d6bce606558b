//! Sets up `tracing` for the process. Only `main` calls it: using the router as a library prints nothing.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::{
    EnvFilter, Registry, filter::ParseError, fmt, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

use crate::config::{LogConfig, LogFormat};

/// Directives that hold unless the filter names the same target: these crates warn about what clients do.
const QUIET: &str = "hyper=error,h2=error,tower=error";

/// Reads a level or directives; what the filter says wins over [`QUIET`].
pub(crate) fn parse_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(format!("{QUIET},{filter}"))
}

/// Why the filter was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It is neither a level nor directives.
    #[error("not a level or directives")]
    Filter(#[from] ParseError),
    /// Someone else set up the process's logs.
    #[error("the logs of this process are not the router's")]
    NotOurs,
}

/// Changes what is logged while the process runs. The default one has no logs to change.
#[derive(Clone, Debug, Default)]
pub struct LogControl(Option<reload::Handle<EnvFilter, Registry>>);

impl LogControl {
    /// From now on this filter holds.
    ///
    /// # Errors
    /// A filter that cannot be read, or a process whose logs are not ours; nothing changes then.
    pub fn set(&self, filter: &str) -> Result<(), LogError> {
        let filter = parse_filter(filter)?;
        let handle = self.0.as_ref().ok_or(LogError::NotOurs)?;
        handle.reload(filter).map_err(|_| LogError::NotOurs)
    }
}

/// Sends logs to standard error. Does nothing where the process has a subscriber already, and nothing for a filter
/// that cannot be read, which [`crate::config::RouterConfig::validate`] reports.
pub fn init(config: &LogConfig) -> LogControl {
    let Ok(filter) = parse_filter(&config.filter) else {
        return LogControl::default();
    };
    let (filter, handle) = reload::Layer::new(filter);
    let is_terminal = io::stderr().is_terminal();
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(is_terminal);
    let logs = tracing_subscriber::registry().with(filter);
    let installed = match config.format {
        LogFormat::Text => logs.with(lines).try_init(),
        LogFormat::Json => logs.with(lines.json().flatten_event(true)).try_init(),
    };
    // An error means that a subscriber is installed, which then stays.
    LogControl(installed.is_ok().then_some(handle))
}
