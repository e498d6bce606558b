//! HTTP/1.1 towards an engine, on one connection, one request at a time.
//!
//! This is written out here because a relay lives in one task: request, answer and client are polled together. A
//! client library hands every chunk of an answer through a channel between two futures, which wake each other; here what
//! one read of the socket gave is decoded in one pass, and goes to the client in one piece. It also makes the two
//! questions plain that decide whether a request may be sent again: was the connection an old one, and did any byte of
//! an answer come.

mod body;

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use bytes::BytesMut;
use futures_util::future::poll_fn;
use tokio::io::AsyncWrite as _;
use tokio_util::io::poll_read_buf;

use self::body::Decoder;
use super::connect::Socket;

/// The largest head of an answer, and the most headers in it.
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 64;
/// What one read takes at first, and at most: it grows while reads fill what there is.
const READ_BYTES: usize = 4 << 10;
const READ_BYTES_MAX: usize = 64 << 10;

/// Why an exchange broke.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the connection broke ({0})")]
    Io(io::ErrorKind),
    /// Before the head, or within a body that was not complete.
    #[error("the engine closed the connection before its answer was complete")]
    Closed,
    #[error("the engine's answer is not HTTP: {0}")]
    Malformed(&'static str),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        // Not the message: it may name an address.
        Self::Io(error.kind())
    }
}

/// The head of an answer.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: u16,
    /// Without those that concern the connection alone.
    pub(crate) headers: HeaderMap,
    /// Of the body, where the engine said it.
    pub(crate) length: Option<u64>,
}

/// A connection to an engine.
pub(crate) struct Connection {
    socket: Box<dyn Socket>,
    /// Read and not yet decoded.
    received: BytesMut,
    /// What the next read takes at most.
    read_bytes: usize,
    body: Decoder,
    /// Whether the engine lets the next request come on it.
    is_persistent: bool,
    /// Whether the request has gone out whole.
    is_sent: bool,
    /// Whether a byte of the present answer has come.
    has_answered: bool,
}

impl Connection {
    pub(crate) fn new(socket: Box<dyn Socket>) -> Self {
        Self {
            socket,
            received: BytesMut::new(),
            read_bytes: READ_BYTES,
            body: Decoder::Done,
            is_persistent: true,
            is_sent: true,
            has_answered: false,
        }
    }

    /// Whether a byte of the answer to the last request has come.
    pub(crate) fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// Whether the last answer is complete and another request may follow.
    pub(crate) fn is_reusable(&self) -> bool {
        self.is_persistent && self.is_sent && self.body.is_done() && self.received.is_empty()
    }

    /// Whether an idle connection is still open, as far as this end knows. Bytes that nobody asked for close it too.
    pub(crate) fn is_open(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        self.poll_read(&mut context).is_pending()
    }

    /// Returns when the idle connection ends, or sends what nobody asked for.
    pub(crate) async fn closed(&mut self) {
        let _ = poll_fn(|cx| self.poll_read(cx)).await;
    }

    /// Gives a large read buffer back: an idle connection needs a small one at most.
    pub(crate) fn rest(&mut self) {
        if self.read_bytes > READ_BYTES {
            self.received = BytesMut::new();
            self.read_bytes = READ_BYTES;
        }
    }

