//! Follows an engine's KV events over the network: connects, subscribes, asks for what was missed, and begins again.
//!
//! The engine numbers its messages and keeps the last ones (10,000 by default) for who asks. Nothing is buffered here:
//! while missed messages are replayed, live ones wait in the connection and in the engine, which drops them where that
//! is too many; that is a gap like any other.

use std::{io, time::Duration};

use orchestra_core::{
    scheduler::{SchedulerError, WorkerSpec},
    step::KvEvent,
};
use tokio::time::{sleep, timeout};

use super::{
    feed::{Feed, Gone, Loss, Order, digest},
    zmtp::{Connection, Endpoint, SocketType},
};
use crate::metrics::KvEventSeries;

/// First pause before connecting again; doubles up to the longest one.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// An engine looks for requests ten times a second, and between the steps of a busy one.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(2);
/// Most requests to fill one gap. An engine's socket may drop what it cannot send at once, about 1,000 messages.
const REPLAY_ROUNDS_MAX: u32 = 64;
/// The number of the message that ends a replay.
const REPLAY_END: u64 = u64::MAX;

/// Where an engine's events come from.
#[derive(Clone, Debug)]
pub struct KvEventSource {
    /// What the worker was registered as: its blocks' identities follow from it.
    pub spec: WorkerSpec,
    /// Where it publishes.
    pub events: Endpoint,
    /// Where it replays what it published, if it does.
    pub replay: Option<Endpoint>,
    /// The topic that it publishes under; empty takes all.
    pub topic: String,
}

/// Follows an engine until `apply` says that its worker is gone. To be dropped to end it earlier.
///
/// `apply` hears what the engine's cache holds, as the scheduler takes it.
pub async fn follow(
    source: KvEventSource,
    series: KvEventSeries,
    apply: impl FnMut(&KvEvent) -> Result<(), SchedulerError> + Send,
) {
    let mut subscriber = Subscriber {
        feed: Feed::new(source.spec.clone(), series, apply),
        source,
        is_connected: false,
    };
    let mut pause = RETRY_MIN;
    loop {
        let Err(end) = subscriber.session().await;
        let End::Broken(error) = end else { return };
        if subscriber.is_connected {
            pause = RETRY_MIN;
        }
        if subscriber.disconnected(&error) == Err(Gone) {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// Why a session ended.
enum End {
    Gone,
    Broken(io::Error),
}

impl From<Gone> for End {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// What a request for a replay brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replay {
    /// The first message asked for, and those after it as far as they came.
    Continues,
    /// Later messages only, or a message of another engine under this number, or none.
    Differs,
}

struct Subscriber<A> {
    source: KvEventSource,
    feed: Feed<A>,
    is_connected: bool,
}

impl<A: FnMut(&KvEvent) -> Result<(), SchedulerError> + Send> Subscriber<A> {
    async fn session(&mut self) -> Result<std::convert::Infallible, End> {
        let mut live = Connection::open(&self.source.events, SocketType::Subscriber).await?;
        live.subscribe(self.source.topic.as_bytes()).await?;
        self.is_connected = true;
        tracing::info!(worker = self.source.spec.name, "kv events connected");
        let _connected = self.feed.series.connected();
        self.catch_up().await?;
        let mut last = None;
        loop {
            let message = live.receive().await?;
            let (sequence, payload) = numbered(&message)?;
            if last.is_some_and(|last| sequence <= last) {
                self.feed.start_anew(Loss::Restart)?;
                self.replay_all().await?;
            }
            last = Some(sequence);
            if self.feed.order(sequence) == Order::Gap {
                self.fill_gap(sequence).await?;
            }
            if self.feed.order(sequence) == Order::Next {
                self.feed.take(sequence, payload)?;
            }
        }
    }

    fn disconnected(&mut self, error: &io::Error) -> Result<(), Gone> {
        if !std::mem::take(&mut self.is_connected) {
            return Ok(());
        }
        let worker = &self.source.spec.name;
        tracing::warn!(worker, %error, "kv events disconnected");
        match self.source.replay {
            Some(_) => Ok(()),
            None => self.feed.start_anew(Loss::Disconnect),
        }
    }

    /// Brings the feed up to date after connecting, as far as the engine can replay.
    async fn catch_up(&mut self) -> Result<(), Gone> {
        if self.source.replay.is_none() {
            return Ok(());
        }
        if let Some(seen) = self.feed.seen {
            // The last message again: if it is still the same one, this is still the same engine.
            match self.replay(seen.sequence, Some(seen.digest)).await? {
                Replay::Continues => return self.replay_rest().await,
                Replay::Differs => self.feed.start_anew(Loss::Restart)?,
            }
        }
        self.replay_all().await
    }

    /// Everything that the engine still has, to a feed that has seen nothing.
    async fn replay_all(&mut self) -> Result<(), Gone> {
        if self.source.replay.is_some() {
            self.replay(0, None).await?;
            self.replay_rest().await?;
        }
        Ok(())
    }

    /// Asks again as long as that brings more: parts of a long replay may have been dropped.
    async fn replay_rest(&mut self) -> Result<(), Gone> {
        for _ in 0..REPLAY_ROUNDS_MAX {
            let Some(before) = self.feed.seen else { break };
            self.replay(before.sequence + 1, None).await?;
            if self.feed.seen == Some(before) {
                break;
            }
        }
        Ok(())
    }

    /// Takes what is missing before a message; without it, the message is the first one of a cache that is unknown.
    async fn fill_gap(&mut self, sequence: u64) -> Result<(), Gone> {
        if self.source.replay.is_some() {
            self.replay_rest().await?;
        }
        if self.feed.order(sequence) != Order::Gap {
            self.feed.series.gap_replayed();
            return Ok(());
        }
        self.feed.start_anew(Loss::Gap)?;
        self.replay_all().await
    }

    /// Asks for the messages from `first` on and takes them in order, up to the first one that is missing. With
    /// `expected`, the first one has to be that message.
    async fn replay(&mut self, first: u64, expected: Option<u64>) -> Result<Replay, Gone> {
        let Some(endpoint) = &self.source.replay else {
            return Ok(Replay::Differs);
        };
        let opened = Connection::open(endpoint, SocketType::Dealer).await;
        let Ok(mut connection) = opened else {
            return Ok(Replay::Differs);
        };
        let request: [&[u8]; 2] = [b"", &first.to_be_bytes()];
        let mut outcome = Replay::Differs;
        if connection.send(&request).await.is_err() {
            return Ok(outcome);
        }
        while let Ok(Ok(message)) = timeout(REPLAY_TIMEOUT, connection.receive()).await {
            let Ok((sequence, payload)) = numbered(&message) else {
                break;
            };
            if sequence == REPLAY_END {
                break;
            }
            if outcome == Replay::Differs {
                let is_same = expected.is_none_or(|expected| expected == digest(payload));
                if (sequence != first && expected.is_some()) || !is_same {
                    break;
                }
                outcome = Replay::Continues;
            }
            match self.feed.order(sequence) {
                Order::Before => {}
                Order::Next => self.feed.take(sequence, payload)?,
                Order::Gap => break,
            }
        }
        Ok(outcome)
    }
}

/// Number and payload of a message: its last two frames.
fn numbered(message: &[Vec<u8>]) -> io::Result<(u64, &[u8])> {
    let [.., sequence, payload] = message else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let sequence = sequence.as_slice().try_into();
    let sequence = sequence.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((u64::from_be_bytes(sequence), payload))
}
