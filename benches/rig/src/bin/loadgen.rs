//! `loadgen`: see [`orchestra_rig::load`].

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use orchestra_rig::load::{LoadConfig, Report, run};

/// A closed loop of keep-alive clients against an OpenAI-compatible server. Prints one JSON object.
#[derive(Debug, Parser)]
#[command(name = "loadgen", version)]
struct Cli {
    /// `HOST:PORT`; with several, clients are dealt out over them in turn.
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
    /// The model that requests name.
    #[arg(long, default_value = "mock")]
    model: String,
    /// Ask for streams.
    #[arg(long)]
    stream: bool,
    /// Bytes of a request's body, nearly.
    #[arg(long, default_value_t = 4096)]
    body_bytes: usize,
    /// Beginnings that prompts share; 0 makes every prompt unlike all others.
    #[arg(long, default_value_t = 32)]
    prefixes: usize,
    /// Bytes of such a beginning; half of a prompt unless given.
    #[arg(long)]
    prefix_bytes: Option<usize>,
    /// After so many requests the same ones come again; 0 is never.
    #[arg(long, default_value_t = 0)]
    distinct: u64,
    /// Words of each answer.
    #[arg(long, default_value_t = 8)]
    words: u32,
    /// Clients.
    #[arg(short, long, default_value_t = 16)]
    concurrency: usize,
    /// Requests in all; without it, as many as the duration has room for.
    #[arg(long)]
    count: Option<u64>,
    /// Seconds at most.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Check every word, and that it came once and in its place.
    #[arg(long)]
    check: bool,
    /// Chooses the prompts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that one answer may take.
    #[arg(long, default_value_t = 60.0)]
    timeout: f64,
    /// Threads that the clients are dealt out over.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match measure(cli) {
        Ok(report) => {
            let json = serde_json::to_string(&report).unwrap_or_default();
            let _ = writeln!(io::stdout(), "{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "loadgen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: Cli) -> io::Result<Report> {
    let seconds = |value: f64| {
        Duration::try_from_secs_f64(value)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    };
    let config = LoadConfig {
        targets: cli.targets,
        model: cli.model,
        streams: cli.stream,
        body_bytes: cli.body_bytes,
        prefixes: cli.prefixes,
        prefix_bytes: cli.prefix_bytes,
        distinct: cli.distinct,
        words: cli.words,
        concurrency: cli.concurrency,
        count: cli.count,
        duration: seconds(cli.seconds)?,
        checks: cli.check,
        seed: cli.seed,
        timeout: seconds(cli.timeout)?,
    };
    run(config, cli.threads)
}