    /// Sends a request and waits for the head of its answer. The engine may answer before it has read everything.
    pub(crate) async fn send(&mut self, head: &[u8], body: &[u8]) -> Result<Head, WireError> {
        (self.has_answered, self.is_sent) = (false, false);
        // Where the future is dropped before the head has come, the rest belongs to nobody.
        self.body = Decoder::UntilClosed;
        let mut sent = 0;
        poll_fn(|cx| {
            if !self.is_sent
                && let Poll::Ready(written) = self.poll_write(cx, head, body, &mut sent)
            {
                // An engine that closes early may have answered first.
                if let Err(error) = written
                    && self.received.is_empty()
                {
                    match self.poll_read(cx) {
                        Poll::Ready(Ok(count)) if count > 0 => {}
                        _ => return Poll::Ready(Err(error.into())),
                    }
                }
            }
            self.poll_head(cx)
        })
        .await
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        head: &[u8],
        body: &[u8],
        sent: &mut usize,
    ) -> Poll<io::Result<()>> {
        while *sent < head.len() + body.len() {
            let socket = Pin::new(&mut self.socket);
            let count = if *sent < head.len() {
                let parts = [io::IoSlice::new(&head[*sent..]), io::IoSlice::new(body)];
                ready!(socket.poll_write_vectored(cx, &parts))?
            } else {
                ready!(socket.poll_write(cx, &body[*sent - head.len()..]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *sent += count;
        }
        self.is_sent = true;
        Poll::Ready(Ok(()))
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Head, WireError>> {
        loop {
            if !self.received.is_empty() {
                match self.parse_head() {
                    Ok(Some(head)) => return Poll::Ready(Ok(head)),
                    Ok(None) if self.received.len() >= HEAD_BYTES_MAX => {
                        return Poll::Ready(Err(WireError::Malformed("the head is too large")));
                    }
                    Ok(None) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            if ready!(self.poll_read(cx))? == 0 {
                return Poll::Ready(Err(WireError::Closed));
            }
            self.has_answered = true;
        }
    }

    /// The head, once it is complete. Interim answers (100 and the like) are passed over.
    fn parse_head(&mut self) -> Result<Option<Head>, WireError> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut parsed = httparse::Response::new(&mut headers);
            let malformed = |_| WireError::Malformed("its head cannot be read");
            let length = match parsed.parse(&self.received).map_err(malformed)? {
                httparse::Status::Complete(length) => length,
                httparse::Status::Partial => return Ok(None),
            };
            let status = parsed.code.unwrap_or_default();
            if status == 101 {
                return Err(WireError::Malformed("it switches protocols"));
            }
            if status < 200 {
                let _ = self.received.split_to(length);
                if self.received.is_empty() {
                    return Ok(None);
                }
                continue;
            }
            let mut framing = Framing::new(status, parsed.version == Some(1));
            let mut kept = HeaderMap::with_capacity(parsed.headers.len());
            for field in parsed.headers.iter() {
                if !framing.take(field.name, field.value)?
                    && let Ok(name) = HeaderName::from_bytes(field.name.as_bytes())
                    && let Ok(value) = HeaderValue::from_bytes(field.value)
                {
                    kept.append(name, value);
                }
            }
            let _ = self.received.split_to(length);
            self.is_persistent = framing.is_persistent;
            self.body = framing.decoder();
            let length = framing.length.filter(|_| !framing.is_chunked);
            return Ok(Some(Head {
                status,
                headers: kept,
                length,
            }));
        }
    }

    /// Appends the next bytes of the body to `out`, all that one read gave; false at the body's end.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut BytesMut,
    ) -> Poll<Result<bool, WireError>> {
        loop {
            let before = out.len();
            self.body.decode(&mut self.received, out)?;
            if out.len() > before {
                return Poll::Ready(Ok(true));
            }
            if self.body.is_done() {
                return Poll::Ready(Ok(false));
            }
            if ready!(self.poll_read(cx))? == 0 {
                self.is_persistent = false;
                return Poll::Ready(self.body.end().map(|()| false));
            }
        }
    }

    /// [`Self::poll_body`] as a future. Dropping it loses nothing.
    pub(crate) async fn read_body(&mut self, out: &mut BytesMut) -> Result<bool, WireError> {
        poll_fn(|cx| self.poll_body(cx, out)).await
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.received.reserve(self.read_bytes);
        let count = ready!(poll_read_buf(
            Pin::new(&mut self.socket),
            cx,
            &mut self.received
        ))?;
        if count >= self.read_bytes {
            self.read_bytes = (self.read_bytes * 4).min(READ_BYTES_MAX);
        }
        Poll::Ready(Ok(count))
    }
}

/// What the headers of an answer say about where its body ends.
struct Framing {
    has_body: bool,
    length: Option<u64>,
    is_chunked: bool,
    is_persistent: bool,
}

impl Framing {
    fn new(status: u16, is_http_1_1: bool) -> Self {
        Self {
            has_body: !matches!(status, 204 | 304),
            length: None,
            is_chunked: false,
            is_persistent: is_http_1_1,
        }
    }

    /// Reads a header; true where it concerns this connection alone, or says who the engine is.
    fn take(&mut self, name: &str, value: &[u8]) -> Result<bool, WireError> {
        let is = |header: HeaderName| name.eq_ignore_ascii_case(header.as_str());
        if is(header::CONTENT_LENGTH) {
            let length = std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.trim().parse().ok());
            let is_same = self.length.is_none_or(|earlier| Some(earlier) == length);
            if length.is_none() || !is_same {
                return Err(WireError::Malformed("its length cannot be read"));
            }
            self.length = length;
        } else if is(header::TRANSFER_ENCODING) {
            if !value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                return Err(WireError::Malformed("its transfer encoding is not known"));
            }
            self.is_chunked = true;
        } else if is(header::CONNECTION) {
            let mut tokens = value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
            if tokens.any(|token| token.eq_ignore_ascii_case(b"close")) {
                self.is_persistent = false;
            }
        } else {
            return Ok(is(header::DATE)
                || is(header::SERVER)
                || is(header::VIA)
                || is(header::LOCATION)
                || is(header::TRAILER)
                || is(header::UPGRADE)
                || is(header::PROXY_AUTHENTICATE)
                || is(header::WWW_AUTHENTICATE)
                || name.eq_ignore_ascii_case("keep-alive")
                || name.eq_ignore_ascii_case("x-request-id"));
        }
        Ok(true)
    }

    fn decoder(&mut self) -> Decoder {
        match self.length {
            _ if !self.has_body => Decoder::Done,
            _ if self.is_chunked => Decoder::chunked(),
            Some(length) => Decoder::length(length),
            None => {
                self.is_persistent = false;
                Decoder::UntilClosed
            }
        }
    }
}

#[cfg(test)]
mod tests;
