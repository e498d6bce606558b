//! Spans on their way to a collector: handed in through a bounded channel, sent in batches by one task.

use std::{sync::Arc, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, trace_service_client::TraceServiceClient},
    common::v1::InstrumentationScope,
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span},
};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tonic::transport::{Channel, Endpoint};

use super::{
    record::Entry,
    spans::{spans_of, text},
};
use crate::{metrics::Metrics, tasks::Tasks};

/// Requests that wait to be sent; the spans of more are dropped and counted.
const REQUESTS_MAX: usize = 4096;
/// Requests that are sent together at most.
const BATCH_MAX: usize = 512;
/// How long a batch may wait to be filled.
const BATCH_TIME: Duration = Duration::from_secs(1);
/// How long the collector may take for a batch, and for a connection.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a batch is sent again, and after which pause.
const RETRIES_MAX: u32 = 2;
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long the spans of the last requests are waited for at shutdown, and may take to be sent.
const LAST_SPANS: Duration = Duration::from_millis(250);
const LAST_EXPORT: Duration = Duration::from_secs(1);
/// Spans of a request that was refused at once are two; it counts as these where it is dropped before they are made.
const SPANS_DROPPED: u64 = 6;

/// Spans cannot be sent where the settings say.
#[derive(Debug, thiserror::Error)]
#[error("otlp_endpoint: {0}")]
pub struct ExporterError(#[from] tonic::transport::Error);

/// Where requests that are over are handed in.
#[derive(Debug)]
pub(crate) struct Exporter {
    entries: mpsc::Sender<Arc<Entry>>,
    metrics: Metrics,
}

impl Exporter {
    /// Starts the task that sends; it connects when there is something to send.
    pub(crate) fn new(
        endpoint: &str,
        tasks: &Tasks,
        metrics: &Metrics,
    ) -> Result<Self, ExporterError> {
        let channel = Endpoint::from_shared(endpoint.to_owned())?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(EXPORT_TIMEOUT)
            .connect_lazy();
        let (entries, inbox) = mpsc::channel(REQUESTS_MAX);
        let sender = Sender {
            inbox,
            batch: Vec::new(),
            client: TraceServiceClient::new(channel),
            metrics: metrics.clone(),
            has_failed: false,
        };
        tasks.spawn(sender.run(tasks.clone()));
        Ok(Self {
            entries,
            metrics: metrics.clone(),
        })
    }

    /// Hands in a request that is over.
    pub(super) fn send(&self, entry: &Arc<Entry>) {
        let is_sampled = entry.trace.as_ref().is_some_and(|trace| trace.is_sampled);
        if is_sampled && self.entries.try_send(Arc::clone(entry)).is_err() {
            self.metrics.observe.spans_dropped.inc_by(SPANS_DROPPED);
        }
    }
}

struct Sender {
    inbox: mpsc::Receiver<Arc<Entry>>,
    /// Taken out and not yet sent.
    batch: Vec<Arc<Entry>>,
    client: TraceServiceClient<Channel>,
    metrics: Metrics,
    /// The last batch was lost, which was said.
    has_failed: bool,
}

impl Sender {
    async fn run(mut self, tasks: Tasks) {
        let shutdown = tasks.shutdown_token().clone();
        while let Some(Some(())) = shutdown.run_until_cancelled(self.fill()).await {
            let spans = self.take_spans();
            tokio::select! {
                biased;
                () = self.send(spans) => {}
                // At shutdown a batch on its way has the time of the last one.
                () = async {
                    shutdown.cancelled().await;
                    time::sleep(LAST_EXPORT).await;
                } => {}
            }
        }
        let until = Instant::now() + LAST_SPANS;
        while let Ok(1..) =
            time::timeout_at(until, self.inbox.recv_many(&mut self.batch, BATCH_MAX)).await
        {
        }
        let spans = self.take_spans();
        let _ = time::timeout(LAST_EXPORT, self.send(spans)).await;
    }

    /// Waits for requests and collects them for a while; `None` where no more can come. Dropping the future loses none.
    async fn fill(&mut self) -> Option<()> {
        self.inbox.recv_many(&mut self.batch, BATCH_MAX).await;
        if self.batch.is_empty() {
            return None;
        }
        let until = Instant::now() + BATCH_TIME;
        while self.batch.len() < BATCH_MAX {
            let room = BATCH_MAX - self.batch.len();
            let more = self.inbox.recv_many(&mut self.batch, room);
            match time::timeout_at(until, more).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        Some(())
    }

    fn take_spans(&mut self) -> Vec<Span> {
        let batch = std::mem::take(&mut self.batch);
        batch.iter().flat_map(|entry| spans_of(entry)).collect()
    }

    async fn send(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        if count == 0 {
            return;
        }
        let request = export_request(spans);
        let mut retries = 0;
        let sent = loop {
            match self.client.export(request.clone()).await {
                Ok(answer) => break Ok(answer.into_inner()),
                Err(_) if retries < RETRIES_MAX => {
                    retries += 1;
                    time::sleep(RETRY_PAUSE * retries).await;
                }
                Err(status) => break Err(status.code()),
            }
        };
        let metrics = &self.metrics.observe;
        match sent {
            Ok(answer) => {
                let partly = answer.partial_success.unwrap_or_default();
                let refused = u64::try_from(partly.rejected_spans).unwrap_or(0).min(count);
                metrics.spans_exported.inc_by(count - refused);
                metrics.spans_dropped.inc_by(refused);
                self.has_failed = false;
            }
            Err(code) => {
                metrics.spans_dropped.inc_by(count);
                if !self.has_failed {
                    tracing::warn!(?code, "cannot send traces to the collector");
                }
                self.has_failed = true;
            }
        }
    }
}

fn export_request(spans: Vec<Span>) -> ExportTraceServiceRequest {
    let version = env!("CARGO_PKG_VERSION");
    let scope = InstrumentationScope {
        name: "orchestra-router".to_owned(),
        version: version.to_owned(),
        ..InstrumentationScope::default()
    };
    let resource = Resource {
        attributes: vec![
            text("service.name", "orchestra-router"),
            text("service.version", version),
        ],
        ..Resource::default()
    };
    let spans = ScopeSpans {
        scope: Some(scope),
        spans,
        ..ScopeSpans::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource),
            scope_spans: vec![spans],
            ..ResourceSpans::default()
        }],
    }
}
