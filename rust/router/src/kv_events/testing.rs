//! What tests need of an engine: its bytes, and its sockets.

use std::{io, sync::Arc};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::Endpoint;
use crate::tasks::Tasks;

/// Packs a value. An array `["0x", "deadbeef"]` becomes the bytes that it spells.
pub(crate) fn to_msgpack(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(value, &mut bytes);
    bytes
}

fn write(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Null => out.push(0xc0),
        Value::Bool(value) => out.push(0xc2 + u8::from(*value)),
        Value::Number(number) => {
            if let Some(value) = number.as_u64() {
                out.push(0xcf);
                out.extend(value.to_be_bytes());
            } else if let Some(value) = number.as_i64() {
                out.push(0xd3);
                out.extend(value.to_be_bytes());
            } else {
                out.push(0xcb);
                out.extend(number.as_f64().unwrap().to_be_bytes());
            }
        }
        Value::String(text) => {
            out.push(0xdb);
            out.extend((text.len() as u32).to_be_bytes());
            out.extend(text.bytes());
        }
        Value::Array(values) if values.first().is_some_and(|first| first == "0x") => {
            let hex = values[1].as_str().unwrap();
            let bytes: Vec<u8> = (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                .collect();
            out.extend([0xc4, bytes.len() as u8]);
            out.extend(bytes);
        }
        Value::Array(values) => {
            out.push(0xdd);
            out.extend((values.len() as u32).to_be_bytes());
            for value in values {
                write(value, out);
            }
        }
        Value::Object(pairs) => {
            out.push(0xdf);
            out.extend((pairs.len() as u32).to_be_bytes());
            for (key, value) in pairs {
                write(&Value::String(key.clone()), out);
                write(value, out);
            }
        }
    }
}

/// A mock of an engine's publisher, as vLLM's behaves: numbers its messages, sends them to whoever subscribed, and
/// replays those that it kept. Its side of the protocol is written here, apart from the client that is tested.
pub(crate) struct MockEngine {
    state: Arc<Mutex<State>>,
    sent: watch::Sender<u64>,
    cut: watch::Sender<u64>,
    num_subscribers: watch::Sender<usize>,
    pub(crate) events: Endpoint,
    pub(crate) replay: Endpoint,
    tasks: Tasks,
}

#[derive(Default)]
struct State {
    /// By number: the payload, and whether it is sent to subscribers.
    kept: Vec<(u64, Vec<u8>, bool)>,
    next: u64,
    /// Most messages of one replay: more are dropped, as a socket's high-water mark does.
    replay_max: usize,
    refuses_replays: bool,
}

impl MockEngine {
    pub(crate) async fn start() -> Self {
        let listeners = [
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        ];
        let [events, replay] = [0, 1].map(|index| {
            let address = listeners[index].local_addr().unwrap();
            format!("tcp://{address}").parse().unwrap()
        });
        let state = State {
            replay_max: usize::MAX,
            ..State::default()
        };
        let engine = Self {
            state: Arc::new(Mutex::new(state)),
            sent: watch::Sender::new(0),
            cut: watch::Sender::new(0),
            num_subscribers: watch::Sender::new(0),
            events,
            replay,
            tasks: Tasks::default(),
        };
        let [publisher, router] = listeners;
        engine.serve(publisher, true);
        engine.serve(router, false);
        engine
    }

    fn serve(&self, listener: TcpListener, publishes: bool) {
        let (state, sent, cut) = (Arc::clone(&self.state), self.sent.clone(), self.cut.clone());
        let (tasks, subscribers) = (self.tasks.clone(), self.num_subscribers.clone());
        self.tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, subscribers) = (Arc::clone(&state), subscribers.clone());
                let (sent, mut cut) = (sent.subscribe(), cut.subscribe());
                tasks.spawn(async move {
                    let session = async {
                        if publishes {
                            publish(stream, &state, sent, &subscribers).await
                        } else {
                            answer(stream, &state).await
                        }
                    };
                    tokio::select! {
                        biased;
                        _ = cut.changed() => {}
                        _ = session => {}
                    }
                });
            }
        });
    }

    /// Numbers a message of these events and sends it, or does not.
    pub(crate) fn publish(&self, events: &Value, is_sent: bool) {
        self.publish_bytes(to_msgpack(&json!([0.5, events, 0])), is_sent);
    }

    pub(super) fn publish_bytes(&self, payload: Vec<u8>, is_sent: bool) {
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.kept.push((number, payload, is_sent));
        drop(state);
        self.sent.send_modify(|version| *version += 1);
    }

    /// Breaks every connection.
    pub(super) fn cut(&self) {
        self.cut.send_modify(|version| *version += 1);
    }

    /// Another process of the same engine.
    pub(super) fn restart(&self) {
        let mut state = self.state.lock();
        (state.kept, state.next) = (Vec::new(), 0);
        drop(state);
        self.cut();
    }

    /// Keeps the last messages only.
    pub(super) fn keep(&self, num_kept: usize) {
        let mut state = self.state.lock();
        let excess = state.kept.len().saturating_sub(num_kept);
        state.kept.drain(..excess);
    }

    pub(super) fn limit_replays(&self, replay_max: usize) {
        self.state.lock().replay_max = replay_max;
    }

    pub(super) fn refuse_replays(&self, refuses: bool) {
        self.state.lock().refuses_replays = refuses;
    }

    /// Returns when somebody subscribed who was not cut off.
    pub(crate) async fn subscribed(&self) {
        let mut count = self.num_subscribers.subscribe();
        count.wait_for(|&count| count > 0).await.unwrap();
    }
}

