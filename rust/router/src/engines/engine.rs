//! One foreign engine: where it is, how it does, and requests on their way to it.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use orchestra_core::{Time, scheduler::WorkerId};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::{sync::Notify, time};
use tokio_util::sync::CancellationToken;

use super::{
    breaker::{Breaker, BreakerState},
    caching::Caching,
    config::EngineConfig,
    connect::Network,
    outlier::Window,
    pool::Pool,
    wire::{Connection, Head, WireError},
};
use crate::{
    metrics::{EngineMetrics, EngineSeries},
    models::ModelText,
};

/// What kind of server an engine is; decides how streams are continued on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// vLLM.
    Vllm,
    /// `SGLang`.
    Sglang,
    /// Text Generation Inference.
    Tgi,
    /// llama.cpp's server.
    LlamaCpp,
    /// It says nothing that we know.
    #[default]
    Unknown,
}

/// A foreign engine.
pub(crate) struct Engine {
    pub(crate) config: EngineConfig,
    network: Network,
    idle: Pool,
    pub(crate) status: Mutex<Status>,
    /// Its metrics; requests on it now are among them.
    pub(crate) series: EngineSeries,
    /// When it last sent a byte of an answer, microseconds of the router's clock.
    heard: AtomicU64,
    /// Cancelled when the engine is taken off the router: what runs on it goes elsewhere.
    pub(crate) removed: CancellationToken,
    /// Cancelled when requests on it have to go elsewhere: it was removed, or has been away for long. It gets another one
    /// when it comes back.
    lost: Mutex<CancellationToken>,
    /// Wakes its health check: a request could not reach it.
    pub(crate) doubted: Notify,
    /// What its model files say, once they were read.
    pub(crate) text: OnceLock<Arc<ModelText>>,
    /// What is the same in the head of every request.
    fixed_head: Vec<u8>,
}

/// How an engine does.
#[derive(Debug, Default)]
pub(crate) struct Status {
    /// It answers.
    pub(crate) is_up: bool,
    /// Since when it has not answered as it should.
    pub(super) away_since: Option<Time>,
    /// An operator wants no new requests on it.
    pub(crate) is_draining: bool,
    pub(crate) breaker: Breaker,
    pub(crate) window: Window,
    pub(crate) kind: EngineKind,
    /// What the scheduler knows it as, one for each model.
    pub(crate) workers: Vec<Arc<EngineWorker>>,
    /// What metrics were told.
    pub(crate) shown: Option<(bool, BreakerState)>,
    /// What the scheduler was told.
    pub(crate) was_available: bool,
}

impl Status {
    /// Whether requests may be placed on it.
    pub(crate) const fn is_available(&self) -> bool {
        self.is_up && !self.is_draining && self.breaker.is_passable()
    }
}

/// One model on one engine, which is a worker to the scheduler.
pub(crate) struct EngineWorker {
    pub(crate) id: WorkerId,
    /// The worker's name: the engine's URL, and the model where it has several.
    pub(crate) name: String,
    pub(crate) model: String,
    pub(crate) engine: Arc<Engine>,
    /// What was believed of its cache, and what it said.
    pub(crate) caching: Arc<Caching>,
    /// Cancelled when it is let go.
    pub(super) gone: CancellationToken,
}

impl std::fmt::Debug for EngineWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// What goes to an engine.
pub(crate) struct Outgoing<'a> {
    /// `POST` or `GET`.
    pub(crate) method: &'static str,
    /// Below the engine's base path.
    pub(crate) path: &'a str,
    /// Further header lines, each ended by CRLF.
    pub(crate) headers: &'a [u8],
    pub(crate) body: &'a [u8],
}

