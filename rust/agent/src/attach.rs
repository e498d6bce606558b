//! The network side: dials the router, serves it while the stream holds (`session`), and starts over when it is lost.
//!
//! All of it is one future on a runtime of one thread: nothing is spawned, so ending the future ends everything.

mod session;

use std::{error::Error as _, io, sync::Arc, thread, time::Instant};

use tokio::{runtime, sync::mpsc, time};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use self::session::End;
use crate::{
    attachment::{AttachmentId, Command},
    backoff::Backoff,
    config::AgentConfig,
    error::AgentError,
    kv::Inbox,
    load::LoadBoard,
};

/// Unread bytes that a router may have under way to this worker.
const DOWNLINK_WINDOW_BYTES: u32 = 1 << 20;

/// What the network thread works with.
pub(crate) struct Network {
    config: Arc<AgentConfig>,
    endpoint: Endpoint,
    commands: mpsc::Sender<Command>,
    board: Arc<LoadBoard>,
    closing: CancellationToken,
    /// Where messages of other workers go; none where KV does not move.
    kv: Option<Arc<Inbox>>,
}

/// Runs the network side on a thread of its own, until the agent closes.
pub(crate) fn start(network: Network) -> io::Result<thread::JoinHandle<()>> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    thread::Builder::new()
        .name("orchestra-agent".to_owned())
        .spawn(move || runtime.block_on(network.run()))
}

impl Network {
    pub(crate) fn new(
        config: Arc<AgentConfig>,
        commands: mpsc::Sender<Command>,
        board: Arc<LoadBoard>,
        closing: CancellationToken,
        kv: Option<Arc<Inbox>>,
    ) -> Result<Self, AgentError> {
        let endpoint = Endpoint::from_shared(config.router.clone())
            .map_err(|error| AgentError::Start(io::Error::new(io::ErrorKind::InvalidInput, error)))?
            .tcp_nodelay(true)
            .connect_timeout(config.connect_timeout)
            .http2_keep_alive_interval(config.keepalive)
            .keep_alive_timeout(config.keepalive_timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(DOWNLINK_WINDOW_BYTES)
            .initial_connection_window_size(DOWNLINK_WINDOW_BYTES);
        Ok(Self {
            config,
            endpoint,
            commands,
            board,
            closing,
            kv,
        })
    }

    /// Attaches again and again.
    async fn run(self) {
        let AgentConfig {
            worker_id,
            router,
            reconnect,
            ..
        } = &*self.config;
        let mut backoff = Backoff::new(reconnect, worker_id);
        let mut attempts_failed = 0_u64;
        for attempt in 1.. {
            let began = Instant::now();
            let end = self.attach_once(AttachmentId(attempt)).await;
            let was_attached = self.note_detached();
            if self.closing.is_cancelled() {
                return;
            }
            if was_attached {
                attempts_failed = 0;
            }
            // A router that lets go at once is not called again at once.
            if was_attached && began.elapsed() > reconnect.max {
                backoff.reset();
            }
            let pause = backoff.next_pause();
            if attempts_failed == 0 {
                tracing::warn!(
                    worker_id,
                    router,
                    was_attached,
                    end = describe(&end),
                    "not attached, trying again"
                );
            } else {
                tracing::debug!(
                    attempts_failed,
                    ?pause,
                    end = describe(&end),
                    "still not attached"
                );
            }
            attempts_failed += 1;
            tokio::select! {
                () = self.closing.cancelled() => return,
                () = time::sleep(pause) => {}
            }
        }
    }

    fn note_attached(&self) {
        self.board.update(|stats| {
            stats.is_attached = true;
            stats.attachments += 1;
        });
        let AgentConfig {
            worker_id, router, ..
        } = &*self.config;
        tracing::info!(worker_id, router, "attached to the router");
    }

    /// Returns whether it was attached.
    fn note_detached(&self) -> bool {
        let mut was_attached = false;
        self.board
            .update(|stats| was_attached = std::mem::take(&mut stats.is_attached));
        was_attached
    }
}

/// An end with its causes, for the log.
fn describe(end: &End) -> String {
    let mut text = end.to_string();
    let mut source = end.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
