//! The access log: a line of JSON per request, at its end. Requests hand their lines to a bounded channel and never
//! wait; one task writes them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use orchestra_core::{ErrorCode, scheduler::AdmissionClass, step::FinishReason};
use serde::Serialize;
use tokio::{
    sync::{Notify, mpsc},
    time,
};

use super::{Passed, decisions::rfc3339, record::Entry};
use crate::{metrics::Metrics, respond::json_body, tasks::Tasks};

/// Lines that wait for the disk, of about 500 bytes each; more are dropped and counted.
const LINES_MAX: usize = 8192;
/// Lines are written together up to about this many bytes.
const BATCH_BYTES: usize = 64 << 10;
/// How long the lines of the last requests are waited for at shutdown.
const LAST_LINES: Duration = Duration::from_millis(250);

/// Where lines are handed in.
#[derive(Debug)]
pub(crate) struct AccessLog {
    lines: mpsc::Sender<Vec<u8>>,
    reopen: Arc<Notify>,
    metrics: Metrics,
}

/// One request. Nothing that a client wrote but its id, which is short and plain.
#[derive(Debug, Serialize)]
struct Line<'a> {
    time: String,
    request_id: &'a str,
    trace_id: Option<String>,
    door: &'static str,
    route: &'static str,
    tenant: Option<&'a str>,
    class: Option<&'static str>,
    model: &'a str,
    status: u16,
    error: Option<&'static str>,
    finish_reason: Option<&'static str>,
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    queue_ms: Option<f64>,
    ttft_ms: Option<f64>,
    total_ms: f64,
    worker: &'a str,
    replays: u32,
    retries: u32,
    pauses: u32,
}

/// Whole microseconds, so that no digit is noise.
fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

impl AccessLog {
    /// Opens the log at `path`, or standard output for `-`, and starts the task that writes it.
    pub(crate) fn open(path: &str, tasks: &Tasks, metrics: &Metrics) -> io::Result<Self> {
        let target = Target::open(path)?;
        let (lines, inbox) = mpsc::channel(LINES_MAX);
        let reopen = Arc::new(Notify::new());
        let writer = Writer {
            inbox,
            reopen: Arc::clone(&reopen),
            target,
            metrics: metrics.clone(),
            has_failed: false,
        };
        tasks.spawn(writer.run(tasks.clone()));
        Ok(Self {
            lines,
            reopen,
            metrics: metrics.clone(),
        })
    }

    /// The file is opened anew before the next line.
    pub(crate) fn reopen(&self) {
        self.reopen.notify_one();
    }

    /// Hands in the line of a request that is over.
    pub(super) fn write(&self, entry: &Entry, passed: &Passed) {
        let facts = entry.facts.lock();
        let line = Line {
            time: rfc3339(entry.arrived_at),
            request_id: &entry.request_id,
            trace_id: entry.trace.as_ref().map(super::TraceContext::trace_id_text),
            door: entry.door,
            route: entry.route,
            tenant: facts.tenant.as_deref(),
            class: facts.class.map(AdmissionClass::as_str),
            model: &facts.model,
            status: facts.status,
            error: facts.code.map(ErrorCode::as_str),
            finish_reason: facts.finish.map(FinishReason::as_str),
            prompt_tokens: facts.prompt_tokens,
            cached_tokens: facts.cached_tokens,
            completion_tokens: facts.completion_tokens,
            queue_ms: passed.queue.map(ms),
            ttft_ms: passed.ttft.map(ms),
            total_ms: ms(passed.total),
            worker: facts.worker(),
            replays: facts.replays,
            retries: facts.retries,
            pauses: facts.pauses,
        };
        let mut line = json_body(&line);
        line.push(b'\n');
        drop(facts);
        if self.lines.try_send(line).is_err() {
            self.metrics.observe.access_log_dropped.inc();
        }
    }
}

/// What is written to.
#[derive(Debug)]
enum Target {
    Stdout,
    File { file: File, path: PathBuf },
}

impl Target {
    fn open(path: &str) -> io::Result<Self> {
        if path == "-" {
            return Ok(Self::Stdout);
        }
        let path = PathBuf::from(path);
        let file = OpenOptions::new().append(true).create(true).open(&path)?;
        Ok(Self::File { file, path })
    }

    /// Where opening fails, the old file stays.
    fn reopen(&mut self) -> io::Result<()> {
        if let Self::File { file, path } = self {
            *file = OpenOptions::new().append(true).create(true).open(path)?;
        }
        Ok(())
    }

    fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(batch)?;
                stdout.flush()
            }
            Self::File { file, .. } => file.write_all(batch),
        }
    }
}

struct Writer {
    inbox: mpsc::Receiver<Vec<u8>>,
    reopen: Arc<Notify>,
    target: Target,
    metrics: Metrics,
    /// The last write failed, which was said.
    has_failed: bool,
}

impl Writer {
    async fn run(mut self, tasks: Tasks) {
        loop {
            let is_reopening = tokio::select! {
                biased;
                () = self.reopen.notified() => true,
                line = self.inbox.recv() => match line {
                    Some(line) => {
                        let batch = self.batch(line);
                        self = match self.put(&tasks, batch.0, batch.1).await {
                            Some(writer) => writer,
                            None => return,
                        };
                        false
                    }
                    None => return,
                },
                () = tasks.shutdown_token().cancelled() => break,
            };
            if is_reopening && let Err(error) = self.target.reopen() {
                tracing::warn!(%error, "the access log is not opened anew: the old file goes on");
            }
        }
        while let Ok(Some(line)) = time::timeout(LAST_LINES, self.inbox.recv()).await {
            let (batch, count) = self.batch(line);
            self = match self.put(&tasks, batch, count).await {
                Some(writer) => writer,
                None => return,
            };
        }
    }

    /// A line and those that are ready behind it, and how many.
    fn batch(&mut self, mut lines: Vec<u8>) -> (Vec<u8>, u64) {
        let mut count = 1;
        while lines.len() < BATCH_BYTES
            && let Ok(line) = self.inbox.try_recv()
        {
            lines.extend(line);
            count += 1;
        }
        (lines, count)
    }

    /// Writes beside the event loop: a disk may take its time. `None` where the runtime ends.
    async fn put(mut self, tasks: &Tasks, batch: Vec<u8>, count: u64) -> Option<Self> {
        let write = move || {
            let written = self.target.write(&batch);
            (self, written)
        };
        let (mut writer, written) = tasks.run_blocking(write).await.ok()?;
        match written {
            Ok(()) => writer.has_failed = false,
            Err(error) => {
                writer.metrics.observe.access_log_dropped.inc_by(count);
                if !writer.has_failed {
                    tracing::warn!(%error, "cannot write the access log");
                }
                writer.has_failed = true;
            }
        }
        Some(writer)
    }
}
