//! The gRPC service that workers dial. One task per worker listens to its stream; when the stream ends, however it
//! ends, the worker is gone and its sequences are continued elsewhere.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::{
    BlockHash, ErrorCode,
    scheduler::{SchedulerError, WorkerLoad},
    step::KvEvent,
};
use orchestra_proto::v1::{
    self, kv_event,
    router_message::Message as Down,
    worker_gateway_server::{WorkerGateway, WorkerGatewayServer},
    worker_message::Message as Up,
};
use tokio::time::{self, MissedTickBehavior};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    AttachError,
    hello::Hello,
    outbox::{Outbox, OutboxStream},
    session::Session,
    sink::Violation,
    watchdog::{Hang, Watchdog},
};
use crate::{
    error::ApiError,
    metrics::WorkerMetrics,
    models::{ModelFilesError, ModelText},
    state::RouterState,
};

/// Model files are at most 64 MiB, and come as one message.
const MESSAGE_BYTES_MAX: usize = (64 << 20) + (1 << 20);
/// How long a worker that has dialled may take for its hello, and then for its model files.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const MODEL_FILES_TIMEOUT: Duration = Duration::from_secs(60);

/// The service for the workers' listener.
pub fn gateway_service(state: Arc<RouterState>) -> WorkerGatewayServer<Gateway> {
    WorkerGatewayServer::new(Gateway { state }).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// `orchestra.v1.WorkerGateway`.
pub struct Gateway {
    state: Arc<RouterState>,
}

#[tonic::async_trait]
impl WorkerGateway for Gateway {
    type AttachStream = OutboxStream;

    async fn attach(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let shutdown = self.state.tasks.shutdown_token();
        if shutdown.is_cancelled() {
            return Err(End::ShuttingDown.status());
        }
        let mut inbound = request.into_inner();
        let hello = match next(&mut inbound, HELLO_TIMEOUT)
            .await
            .map_err(|end| end.status())?
        {
            Up::Hello(hello) => Hello::from_wire(hello).map_err(Status::invalid_argument)?,
            _ => return Err(Status::invalid_argument("the first message must be hello")),
        };
        let (outbox, stream) = Outbox::new();
        let state = Arc::clone(&self.state);
        self.state.tasks.spawn(async move {
            let worker_id = hello.spec.name.clone();
            let model = hello.spec.model.clone();
            let end = serve(&state, hello, &mut inbound, &outbox).await;
            outbox.close(end.status());
            if end.is_ordinary() {
                tracing::info!(worker_id, model, reason = %end, "worker detached");
            } else {
                tracing::warn!(worker_id, model, reason = %end, "worker dropped");
            }
        });
        Ok(Response::new(stream))
    }
}

/// Why a worker's stream ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the worker closed the stream")]
    Closed,
    #[error("the stream broke ({0:?})")]
    Broken(Code),
    #[error("it took too long for {0}")]
    Late(&'static str),
    #[error("an unexpected message: {0}")]
    Unexpected(&'static str),
    #[error(transparent)]
    ModelFiles(#[from] ModelFilesError),
    #[error(transparent)]
    Background(#[from] ApiError),
    #[error(transparent)]
    Refused(#[from] AttachError),
    #[error(transparent)]
    Faulty(#[from] Violation),
    #[error("KV events number {got} came where number {expected} was due")]
    KvGap { expected: u64, got: u64 },
    #[error("its KV events cannot be: {0}")]
    KvEvents(#[from] SchedulerError),
    #[error("no message came within the heartbeat timeout")]
    Silent,
    #[error("its running sequences made no step within the hang timeout")]
    Stuck,
    #[error("a worker of this name attached again")]
    Replaced,
    #[error("an operator removed it")]
    Removed,
    #[error("the router is shutting down")]
    ShuttingDown,
}

impl End {
    /// Whether this happens in the normal course of things.
    const fn is_ordinary(&self) -> bool {
        matches!(self, Self::Closed | Self::Removed | Self::ShuttingDown)
    }

    /// What the worker is told.
    fn status(&self) -> Status {
        let message = self.to_string();
        match self {
            Self::Unexpected(_) | Self::ModelFiles(_) | Self::Faulty(_) => {
                Status::invalid_argument(message)
            }
            Self::Refused(AttachError::Mismatch(_)) => Status::failed_precondition(message),
            Self::Refused(AttachError::Refused(error)) => match error.code() {
                ErrorCode::InvalidRequest => Status::invalid_argument(message),
                _ => Status::resource_exhausted(message),
            },
            Self::KvGap { .. } | Self::KvEvents(_) => Status::data_loss(message),
            Self::Late(_) | Self::Silent | Self::Stuck => Status::deadline_exceeded(message),
            Self::Replaced | Self::Removed => Status::aborted(message),
            Self::Background(_) => Status::internal(message),
            Self::Closed | Self::Broken(_) | Self::ShuttingDown => Status::unavailable(message),
        }
    }
}

/// A worker from its hello to its end.
async fn serve(
    state: &Arc<RouterState>,
    hello: Hello,
    inbound: &mut Streaming<v1::WorkerMessage>,
    outbox: &Arc<Outbox>,
) -> End {
    let welcomed = tokio::select! {
        biased;
        () = state.tasks.shutdown_token().cancelled() => Err(End::ShuttingDown),
        text = welcome(state, &hello, inbound, outbox) => text,
    };
    let text = match welcomed {
        Ok(text) => text,
        Err(end) => return end,
    };
    let spec = hello.spec.clone();
    let attached = state
        .workers
        .attach(&state.models, hello, text, Arc::clone(outbox));
    let session = match attached {
        Ok(session) => session,
        Err(error) => return error.into(),
    };
    tracing::info!(
        worker_id = spec.name,
        model = spec.model,
        weights_epoch = spec.weights_epoch,
        num_blocks = spec.num_blocks,
        "worker attached"
    );
    let attached = Attached {
        metrics: state
            .metrics
            .worker(&spec.name, spec.block_size, spec.num_blocks),
        state,
        session,
    };
    attached.listen(inbound).await
}

/// Welcomes the worker, and takes its model files where they are new.
async fn welcome(
    state: &RouterState,
    hello: &Hello,
    inbound: &mut Streaming<v1::WorkerMessage>,
    outbox: &Outbox,
) -> Result<Arc<ModelText>, End> {
    let digest = &hello.model_files_digest;
    let known = state.models.text_of(digest);
    let wants_model_files = known.is_none();
    if !outbox.push(Down::Welcome(v1::Welcome { wants_model_files })) {
        return Err(End::Broken(Code::Cancelled));
    }
    if let Some(text) = known {
        return Ok(text);
    }
    let Up::ModelFiles(files) = next(inbound, MODEL_FILES_TIMEOUT).await? else {
        return Err(End::Unexpected(
            "model_files must follow a welcome that wants them",
        ));
    };
    let began = Instant::now();
    let digest = digest.clone();
    let text = state
        .tasks
        .run_blocking(move || ModelText::from_files(&files, digest))
        .await??;
    let model = &hello.spec.model;
    tracing::info!(model, elapsed = ?began.elapsed(), "model files read");
    Ok(Arc::new(text))
}

async fn next(inbound: &mut Streaming<v1::WorkerMessage>, limit: Duration) -> Result<Up, End> {
    let message = time::timeout(limit, inbound.message()).await;
    let message = message
        .map_err(|_| End::Late("its message"))?
        .map_err(|status| End::Broken(status.code()))?;
    message
        .ok_or(End::Closed)?
        .message
        .ok_or(End::Unexpected("it is empty"))
}

/// A worker that takes requests; detached on drop.
struct Attached<'a> {
    state: &'a RouterState,
    session: Arc<Session>,
    metrics: WorkerMetrics,
}

impl Attached<'_> {
    async fn listen(&self, inbound: &mut Streaming<v1::WorkerMessage>) -> End {
        let mut watchdog = Watchdog::new(&self.state.settings().limits);
        let mut ticks = time::interval(watchdog.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut counters = Counters::default();
        loop {
            let message = tokio::select! {
                // What is rare comes first: it never keeps messages waiting, and they may keep coming.
                biased;
                () = self.session.replaced.cancelled() => return End::Replaced,
                () = self.session.removed.cancelled() => return End::Removed,
                () = self.state.tasks.shutdown_token().cancelled() => return End::ShuttingDown,
                _ = ticks.tick() => match watchdog.tick() {
                    None => continue,
                    Some(Hang::Silent) => return End::Silent,
                    Some(Hang::Stuck) => return End::Stuck,
                },
                message = inbound.message() => message,
            };
            watchdog.heard();
            let applied = match message {
                Ok(Some(message)) => self.apply(message, &mut watchdog, &mut counters),
                Ok(None) => return End::Closed,
                Err(status) => return End::Broken(status.code()),
            };
            if let Err(end) = applied {
                return end;
            }
        }
    }

    fn apply(
        &self,
        message: v1::WorkerMessage,
        watchdog: &mut Watchdog,
        counters: &mut Counters,
    ) -> Result<(), End> {
        match message.message {
            Some(Up::Tokens(batch)) => self.session.deliver(batch)?,
            Some(Up::KvEvents(events)) => self.apply_kv_events(events, counters)?,
            Some(Up::Load(load)) => {
                watchdog.reported(load.steps, load.num_running);
                self.apply_load(&load, counters);
            }
            Some(Up::ToPeer(message)) => self.state.workers.hand_on(&self.session, message)?,
            Some(Up::Hello(_)) => return Err(End::Unexpected("a second hello")),
            Some(Up::ModelFiles(_)) => return Err(End::Unexpected("model_files unasked")),
            // A kind that a newer worker knows.
            None => {}
        }
        Ok(())
    }

    fn apply_kv_events(&self, events: v1::KvEvents, counters: &mut Counters) -> Result<(), End> {
        let expected = counters.kv_sequence + 1;
        if events.sequence != expected {
            // The worker attaches again and says all that it holds.
            return Err(End::KvGap {
                expected,
                got: events.sequence,
            });
        }
        counters.kv_sequence = expected;
        let hashes = |hashes: Vec<u64>| hashes.into_iter().map(BlockHash).collect();
        for event in events.events {
            let event = match event.event {
                Some(kv_event::Event::Stored(stored)) => match stored.tier() {
                    v1::KvTier::Unspecified => KvEvent::Stored(hashes(stored.block_hashes)),
                    v1::KvTier::Host => KvEvent::Kept(hashes(stored.block_hashes)),
                },
                Some(kv_event::Event::Removed(gone)) => KvEvent::Removed(hashes(gone.block_hashes)),
                Some(kv_event::Event::Cleared(_)) => KvEvent::Cleared,
                None => return Err(End::Unexpected("an empty KV event")),
            };
            match self
                .state
                .workers
                .apply_kv_event(self.session.worker, &event)
            {
                // Replaced in this moment; the loop is about to hear of it.
                Ok(()) | Err(SchedulerError::UnknownWorker) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn apply_load(&self, report: &v1::LoadReport, counters: &mut Counters) {
        let load = WorkerLoad {
            num_running: report.num_running,
            num_waiting: report.num_waiting,
            kv_blocks_used: report.kv_blocks_used,
            queued_prefill_tokens: report.queued_prefill_tokens,
        };
        self.state
            .workers
            .update_load(&self.session, load, report.is_draining);
        let total = report.kv_blocks_total.max(1);
        let kv_usage = f64::from(report.kv_blocks_used) / f64::from(total);
        self.metrics
            .report(report.num_running, report.num_waiting, kv_usage);
        // The worker counts from its own start; what was before it attached here is not ours to count.
        let before = counters.load.replace(*report).unwrap_or(*report);
        let since = |now: u64, before: u64| now.saturating_sub(before);
        let seconds = |now, before| Duration::from_micros(since(now, before)).as_secs_f64();
        let metrics = &self.state.metrics;
        metrics
            .preemptions
            .inc_by(since(report.preemptions, before.preemptions));
        metrics
            .worker_steps
            .inc_by(since(report.steps, before.steps));
        metrics
            .worker_schedule
            .inc_by(seconds(report.schedule_us, before.schedule_us));
        metrics
            .worker_execute
            .inc_by(seconds(report.execute_us, before.execute_us));
        let moves = [
            (
                &metrics.kv_moves.blocks_fetched,
                report.kv_blocks_fetched,
                before.kv_blocks_fetched,
            ),
            (
                &metrics.kv_moves.blocks_pushed,
                report.kv_blocks_pushed,
                before.kv_blocks_pushed,
            ),
            (
                &metrics.kv_moves.failures,
                report.kv_fetch_failures,
                before.kv_fetch_failures,
            ),
        ];
        for (counter, now, before) in moves {
            counter.inc_by(since(now, before));
        }
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let num_sequences = self.session.num_sequences();
        self.state.workers.detach(&self.state.models, &self.session);
        if num_sequences > 0 {
            let worker_id = &self.session.spec.name;
            tracing::warn!(worker_id, num_sequences, "sequences lost their worker");
        }
    }
}

/// Where the counting messages of one stream have got to.
#[derive(Debug, Default)]
struct Counters {
    kv_sequence: u64,
    /// The last report.
    load: Option<v1::LoadReport>,
}
