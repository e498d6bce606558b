//! What goes up the stream to the router, in order.

use std::{sync::Arc, time::Duration};

use async_stream::stream;
use orchestra_proto::v1;
use tokio::{
    sync::{mpsc, oneshot},
    time::{self, MissedTickBehavior},
};
use tokio_stream::Stream;

use crate::load::LoadBoard;

/// Messages from the step loop that may wait for the network. When it is full, the step loop waits, at most
/// [`outbound_stall_limit`](crate::AgentConfig::outbound_stall_limit).
pub(crate) const OUTBOUND_MAX: usize = 256;

/// What the stream is made of.
pub(crate) struct Uplink {
    /// The first message.
    pub(crate) hello: v1::WorkerMessage,
    /// The router's welcome, with the model files where it wants them. Nothing is sent before it.
    pub(crate) welcome: oneshot::Receiver<Option<v1::WorkerMessage>>,
    /// What the step loop sends. When it lets go of its end, the stream ends after what is queued.
    pub(crate) outbound: mpsc::Receiver<v1::WorkerMessage>,
    /// Where the load reports come from.
    pub(crate) board: Arc<LoadBoard>,
    /// Time between two of them.
    pub(crate) heartbeat: Duration,
}

impl Uplink {
    /// The messages as gRPC asks for them: one at a time, when the router has room for it.
    pub(crate) fn into_stream(self) -> impl Stream<Item = v1::WorkerMessage> + Send + 'static {
        let Self {
            hello,
            welcome,
            mut outbound,
            board,
            heartbeat,
        } = self;
        stream! {
            yield hello;
            let Ok(model_files) = welcome.await else { return };
            if let Some(files) = model_files {
                yield files;
            }
            let mut heartbeat = time::interval(heartbeat);
            // A late report is as good as two: after a pause they do not come in a burst.
            heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let message = tokio::select! {
                    biased;
                    _ = heartbeat.tick() => board.report(),
                    message = outbound.recv() => match message {
                        Some(message) => message,
                        None => return,
                    },
                };
                yield message;
            }
        }
    }
}