async fn shake_hands(stream: &mut TcpStream, kind: &[u8]) -> io::Result<()> {
    let mut greeting = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
    greeting.extend(b"NULL");
    greeting.resize(64, 0);
    stream.write_all(&greeting).await?;
    stream.read_exact(&mut [0; 64]).await?;
    let (flags, ready) = frame(stream).await?;
    assert_eq!((flags, &ready[..6]), (4, &b"\x05READY"[..]));
    let mut answer = b"\x05READY\x0bSocket-Type\0\0\0".to_vec();
    answer.push(kind.len() as u8);
    answer.extend(kind);
    stream.write_all(&[4, answer.len() as u8]).await?;
    stream.write_all(&answer).await
}

async fn frame(stream: &mut TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let flags = stream.read_u8().await?;
    let len = stream.read_u8().await?;
    let mut body = vec![0; len.into()];
    stream.read_exact(&mut body).await?;
    Ok((flags, body))
}

/// Frames of a message, all with eight bytes of length but the empty ones.
async fn send(stream: &mut TcpStream, frames: &[&[u8]]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        let more = u8::from(index + 1 < frames.len());
        if frame.is_empty() {
            bytes.extend([more, 0]);
        } else {
            bytes.push(more | 2);
            bytes.extend((frame.len() as u64).to_be_bytes());
            bytes.extend(*frame);
        }
    }
    stream.write_all(&bytes).await
}

async fn publish(
    mut stream: TcpStream,
    state: &Mutex<State>,
    mut sent: watch::Receiver<u64>,
    subscribers: &watch::Sender<usize>,
) -> io::Result<()> {
    shake_hands(&mut stream, b"PUB").await?;
    let (_, subscription) = frame(&mut stream).await?;
    assert_eq!(subscription, b"\x01kv");
    // A ping, as an engine with heartbeats sends it: answered, and not taken for a message.
    stream.write_all(b"\x04\x09\x04PING\0\x0aab").await?;
    let mut next = state.lock().next;
    let _subscriber = Subscriber::new(subscribers);
    let (flags, pong) = frame(&mut stream).await?;
    assert_eq!((flags, &pong[..]), (4, &b"\x04PONGab"[..]));
    loop {
        let due: Vec<_> = {
            let state = state.lock();
            let due = state.kept.iter().filter(|(number, ..)| *number >= next);
            due.cloned().collect()
        };
        for (number, payload, is_sent) in due {
            next = number + 1;
            if is_sent {
                send(&mut stream, &[b"kv", &number.to_be_bytes(), &payload]).await?;
            }
        }
        sent.changed().await.map_err(io::Error::other)?;
    }
}

/// One more subscriber while it lives.
struct Subscriber<'a>(&'a watch::Sender<usize>);

impl<'a> Subscriber<'a> {
    fn new(subscribers: &'a watch::Sender<usize>) -> Self {
        subscribers.send_modify(|count| *count += 1);
        Self(subscribers)
    }
}

impl Drop for Subscriber<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

async fn answer(mut stream: TcpStream, state: &Mutex<State>) -> io::Result<()> {
    if state.lock().refuses_replays {
        return Ok(());
    }
    shake_hands(&mut stream, b"ROUTER").await?;
    loop {
        assert_eq!(
            frame(&mut stream).await?,
            (1, vec![]),
            "an empty frame goes first"
        );
        let (_, first) = frame(&mut stream).await?;
        let first = u64::from_be_bytes(first.try_into().unwrap());
        let due: Vec<_> = {
            let state = state.lock();
            let due = state.kept.iter().filter(|(number, ..)| *number >= first);
            due.take(state.replay_max).cloned().collect()
        };
        for (number, payload, _) in due {
            send(&mut stream, &[b"", &number.to_be_bytes(), &payload]).await?;
        }
        send(&mut stream, &[b"", &u64::MAX.to_be_bytes(), b""]).await?;
    }
}