/// Why a request got no head of an answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// Nothing listens, or nobody answers.
    #[error("the engine cannot be reached")]
    Unreachable,
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl Engine {
    pub(crate) fn new(config: EngineConfig, network: Network, metrics: &EngineMetrics) -> Self {
        let series = metrics.engine(config.url.as_str());
        let mut fixed_head =
            format!(" HTTP/1.1\r\nhost: {}\r\n", config.url.authority()).into_bytes();
        if let Some(key) = &config.api_key {
            fixed_head.extend_from_slice(b"authorization: Bearer ");
            fixed_head.extend_from_slice(key.reveal());
            fixed_head.extend_from_slice(b"\r\n");
        }
        let removed = CancellationToken::new();
        Self {
            lost: Mutex::new(removed.child_token()),
            removed,
            config,
            network,
            idle: Pool::default(),
            status: Mutex::default(),
            series,
            heard: AtomicU64::new(0),
            doubted: Notify::new(),
            text: OnceLock::new(),
            fixed_head,
        }
    }

    /// The engine sent something.
    pub(crate) fn hear(&self, now: Time) {
        self.heard.store(now.0, Ordering::Relaxed);
    }

    /// Whether it sent something since.
    pub(crate) fn was_heard_since(&self, then: Time) -> bool {
        self.heard.load(Ordering::Relaxed) > then.0
    }

    /// What a request on it that begins now listens to.
    pub(crate) fn lost(&self) -> CancellationToken {
        self.lost.lock().clone()
    }

    /// Requests on it go elsewhere.
    pub(super) fn lose(&self) {
        self.lost.lock().cancel();
    }

    /// It is there again.
    pub(super) fn come_back(&self) {
        let mut lost = self.lost.lock();
        if lost.is_cancelled() {
            *lost = self.removed.child_token();
        }
    }

    /// Opens a connection.
    pub(crate) async fn connect(&self, timeout: Duration) -> Result<Connection, SendError> {
        let connecting = self.network.connect(&self.config.url);
        match time::timeout(timeout, connecting).await {
            Ok(Ok(socket)) => Ok(Connection::new(socket)),
            Ok(Err(_)) | Err(_) => Err(SendError::Unreachable),
        }
    }

    /// Sends a request on an idle connection or a fresh one, and waits for the head of the answer.
    ///
    /// An idle connection may be over without this end knowing it yet. So where one breaks before any byte of the answer,
    /// the request goes out again on a fresh one: the engine has not begun it, and nothing is counted against it.
    pub(crate) async fn send(
        &self,
        request: &Outgoing<'_>,
        connect_timeout: Duration,
    ) -> Result<(Head, Connection), SendError> {
        let head = self.head_of(request);
        if let Some(mut connection) = self.idle.take() {
            match connection.send(&head, request.body).await {
                Ok(answer) => return Ok((answer, connection)),
                Err(error) if connection.has_answered() => return Err(error.into()),
                Err(_) => {}
            }
        }
        let mut connection = self.connect(connect_timeout).await?;
        let answer = connection.send(&head, request.body).await?;
        Ok((answer, connection))
    }

    /// The head of a request, whole.
    pub(crate) fn head_of(&self, request: &Outgoing<'_>) -> Vec<u8> {
        let Outgoing {
            method,
            path,
            headers,
            body,
        } = request;
        let base = self.config.url.base_path();
        let mut head = Vec::with_capacity(256 + self.fixed_head.len() + headers.len());
        for part in [method, " ", base, path] {
            head.extend_from_slice(part.as_bytes());
        }
        head.extend_from_slice(&self.fixed_head);
        if !body.is_empty() {
            let lines = format!(
                "content-type: application/json\r\ncontent-length: {}\r\n",
                body.len()
            );
            head.extend_from_slice(lines.as_bytes());
        }
        head.extend_from_slice(headers);
        head.extend_from_slice(b"\r\n");
        head
    }

    /// Takes a connection back whose answer was read to its end.
    pub(crate) fn put_back(&self, connection: Connection) {
        self.idle.put(connection);
    }

    /// Drops idle connections that the engine has closed.
    pub(crate) fn sweep(&self) {
        self.idle.sweep();
    }

    /// Drops all idle connections.
    pub(crate) fn forget_connections(&self) {
        self.idle.clear();
    }
}
