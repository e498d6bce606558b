//! What the process prints.

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
