//! Follows a prefix of an etcd: a read of all keys, then a watch from that revision on. When the watch breaks, for
//! whatever reason, it starts over with a read, so that nothing is missed and nothing is assumed.

use std::time::Duration;

use async_stream::stream;
use futures_core::Stream;
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::{
    ENTRIES_MAX, Entries, StoreUrl, VALUE_BYTES_MAX,
    backoff::Backoff,
    wire::{
        KeyValue, RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse, event::EventType,
        kv_client::KvClient, watch_client::WatchClient, watch_request::RequestUnion,
    },
};

/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence after which a ping asks whether the store is there, and how long its answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(2));
/// Answers of a read are at most this large: all entries that are taken in, and some room.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Yields the keys of `kind` below the store's prefix: once when they are first known, then whenever they change. Never
/// ends, and yields nothing while the store is away.
pub fn watch(url: &StoreUrl, kind: &str) -> impl Stream<Item = Entries> + Send + 'static {
    let url = url.clone();
    let prefix = url.prefix_of(kind);
    stream! {
        let mut backoff = Backoff::new();
        let mut known: Option<Entries> = None;
        loop {
            match Follower::start(&url, &prefix).await {
                Ok(mut follower) => {
                    backoff.reset();
                    loop {
                        if known.as_ref() != Some(&follower.entries) {
                            known = Some(follower.entries.clone());
                            yield follower.entries.clone();
                        }
                        if let Err(error) = follower.follow().await {
                            tracing::warn!(%url, %error, "the store's watch broke; what it last said holds");
                            break;
                        }
                    }
                }
                Err(error) => tracing::warn!(%url, %error, "the store cannot be reached; what it last said holds"),
            }
            time::sleep(backoff.next_pause()).await;
        }
    }
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{} ({:?})", .0.message(), .0.code())]
    Store(#[from] Status),
    #[error(transparent)]
    Endpoint(#[from] tonic::transport::Error),
    #[error("no answer within {CALL_TIMEOUT:?}")]
    Late,
    #[error("the store ended it: {0}")]
    Ended(String),
}

/// A watch, and the keys as of its last event.
struct Follower {
    /// The watch ends with it.
    _requests: mpsc::Sender<WatchRequest>,
    events: Streaming<WatchResponse>,
    prefix: String,
    entries: Entries,
}

impl Follower {
    async fn start(url: &StoreUrl, prefix: &str) -> Result<Self, Broken> {
        let channel = channel(&url.endpoints)?;
        let all = RangeRequest {
            key: prefix.into(),
            range_end: end_of(prefix),
            limit: ENTRIES_MAX as i64,
        };
        let mut kv = KvClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        let found = in_time(kv.range(demanding(all))).await?;
        if found.more {
            tracing::warn!(
                prefix,
                limit = ENTRIES_MAX,
                "the store has more keys; they are left out"
            );
        }
        let create = WatchCreateRequest {
            key: prefix.into(),
            range_end: end_of(prefix),
            start_revision: found.header.map_or(0, |header| header.revision) + 1,
        };
        let (requests, outgoing) = mpsc::channel(1);
        let first = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        };
        // Room for one, and nobody else sends.
        let _ = requests.send(first).await;
        let mut watch = WatchClient::new(channel);
        let outgoing = demanding(ReceiverStream::new(outgoing));
        let mut follower = Self {
            _requests: requests,
            events: in_time(watch.watch(outgoing)).await?,
            prefix: prefix.to_owned(),
            entries: Entries::new(),
        };
        for pair in found.kvs {
            follower.put(pair);
        }
        Ok(follower)
    }

    /// Waits for the next change and takes it in.
    async fn follow(&mut self) -> Result<(), Broken> {
        let Some(answer) = self.events.message().await? else {
            return Err(Broken::Ended("no reason given".to_owned()));
        };
        // Among others, where the revision to start from has been compacted away.
        if answer.canceled {
            return Err(Broken::Ended(answer.cancel_reason));
        }
        for event in answer.events {
            let kind = event.r#type();
            let Some(pair) = event.kv else { continue };
            match kind {
                EventType::Put => self.put(pair),
                EventType::Delete => {
                    if let Some(key) = key_of(&pair, &self.prefix) {
                        self.entries.remove(key);
                    }
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, pair: KeyValue) {
        let Some(key) = key_of(&pair, &self.prefix) else {
            tracing::warn!(
                prefix = self.prefix,
                "a key of the store is not text; left out"
            );
            return;
        };
        let bytes = pair.value.len();
        if bytes > VALUE_BYTES_MAX {
            tracing::warn!(
                key,
                bytes,
                limit = VALUE_BYTES_MAX,
                "a value of the store is too large; left out"
            );
            // What it replaced does not hold any more either.
            self.entries.remove(key);
            return;
        }
        if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(key) {
            tracing::warn!(
                key,
                limit = ENTRIES_MAX,
                "the store has too many keys; left out"
            );
            return;
        }
        let key = key.to_owned();
        self.entries.insert(key, pair.value);
    }
}

/// A connection to any of the members; it is made with the first call.
fn channel(endpoints: &[String]) -> Result<Channel, Broken> {
    let endpoints = endpoints.iter().map(|endpoint| {
        let endpoint = Endpoint::from_shared(endpoint.clone())?;
        Ok(endpoint
            .connect_timeout(CALL_TIMEOUT)
            .http2_keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .keep_alive_while_idle(true))
    });
    let endpoints: Result<Vec<_>, tonic::transport::Error> = endpoints.collect();
    Ok(Channel::balance_list(endpoints?.into_iter()))
}

/// A request that a member refuses which has lost its cluster, instead of leaving it without an answer.
fn demanding<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("hasleader", MetadataValue::from_static("true"));
    request
}

/// The first key behind all that begin with `prefix`, which ends with a slash.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// The key without the prefix.
fn key_of<'a>(pair: &'a KeyValue, prefix: &str) -> Option<&'a str> {
    std::str::from_utf8(&pair.key).ok()?.strip_prefix(prefix)
}

async fn in_time<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Broken> {
    match time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Broken::Late),
    }
}
