//! The load generator: a closed loop of keep-alive clients, each with one request at a time.
//!
//! It measures what a client sees (time to the whole answer, to its first event, between events) and, where asked, that
//! every word came once and in its place. What a router spent on it is for whoever started both to read from the kernel.

mod client;
mod prompts;
mod report;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{runtime, task::JoinSet};

pub use self::report::{Errors, Report, Spread};
use self::{client::Client, prompts::Prompts, report::Samples};

/// What is asked, of whom, how often.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Where to connect; clients are dealt out over them in turn.
    pub targets: Vec<SocketAddr>,
    /// The model that requests name.
    pub model: String,
    /// Whether answers are streamed.
    pub streams: bool,
    /// Bytes of a request's body, nearly.
    pub body_bytes: usize,
    /// Beginnings that prompts share; 0 makes every prompt unlike all others.
    pub prefixes: usize,
    /// Bytes of such a beginning; half of a prompt unless given.
    pub prefix_bytes: Option<usize>,
    /// After so many requests the same ones come again; 0 is never.
    pub distinct: u64,
    /// `max_tokens`: words of each answer.
    pub words: u32,
    /// Clients.
    pub concurrency: usize,
    /// Requests in all, or until `duration`.
    pub count: Option<u64>,
    /// How long, where `count` does not end it before.
    pub duration: Duration,
    /// Whether every word is checked; costs the generator some microseconds a word.
    pub checks: bool,
    /// Chooses the prompts; another seed shares nothing with this one.
    pub seed: u64,
    /// How long one answer may take; a longer one is an error.
    pub timeout: Duration,
}

/// What all clients of a run share.
struct Run {
    config: LoadConfig,
    prompts: Prompts,
    started: Instant,
    /// Requests begun.
    begun: AtomicU64,
}

impl Run {
    /// The number of the next prompt, or `None` where the run is over.
    fn next(&self) -> Option<u64> {
        if self.started.elapsed() >= self.config.duration {
            return None;
        }
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let is_one_more = self.config.count.is_none_or(|count| number < count);
        is_one_more.then(|| number.checked_rem(self.config.distinct).unwrap_or(number))
    }
}

/// Runs the load on `threads` threads, to its end.
pub fn run(config: LoadConfig, threads: usize) -> io::Result<Report> {
    let run = Arc::new(Run {
        prompts: Prompts::new(&config),
        started: Instant::now(),
        begun: AtomicU64::new(0),
        config,
    });
    let threads = threads.clamp(1, run.config.concurrency.max(1));
    let parts: Vec<_> = (0..threads)
        .map(|part| {
            let run = Arc::clone(&run);
            thread::spawn(move || clients(&run, part, threads))
        })
        .collect();
    let mut samples = Samples::default();
    for part in parts {
        let part = part
            .join()
            .map_err(|_| io::Error::other("a thread of clients panicked"))?;
        samples.add(part?);
    }
    Ok(samples.into_report(run.started.elapsed()))
}

/// Every `threads`th client, from `part` on.
fn clients(run: &Arc<Run>, part: usize, threads: usize) -> io::Result<Samples> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let numbers = (part..run.config.concurrency).step_by(threads);
        let mut clients: JoinSet<Samples> = numbers
            .map(|number| Client::new(Arc::clone(run), number).run())
            .collect();
        let mut samples = Samples::default();
        while let Some(one) = clients.join_next().await {
            samples.add(one.map_err(io::Error::other)?);
        }
        Ok(samples)
    })
}
