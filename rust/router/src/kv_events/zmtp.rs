//! The client's side of ZMTP 3.0, the protocol of `ZeroMQ` sockets: as much as it takes to subscribe to an engine and to ask it
//! for what was missed.
//!
//! By hand, because it is small (a greeting, one command each way, length-prefixed frames) and because a limit on the
//! size of a message and the time of reconnecting are ours to choose here. No authentication: engines offer none.

use std::{fmt, io, path::PathBuf, str::FromStr, time::Duration};

use rustix::net::sockopt;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpStream, UnixStream},
    time::timeout,
};

/// For the connection and the first words over it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection without traffic is probed after so long, so that one that is dead is noticed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
/// Most bytes of a message, all frames together. One step of a large engine publishes some 100 KB.
const MESSAGE_BYTES_MAX: u64 = 16 << 20;
/// Most frames of a message; an engine's have four at most.
const FRAMES_MAX: usize = 8;
const GREETING_BYTES: usize = 64;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Where an engine publishes: `tcp://host:port` or `ipc:///path`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// `host:port`.
    Tcp(String),
    /// A Unix socket.
    Ipc(PathBuf),
}

/// Not an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be tcp://host:port or ipc:///path")]
pub struct InvalidEndpoint;

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        if let Some(path) = text
            .strip_prefix("ipc://")
            .filter(|path| path.starts_with('/'))
        {
            return Ok(Self::Ipc(path.into()));
        }
        let authority = text.strip_prefix("tcp://").ok_or(InvalidEndpoint)?;
        let (host, port) = authority.rsplit_once(':').ok_or(InvalidEndpoint)?;
        let is_host = !host.is_empty() && host != "*" && !host.contains(['/', '@', ' ']);
        let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
        if !(is_host && is_port) {
            return Err(InvalidEndpoint);
        }
        Ok(Self::Tcp(authority.to_owned()))
    }
}

impl TryFrom<String> for Endpoint {
    type Error = InvalidEndpoint;

    fn try_from(text: String) -> Result<Self, InvalidEndpoint> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(authority) => write!(f, "tcp://{authority}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

/// What we are to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketType {
    Subscriber,
    Dealer,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A connection to one socket of an engine.
pub(super) struct Connection {
    stream: BufReader<Box<dyn Stream>>,
}

struct Frame {
    flags: u8,
    body: Vec<u8>,
}

impl Connection {
    /// Connects and introduces both sides to each other.
    pub(super) async fn open(endpoint: &Endpoint, kind: SocketType) -> io::Result<Self> {
        let opened = timeout(CONNECT_TIMEOUT, async {
            let stream: Box<dyn Stream> = match endpoint {
                Endpoint::Tcp(authority) => {
                    let stream = TcpStream::connect(authority.as_str()).await?;
                    sockopt::set_socket_keepalive(&stream, true)?;
                    sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
                    Box::new(stream)
                }
                Endpoint::Ipc(path) => Box::new(UnixStream::connect(path).await?),
            };
            let mut connection = Self {
                stream: BufReader::new(stream),
            };
            connection.greet(kind).await?;
            Ok(connection)
        });
        opened.await?
    }

    async fn greet(&mut self, kind: SocketType) -> io::Result<()> {
        let mut greeting = [0; GREETING_BYTES];
        // Signature, version 3.0, mechanism; the rest stays zero.
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        greeting[12..16].copy_from_slice(b"NULL");
        self.stream.write_all(&greeting).await?;
        let mut theirs = [0; GREETING_BYTES];
        self.stream.read_exact(&mut theirs).await?;
        if theirs[0] != 0xff || theirs[10] < 3 || &theirs[12..17] != b"NULL\0" {
            return Err(invalid(
                "the other side does not speak ZMTP 3 without authentication",
            ));
        }
        let name: &[u8] = match kind {
            SocketType::Subscriber => b"SUB",
            SocketType::Dealer => b"DEALER",
        };
        let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
        ready.extend((name.len() as u32).to_be_bytes());
        ready.extend(name);
        self.write_frame(COMMAND, &ready).await?;
        let answer = self.read_frame(MESSAGE_BYTES_MAX).await?;
        if answer.flags & COMMAND == 0 || !answer.body.starts_with(b"\x05READY") {
            return Err(invalid("the other side refused the handshake"));
        }
        Ok(())
    }

    /// Asks for messages whose first frame begins with this; a subscriber's first message.
    pub(super) async fn subscribe(&mut self, topic: &[u8]) -> io::Result<()> {
        self.write_frame(0, &[b"\x01", topic].concat()).await
    }

    /// Sends a message of several frames.
    pub(super) async fn send(&mut self, frames: &[&[u8]]) -> io::Result<()> {
        let last = frames.len().saturating_sub(1);
        for (index, frame) in frames.iter().enumerate() {
            let more = if index < last { MORE } else { 0 };
            self.write_frame(more, frame).await?;
        }
        Ok(())
    }

    /// The next message. Not to be called again after it was given up half-way.
    pub(super) async fn receive(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut left = MESSAGE_BYTES_MAX;
        loop {
            let frame = self.read_frame(left).await?;
            if frame.flags & COMMAND != 0 {
                self.answer(&frame.body).await?;
                continue;
            }
            left -= frame.body.len() as u64;
            frames.push(frame.body);
            if frame.flags & MORE == 0 {
                return Ok(frames);
            }
            if frames.len() == FRAMES_MAX {
                return Err(invalid("a message has too many frames"));
            }
        }
    }

    /// A ping is answered with its context, which follows two bytes of time to live; other commands need nothing.
    async fn answer(&mut self, command: &[u8]) -> io::Result<()> {
        match command.strip_prefix(b"\x04PING") {
            Some(ping) => {
                let context = ping.get(2..).unwrap_or_default();
                self.write_frame(COMMAND, &[b"\x04PONG", context].concat())
                    .await
            }
            None => Ok(()),
        }
    }

    async fn write_frame(&mut self, flags: u8, body: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(body.len() + 9);
        if let Ok(len) = u8::try_from(body.len()) {
            bytes.extend([flags, len]);
        } else {
            bytes.push(flags | LONG);
            bytes.extend((body.len() as u64).to_be_bytes());
        }
        bytes.extend(body);
        self.stream.write_all(&bytes).await
    }

    async fn read_frame(&mut self, limit: u64) -> io::Result<Frame> {
        let flags = self.stream.read_u8().await?;
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(invalid("a frame has unknown flags"));
        }
        let len = if flags & LONG == 0 {
            self.stream.read_u8().await?.into()
        } else {
            self.stream.read_u64().await?
        };
        if len > limit {
            return Err(invalid("a message is larger than 16 MiB"));
        }
        // Grows with what arrives, not with what was announced.
        let mut body = Vec::new();
        let read = (&mut self.stream).take(len).read_to_end(&mut body).await?;
        if (read as u64) < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Frame { flags, body })
    }
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_shown() {
        for text in ["tcp://engine-1:5557", "tcp://[::1]:5557", "ipc:///run/kv"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "engine:5557",
            "tcp://*:5557",
            "tcp://:5557",
            "tcp://engine",
            "tcp://engine:0",
            "ipc://kv",
            "tcp://a/b:1",
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(InvalidEndpoint), "{text}");
        }
    }
}
