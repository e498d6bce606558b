//! One attachment, from dialling the router to the end of the stream.
//!
//! ```text
//! connect ─► Command::Attached ─► hello (from the step loop) ─► Attach ─► welcome ─► [model files] ─► both ways
//! ```

use std::sync::Arc;

use orchestra_proto::v1::{
    self, router_message::Message as Down, worker_gateway_client::WorkerGatewayClient,
    worker_message::Message as Up,
};
use tokio::{
    sync::{mpsc, oneshot},
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use super::Network;
use crate::{
    attachment::{Attachment, AttachmentId, Command},
    uplink::{self, Uplink},
};

/// Largest message from a router: a prompt of a million tokens takes at most 5 MiB.
const DOWNLINK_MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Why an attempt to serve a router ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
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

impl Network {
    /// One attachment from dialling to its end.
    pub(super) async fn attach_once(&self, id: AttachmentId) -> End {
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
            Some(Down::Start(start)) => self.tell(Command::Start(id, Box::new(start))).await,
            Some(Down::Abort(abort)) => self.tell(Command::Abort(id, abort.sequence_id)).await,
            Some(Down::FromPeer(message)) => {
                if let Some(inbox) = &self.kv {
                    inbox.message(message);
                }
            }
            Some(Down::Keeper(keeper)) => self.tell(Command::Keeper(id, keeper.peer)).await,
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
        self.board.update(|stats| {
            let waiting = self.commands.max_capacity() - self.commands.capacity();
            stats.commands_waiting = waiting as u32;
        });
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
