//! Finds clients that are slow to say what they want.
//!
//! ```text
//! accepted ──► timed ──head complete──► busy ──response written──► idle ──first byte──► timed …
//!              └── longer than the limit: closed
//! ```
//!
//! hyper's own timer starts when a connection falls idle, so it cannot tell a client that dribbles a head from one
//! that has nothing to ask; this one can.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{body::Body, http::Version};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// Nothing is being read.
const IDLE: u64 = 0;
/// A request is being answered, or the connection is HTTP/2, where heads come between other frames and pings find
/// a dead peer.
const BUSY: u64 = u64::MAX;

/// When the head that is being read began.
#[derive(Debug)]
pub(super) struct HeadClock {
    accepted: Instant,
    /// Milliseconds from `accepted`, plus one; or [`IDLE`] or [`BUSY`].
    head_began: AtomicU64,
}

impl HeadClock {
    /// Starts timing: a fresh connection owes us a head.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            accepted: Instant::now(),
            head_began: AtomicU64::new(1),
        })
    }

    /// A request's head is complete. The request lasts until the guard drops.
    pub(super) fn head_arrived(self: &Arc<Self>, version: Version) -> Answering {
        self.head_began.store(BUSY, Relaxed);
        Answering((version != Version::HTTP_2).then(|| Arc::clone(self)))
    }

    fn bytes_arrived(&self) {
        let now = self.accepted.elapsed().as_millis() as u64 + 1;
        // Fails where a head is being read already.
        let _ = self
            .head_began
            .compare_exchange(IDLE, now, Relaxed, Relaxed);
    }

    /// Returns when a head has taken longer than `limit`, at most half of it late.
    pub(super) async fn expired(&self, limit: Duration) {
        loop {
            let wait = match self.head_began.load(Relaxed) {
                IDLE | BUSY => limit / 2,
                began => {
                    let deadline = self.accepted + Duration::from_millis(began - 1) + limit;
                    match deadline.checked_duration_since(Instant::now()) {
                        Some(left) if !left.is_zero() => left,
                        _ => return,
                    }
                }
            };
            tokio::time::sleep(wait).await;
        }
    }
}

/// A request is being answered.
#[derive(Debug)]
pub(super) struct Answering(Option<Arc<HeadClock>>);

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(clock) = &self.0 {
            clock.head_began.store(IDLE, Relaxed);
        }
    }
}

/// A response's body; the request ends with it.
#[derive(Debug)]
pub(super) struct AnswerBody {
    body: Body,
    _answering: Answering,
}

impl AnswerBody {
    pub(super) fn new(body: Body, answering: Answering) -> Self {
        Self {
            body,
            _answering: answering,
        }
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket that tells the clock when bytes come in.
#[derive(Debug)]
pub(super) struct HeadWatched<T> {
    io: T,
    clock: Arc<HeadClock>,
}

impl<T> HeadWatched<T> {
    pub(super) fn new(io: T, clock: Arc<HeadClock>) -> Self {
        Self { io, clock }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for HeadWatched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buffer));
        if buffer.filled().len() > before {
            self.clock.bytes_arrived();
        }
        Poll::Ready(result)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for HeadWatched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    async fn expires_within(clock: &HeadClock, time: Duration) -> bool {
        tokio::time::timeout(time, clock.expired(LIMIT))
            .await
            .is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_expires() {
        let clock = HeadClock::new();
        assert!(!expires_within(&clock, LIMIT.mul_f64(0.99)).await);
        assert!(expires_within(&clock, LIMIT.mul_f64(0.02)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_stays_and_a_dribbled_head_expires() {
        let clock = HeadClock::new();
        drop(clock.head_arrived(Version::HTTP_11));
        assert!(!expires_within(&clock, 10 * LIMIT).await);
        clock.bytes_arrived();
        for _ in 0..29 {
            assert!(!expires_within(&clock, Duration::from_secs(1)).await);
            clock.bytes_arrived();
        }
        assert!(expires_within(&clock, Duration::from_secs(1)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_during_a_request_are_not_a_head() {
        let clock = HeadClock::new();
        let answering = clock.head_arrived(Version::HTTP_11);
        clock.bytes_arrived();
        assert!(!expires_within(&clock, 10 * LIMIT).await);
        drop(answering);
        assert!(!expires_within(&clock, 10 * LIMIT).await);
    }

    #[tokio::test(start_paused = true)]
    async fn http2_is_left_to_its_pings() {
        let clock = HeadClock::new();
        drop(clock.head_arrived(Version::HTTP_2));
        clock.bytes_arrived();
        assert!(!expires_within(&clock, 10 * LIMIT).await);
    }
}
