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
    /// Since when the peer has taken nothing of what we write, in the same way; or [`IDLE`].
    write_stuck: AtomicU64,
}

impl HeadClock {
    /// Starts timing: a fresh connection owes us a head.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            accepted: Instant::now(),
            head_began: AtomicU64::new(1),
            write_stuck: AtomicU64::new(IDLE),
        })
    }

    /// A request's head is complete. The request lasts until the guard drops.
    pub(super) fn head_arrived(self: &Arc<Self>, version: Version) -> Answering {
        self.head_began.store(BUSY, Relaxed);
        Answering((version != Version::HTTP_2).then(|| Arc::clone(self)))
    }

    fn bytes_arrived(&self) {
        // Fails where a head is being read already.
        let _ = self
            .head_began
            .compare_exchange(IDLE, self.now(), Relaxed, Relaxed);
    }

    fn now(&self) -> u64 {
        self.accepted.elapsed().as_millis() as u64 + 1
    }

    /// The peer took some of what we write, or its buffers are full.
    fn wrote(&self, is_stuck: bool) {
        if is_stuck {
            let _ = self
                .write_stuck
                .compare_exchange(IDLE, self.now(), Relaxed, Relaxed);
        } else if self.write_stuck.load(Relaxed) != IDLE {
            self.write_stuck.store(IDLE, Relaxed);
        }
    }

    /// Whether the peer has read nothing of its answer for longer than `limit`.
    fn is_stuck(&self, limit: Duration) -> bool {
        let since = self.write_stuck.load(Relaxed);
        since != IDLE && u128::from(self.now() - since) >= limit.as_millis()
    }

    /// Returns when a head has taken longer than `limit`, at most half of it late, or when the peer reads nothing of its
    /// answer for `read_limit`.
    pub(super) async fn expired(&self, limit: Duration, read_limit: Duration) {
        loop {
            if self.is_stuck(read_limit) {
                return;
            }
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
            tokio::time::sleep(wait.min(read_limit / 2)).await;
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
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.clock.wrote(written.is_pending());
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.clock.wrote(written.is_pending());
        written
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
    const READ_LIMIT: Duration = Duration::from_secs(120);

    async fn expires_within(clock: &HeadClock, time: Duration) -> bool {
        tokio::time::timeout(time, clock.expired(LIMIT, READ_LIMIT))
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
    async fn a_peer_that_reads_nothing_expires_and_one_that_reads_slowly_does_not() {
        let clock = HeadClock::new();
        let _answering = clock.head_arrived(Version::HTTP_11);
        for _ in 0..10 {
            clock.wrote(true);
            assert!(!expires_within(&clock, READ_LIMIT.mul_f64(0.9)).await);
            clock.wrote(false);
        }
        clock.wrote(true);
        assert!(!expires_within(&clock, READ_LIMIT.mul_f64(0.9)).await);
        assert!(expires_within(&clock, READ_LIMIT).await);
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
