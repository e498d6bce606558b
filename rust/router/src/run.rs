//! A router from its first bound port to its last answered request.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use orchestra_core::config::ConfigIssue;
use serde::Serialize;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};
use tonic::service::Routes;

use crate::{
    config::RouterConfig,
    engines::Engines,
    grpc,
    http::HttpDoor,
    listen::{Door, Listener},
    logging,
    metrics::Metrics,
    state::RouterState,
    workers::gateway_service,
};

/// The front of Orchestra: clients speak OpenAI HTTP or gRPC to it, workers attach to it.
#[derive(Debug, Parser)]
#[command(name = "orchestra-router", version, about)]
struct Cli {
    #[command(flatten)]
    config: RouterConfig,
}

/// Exit status of a process that was given something it cannot use (`EX_USAGE`).
const EXIT_USAGE: u8 = 64;
const EXIT_FAILURE: u8 = 1;
/// How long tasks may take to end once the last request has; nothing of a client's is waiting then.
const LAST_TASKS: Duration = Duration::from_secs(3);

/// Why a router did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Settings that cannot be used, all of them.
    #[error("invalid configuration: {}", join(.0))]
    Config(Vec<ConfigIssue>),
    /// A port could not be bound.
    #[error("cannot listen on {address} ({}): {source}", door.as_str())]
    Bind {
        /// Which listener.
        door: Door,
        /// The configured address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The process has no runtime, signals or standard output.
    #[error(transparent)]
    Process(#[from] io::Error),
    /// The reflection service refused our own descriptors.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

fn join(issues: &[ConfigIssue]) -> String {
    issues
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// Where a router listens, with its real ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Addresses {
    /// OpenAI HTTP, health and metrics.
    pub http: SocketAddr,
    /// gRPC for clients.
    pub grpc: SocketAddr,
    /// gRPC for workers.
    pub workers: SocketAddr,
}

/// A router that is bound and accepts.
pub struct Router {
    state: Arc<RouterState>,
    addresses: Addresses,
    drain_timeout: Duration,
}

impl Router {
    /// Checks the settings, binds the three listeners and begins to accept.
    ///
    /// # Errors
    /// A setting that cannot be used, a port that cannot be bound. Nothing is left open then.
    pub fn start(config: &RouterConfig) -> Result<Self, RunError> {
        config.validate().map_err(RunError::Config)?;
        let bind = |door, address| {
            let listener = Listener::bind(door, address);
            listener.map_err(|source| RunError::Bind {
                door,
                address,
                source,
            })
        };
        let listen = &config.listen;
        let http = bind(Door::Http, listen.http)?;
        let grpc = bind(Door::Grpc, listen.grpc)?;
        let workers = bind(Door::Workers, listen.workers)?;
        let addresses = Addresses {
            http: http.local_addr()?,
            grpc: grpc.local_addr()?,
            workers: workers.local_addr()?,
        };

        let metrics = Metrics::new();
        let state = RouterState::with_engines(
            config.corridor.limits(),
            metrics.clone(),
            Engines::new(config.engines.limits()),
        );
        let gateway = Routes::new(gateway_service(Arc::clone(&state)));
        let served = [
            (
                http,
                HttpDoor::new(Arc::clone(&state), config).into_router(),
            ),
            (grpc, grpc::router(&state, config)?),
            (workers, gateway.prepare().into_axum_router()),
        ];
        let tasks = &state.tasks;
        for (listener, app) in served {
            tasks.spawn(listener.serve(app, listen.clone(), metrics.clone(), tasks.clone()));
        }
        for engine in config.engines.engines() {
            let url = engine.url.clone();
            if let Err(error) = state.add_engine(engine) {
                tracing::warn!(%url, %error, "engine not added");
            }
        }
        Ok(Self {
            state,
            addresses,
            drain_timeout: listen.drain_timeout.0,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Stops: refuses new requests, lets running ones finish within the drain timeout or until `hurry`, ends the
    /// rest with `shutting_down`. `/ready` says 503 meanwhile, so the listeners stay open to the end.
    pub async fn stop(self, hurry: impl Future<Output = ()>) {
        self.state.begin_drain();
        let drained = async {
            if tokio::time::timeout(self.drain_timeout, self.state.drained())
                .await
                .is_err()
            {
                let seconds = self.drain_timeout.as_secs_f64();
                tracing::warn!(seconds, "drain timeout: ending the requests that still run");
            }
        };
        tokio::select! {
            () = drained => {}
            () = hurry => return self.state.tasks.shutdown_token().cancel(),
        }
        let _ = tokio::time::timeout(LAST_TASKS, self.state.shut_down()).await;
    }
}

/// Runs a router until SIGTERM or SIGINT has stopped it. A second signal ends it at once.
///
/// # Errors
/// See [`Router::start`].
pub async fn run(config: RouterConfig) -> Result<(), RunError> {
    let mut signals = Signals::new()?;
    let router = Router::start(&config)?;
    let Addresses {
        http,
        grpc,
        workers,
    } = router.addresses();
    tracing::info!(%http, %grpc, %workers, "router listens");
    if config.print_addresses {
        print_line(&serde_json::to_string(&router.addresses()).map_err(io::Error::from)?)?;
    }
    signals.next().await;
    tracing::info!("stopping: finishing the requests that run");
    router.stop(signals.next()).await;
    tracing::info!("stopped");
    Ok(())
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        Ok(Self {
            terminate,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The whole process: reads flags, sets up logging, runs. `args` begins with the program's name.
///
/// Exit status 0 after a stop by signal or `--help`, 64 for what cannot be used, 1 for what failed.
pub fn main_from_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::from(exit_status(args))
}

/// [`main_from_args`] for callers that need the number, as Python does.
pub fn exit_status(args: impl IntoIterator<Item = OsString>) -> u8 {
    let config = match Cli::try_parse_from(args) {
        Ok(cli) => cli.config,
        Err(error) => {
            let is_wrong = error.use_stderr();
            // Where the terminal is gone there is nobody to tell.
            let _ = error.print();
            return if is_wrong { EXIT_USAGE } else { 0 };
        }
    };
    logging::init(&config.log);
    raise_descriptor_limit();
    let outcome = Runtime::new().map_err(RunError::from).and_then(|runtime| {
        let outcome = runtime.block_on(run(config));
        // After a second signal, what still runs is dropped.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => 0,
        Err(RunError::Config(issues)) => {
            for issue in issues {
                complain(&issue.to_string());
            }
            EXIT_USAGE
        }
        Err(error) => {
            complain(&error.to_string());
            EXIT_FAILURE
        }
    }
}

/// A connection is a descriptor, and the usual soft limit of 1024 is below what one router holds.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    ) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn print_line(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// Tells whoever started the process, also where logging is off.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "orchestra-router: {message}");
}
