//! Sets up `tracing` for the process. Only `main` calls it: using the router as a library prints nothing.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::{EnvFilter, filter::ParseError, fmt};

use crate::config::{LogConfig, LogFormat};

/// Directives that hold unless the filter names the same target: these crates warn about what clients do.
const QUIET: &str = "hyper=error,h2=error,tower=error";

/// Reads a level or directives; what the filter says wins over [`QUIET`].
pub(crate) fn parse_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(format!("{QUIET},{filter}"))
}

/// Sends logs to standard error. Does nothing where the process has a subscriber already, and nothing for a filter
/// that cannot be read, which [`crate::config::RouterConfig::validate`] reports.
pub fn init(config: &LogConfig) {
    let Ok(filter) = parse_filter(&config.filter) else {
        return;
    };
    let is_terminal = io::stderr().is_terminal();
    let lines = fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(is_terminal);
    // An error means that a subscriber is installed, which then stays.
    let _ = match config.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
