//! The process around a router: its command line, its signals, its exit status.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    process::ExitCode,
};

use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    config::{LoadError, Loaded, Task, load, to_toml},
    logging,
    operations::Operations,
    run::{Addresses, Router, RunError},
};

/// Exit status of a process that was given something it cannot use (`EX_USAGE`).
const EXIT_USAGE: u8 = 64;
const EXIT_FAILURE: u8 = 1;

/// The whole process: reads its settings, sets up logging, runs. `args` begins with the program's name.
///
/// Exit status 0 after a stop by signal or `--help`, 64 for what cannot be used, 1 for what failed.
pub fn main_from_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::from(exit_status(args))
}

/// [`main_from_args`] for callers that need the number, as Python does.
pub fn exit_status(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let loaded = match load(&args) {
        Ok(loaded) => loaded,
        Err(LoadError::Usage(error)) => {
            let is_wrong = error.use_stderr();
            // Where the terminal is gone there is nobody to tell.
            let _ = error.print();
            return if is_wrong { EXIT_USAGE } else { 0 };
        }
        Err(LoadError::Config(issues)) => {
            for issue in issues {
                complain(&issue.to_string());
            }
            return EXIT_USAGE;
        }
    };
    let outcome = match loaded.task {
        Task::Check => Ok(()),
        Task::PrintConfig => {
            print(&to_toml(&loaded.settings, &loaded.config.engines.listed)).map_err(RunError::from)
        }
        Task::Run { print_addresses } => run_to_the_end(loaded, &args, print_addresses),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            complain(&error.to_string());
            EXIT_FAILURE
        }
    }
}

fn run_to_the_end(
    loaded: Loaded,
    args: &[OsString],
    print_addresses: bool,
) -> Result<(), RunError> {
    let log = logging::init(&loaded.config.log);
    raise_descriptor_limit();
    let runtime = Runtime::new()?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let operations = Operations::new(log, loaded.settings);
        let router = Router::start_with(&loaded.config, operations)?;
        announce(&router, print_addresses)?;
        serve(router, args, &mut signals).await;
        Ok(())
    });
    // After a second signal, what still runs is dropped.
    runtime.shutdown_background();
    outcome
}

fn announce(router: &Router, print_addresses: bool) -> Result<(), RunError> {
    let addresses = router.addresses();
    let Addresses {
        http,
        grpc,
        workers,
        admin,
    } = addresses;
    tracing::info!(%http, %grpc, %workers, %admin, "router listens");
    if print_addresses {
        let line = serde_json::to_string(&addresses).map_err(io::Error::from)?;
        print(&format!("{line}\n"))?;
    }
    Ok(())
}

/// Runs the router until SIGTERM or SIGINT has stopped it; a second one ends it at once. SIGHUP reads the settings again.
async fn serve(router: Router, args: &[OsString], signals: &mut Signals) {
    while signals.next().await == Wish::Reload {
        router.reload(args.to_vec()).await;
    }
    tracing::info!("stopping: finishing the requests that run");
    router.stop(signals.stop()).await;
    tracing::info!("stopped");
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Stop,
    Reload,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Wish {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Wish::Stop,
            _ = self.interrupt.recv() => Wish::Stop,
            _ = self.hangup.recv() => Wish::Reload,
        }
    }

    /// The next signal to stop. A reload makes no sense any more.
    async fn stop(&mut self) {
        while self.next().await == Wish::Reload {}
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

fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Tells whoever started the process, also where logging is off.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "orchestra-router: {message}");
}
