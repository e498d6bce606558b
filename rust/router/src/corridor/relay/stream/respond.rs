//! A stream as the body of an answer.

use std::{convert::Infallible, pin::pin, time::Duration};

use async_stream::stream;
use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
};
use bytes::{Bytes, BytesMut};
use futures_core::Stream;
use futures_util::{FutureExt as _, future::BoxFuture};
use orchestra_core::ErrorCode;
use tokio::time::timeout;

use super::EventStream;
use crate::{
    corridor::relay::{attempts::Attempts, run::Reply},
    error::ApiError,
    respond::{ErrorBody, json_body, log},
};

/// A comment: clients skip it, proxies see that the stream is alive.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// The last event of a stream that failed. No `[DONE]` follows it: a client must not take it for an end.
pub(super) fn error_event(error: &ApiError) -> Bytes {
    log(error);
    let mut event = BytesMut::from(&b"data: "[..]);
    event.extend_from_slice(&json_body(&ErrorBody::from(error)));
    event.extend_from_slice(b"\n\n");
    event.freeze()
}

/// An answer that comes after the status of another one is out.
fn status_gone(answer: Result<Response<Body>, ApiError>) -> ApiError {
    match answer {
        Err(error) => error,
        Ok(response) => {
            let message = format!(
                "the engine answered with status {}",
                response.status().as_u16()
            );
            ApiError::new(ErrorCode::WorkerFailed, message)
        }
    }
}

/// What became of a request for a stream by the time of its first event.
enum Opened {
    Stream(Box<EventStream>, Bytes),
    /// It got another answer, or none.
    Instead(Result<Response<Body>, ApiError>),
}

/// Answers with a stream, once its first event is there: what fails before that has a status of its own. Where it takes
/// longer than the keep-alive interval, the status goes out then.
pub(crate) async fn respond(
    attempts: Attempts,
    keep_alive: Duration,
) -> Result<Response<Body>, ApiError> {
    let mut opening: BoxFuture<'static, Opened> = Box::pin(open(attempts));
    let opening = match timeout(keep_alive, opening.as_mut()).await {
        Ok(Opened::Instead(answer)) => return answer,
        Ok(opened) => std::future::ready(opened).boxed(),
        Err(_) => opening,
    };
    let mut response = Response::new(Body::from_stream(write(opening, keep_alive)));
    let headers = response.headers_mut();
    let media_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, media_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks nginx not to collect the stream before it passes it on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

async fn open(mut attempts: Attempts) -> Opened {
    let run = match attempts.exchange().await {
        Ok(Reply::Events(run)) => run,
        Ok(whole) => return Opened::Instead(attempts.finish(whole)),
        Err(reason) => return Opened::Instead(attempts.give_up(reason)),
    };
    let mut stream = Box::new(EventStream::new(attempts, run));
    match stream.next().await {
        Ok(events) => Opened::Stream(stream, events.unwrap_or_default()),
        Err(reason) => Opened::Instead(stream.attempts.give_up(reason)),
    }
}

/// The body of the answer. The wait for events is never broken off for a comment: it may be on its way to an engine.
fn write(
    mut opening: BoxFuture<'static, Opened>,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream! {
        let opened = loop {
            match timeout(keep_alive, opening.as_mut()).await {
                Ok(opened) => break opened,
                Err(_) => yield Ok(KEEP_ALIVE),
            }
        };
        let (mut stream, events) = match opened {
            Opened::Stream(stream, events) => (stream, events),
            Opened::Instead(answer) => {
                yield Ok(error_event(&status_gone(answer)));
                return;
            }
        };
        let mut events = Ok(Some(events));
        loop {
            match events {
                Ok(Some(events)) => yield Ok(events),
                Ok(None) => return,
                Err(reason) => {
                    yield Ok(stream.fail(reason));
                    return;
                }
            }
            let mut next = pin!(stream.next());
            events = loop {
                match timeout(keep_alive, next.as_mut()).await {
                    Ok(events) => break events,
                    Err(_) => yield Ok(KEEP_ALIVE),
                }
            };
        }
    }
}
