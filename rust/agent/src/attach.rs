//! The network side: dials the router, announces the worker, carries messages both ways, and starts over when the
//! stream is lost.
//!
//! All of it is one future on a runtime of one thread: nothing is spawned, so ending the future ends everything.
//!
//! ```text
//! connect ─► Command::Attached ─► hello (from the step loop) ─► Attach ─► welcome ─► [model files] ─► both ways
//!    ▲                                                                                                   │
//!    └──────────────────────── pause, with jitter ◄─── Command::Detached ◄── stream lost ◄───────────────┘
//! ```

use std::{io, sync::Arc, thread, time::Instant};

use orchestra_proto::v1::{
    self, router_message::Message as Down, worker_gateway_client::WorkerGatewayClient,
    worker_message::Message as Up,
};
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    attachment::{Attachment, AttachmentId, Command},
    backoff::Backoff,
    config::AgentConfig,
    error::AgentError,
    load::LoadBoard,
    uplink::{self, Uplink},
};

/// Largest message from a router: a prompt of a million tokens takes at most 5 MiB.
const DOWNLINK_MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Unread bytes that a router may have under way to this worker.
const DOWNLINK_WINDOW_BYTES: u32 = 1 << 20;

/// Why an attempt to serve a router ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the router cannot be reached")]
    Unreachable(#[source] tonic::transport::Error),
    #[error("the router took longer than connect_timeout")]
    TimedOut,
    #[error("the router answered {}: {}", .0.code(), .0.message())]
    Status(#[from] Box<Status>),
    #[error("the router ended the stream")]
    Ended,
    #[error("the router's first message was not a welcome")]
    NoWelcome,
    #[error("the router read too slowly")]
    Stalled,
    #[error("the agent closes")]
    Closing,
}

/// What the network thread works with.
pub(crate) struct Network {
    config: Arc<AgentConfig>,
    endpoint: Endpoint,
    commands: mpsc::Sender<Command>,
    board: Arc<LoadBoard>,
    closing: CancellationToken,
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

    /// One attachment from dialling to its end.
    async fn attach_once(&self, id: AttachmentId) -> End {
        let channel = tokio::select! {
            biased;
            () = self.closing.cancelled() => return End::Closing,
            connected = self.connect() => match connected {
                Ok(channel) => channel,
                Err(end) => return end,
            },
        };
        let (outbound, mut messages) = mpsc::channel(uplink::OUTBOUND_MAX);
        let cut = CancellationToken::new();
        self.tell(Command::Attached(Attachment::new(
            id,
            outbound,
            cut.clone(),
        )))
        .await;
        // The step loop announces the worker when it next takes inputs. A long step delays that, and no limit of the
        // router's runs yet, because the call has not been made.
        let hello = tokio::select! {
            biased;
            () = self.closing.cancelled() => return End::Closing,
            hello = messages.recv() => match hello {
                Some(hello) => hello,
                None => return End::Closing,
            },
        };
        let end = tokio::select! {
            end = self.exchange(id, channel, hello, messages) => end,
            () = cut.cancelled() => End::Stalled,
            () = self.overdue() => End::Closing,
        };
        self.tell(Command::Detached(id)).await;
        end
    }

    async fn connect(&self) -> Result<Channel, End> {
        match time::timeout(self.config.connect_timeout, self.endpoint.connect()).await {
            Ok(connected) => connected.map_err(End::Unreachable),
            Err(_) => Err(End::TimedOut),
        }
    }

    /// Carries messages both ways until the stream ends.
    async fn exchange(
        &self,
        id: AttachmentId,
        channel: Channel,
        hello: v1::WorkerMessage,
        messages: mpsc::Receiver<v1::WorkerMessage>,
    ) -> End {
        let (welcomed, welcome) = oneshot::channel();
        let uplink = Uplink {
            hello,
            welcome,
            outbound: messages,
            board: Arc::clone(&self.board),
            heartbeat: self.config.heartbeat,
        };
        let greeted = time::timeout(self.config.connect_timeout, greet(channel, uplink)).await;
        let (mut downlink, welcome) = match greeted {
            Ok(Ok(greeted)) => greeted,
            Ok(Err(end)) => return end,
            Err(_) => return End::TimedOut,
        };
        if welcomed
            .send(welcome.wants_model_files.then(|| self.model_files()))
            .is_err()
        {
            return End::Ended;
        }
        self.note_attached();
        loop {
            match downlink.message().await {
                Ok(Some(message)) => self.pass_on(id, message).await,
                Ok(None) => return End::Ended,
                Err(status) => return Box::new(status).into(),
            }
        }
    }

    async fn pass_on(&self, id: AttachmentId, message: v1::RouterMessage) {
        match message.message {
            Some(Down::Start(start)) => self.tell(Command::Start(id, start)).await,
            Some(Down::Abort(abort)) => self.tell(Command::Abort(id, abort.sequence_id)).await,
            // A second welcome says nothing new; an empty message is one that a newer router knows.
            Some(Down::Welcome(_)) | None => {}
        }
    }

    /// Hands a command to the step loop; waits while its queue is full. Once the agent closes nobody listens.
    async fn tell(&self, command: Command) {
        tokio::select! {
            biased;
            () = self.closing.cancelled() => {}
            _ = self.commands.send(command) => {}
        }
    }

    /// Done when the agent closes and its last messages have had their time.
    async fn overdue(&self) {
        self.closing.cancelled().await;
        time::sleep(self.config.close_grace).await;
    }

    fn model_files(&self) -> v1::WorkerMessage {
        let files = &self.config.model_files;
        v1::WorkerMessage {
            message: Some(Up::ModelFiles(v1::ModelFiles {
                tokenizer_json: files.tokenizer_json.clone(),
                tokenizer_config_json: files.tokenizer_config_json.clone(),
                generation_config_json: files.generation_config_json.clone(),
                chat_template: files.chat_template.clone(),
            })),
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

/// Opens the stream and waits for the welcome.
async fn greet(
    channel: Channel,
    uplink: Uplink,
) -> Result<(Streaming<v1::RouterMessage>, v1::Welcome), End> {
    let mut client =
        WorkerGatewayClient::new(channel).max_decoding_message_size(DOWNLINK_MESSAGE_BYTES_MAX);
    let mut downlink = client
        .attach(uplink.into_stream())
        .await
        .map_err(Box::new)?
        .into_inner();
    match downlink.message().await.map_err(Box::new)? {
        Some(v1::RouterMessage {
            message: Some(Down::Welcome(welcome)),
        }) => Ok((downlink, welcome)),
        Some(_) => Err(End::NoWelcome),
        None => Err(End::Ended),
    }
}

/// An end with its causes, for the log.
fn describe(end: &End) -> String {
    let mut text = end.to_string();
    let mut source = std::error::Error::source(end);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
