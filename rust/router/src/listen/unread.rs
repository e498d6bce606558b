//! Requests that are answered before their body was read: an unknown route, a key that nobody has.
//!
//! What is left of the body stands between the answer and the next request, and hyper closes a connection on which it has
//! not come yet. So the answer says that the connection ends with it: a client that does not know sends its next request
//! into the end, and cannot tell whether that was answered.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Request, Version, header},
};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

/// Whether a request's body was read to its end.
#[derive(Debug)]
pub(super) struct Unread(Option<Arc<AtomicBool>>);

impl Unread {
    /// Watches how a request's body is read. Where it has none, and over HTTP/2, where bodies do not stand in each
    /// other's way, there is nothing to watch.
    pub(super) fn watch(request: Request<Incoming>) -> (Request<Body>, Self) {
        if request.body().is_end_stream() || request.version() == Version::HTTP_2 {
            return (request.map(Body::new), Self(None));
        }
        let is_read = Arc::new(AtomicBool::new(false));
        let watched = |body| {
            Body::new(WatchedBody {
                body,
                is_read: Arc::clone(&is_read),
            })
        };
        (request.map(watched), Self(Some(is_read)))
    }

    /// Says in the head of the answer what becomes of the connection.
    pub(super) fn tell(&self, headers: &mut HeaderMap) {
        if self
            .0
            .as_ref()
            .is_some_and(|is_read| !is_read.load(Relaxed))
        {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// A body that notes its end.
struct WatchedBody {
    body: Incoming,
    is_read: Arc<AtomicBool>,
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.is_read.store(true, Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
