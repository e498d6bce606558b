//! Answers as server-sent events.
//!
//! The status line goes out with the first piece, so that whatever fails before it has a status of its own. Where the
//! first piece takes longer than the keep-alive interval, it goes out then, and comments keep the connection open.
//! An error after that is the last event, and no `[DONE]` follows it: a client must not take it for an end.

use std::{convert::Infallible, time::Duration};

use async_stream::stream;
use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_core::Stream;
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture};
use orchestra_core::ErrorCode;
use serde::Serialize;
use tokio::time::timeout;

use super::choices::{Collected, Source};
use crate::{
    error::ApiError,
    request::Chunk,
    respond::{ErrorBody, http_error, log},
};

/// A comment: clients skip it, proxies see that the stream is alive.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");
/// Pieces that are ready together go out together, up to this many bytes.
const BATCH_BYTES: usize = 16 << 10;
/// First size of the buffer that events are written to.
const BUFFER_BYTES: usize = 1 << 10;

/// How a route writes what a request produces, as events or as one body.
pub(super) trait Format<S>: Send + 'static {
    /// What comes before the first piece.
    fn opening(&mut self, source: &S, events: &mut Events) -> Result<(), ApiError>;
    /// One piece.
    fn piece(&mut self, chunk: &Chunk, source: &S, events: &mut Events) -> Result<(), ApiError>;
    /// What comes after the last piece.
    fn closing(&mut self, events: &mut Events) -> Result<(), ApiError>;
    /// Everything as one body.
    fn body(&mut self, source: &S, collected: &[Collected]) -> Vec<u8>;
}

/// Events that are written and not yet sent.
#[derive(Debug, Default)]
pub(super) struct Events(BytesMut);

impl Events {
    /// Writes one event.
    pub(super) fn push<T: Serialize>(&mut self, event: &T) -> Result<(), ApiError> {
        self.0.reserve(BUFFER_BYTES);
        self.0.put_slice(b"data: ");
        serde_json::to_writer((&mut self.0).writer(), event)
            .map_err(|_| ApiError::new(ErrorCode::Internal, "an event could not be written"))?;
        self.0.put_slice(b"\n\n");
        Ok(())
    }

    /// Writes an error as the last event.
    fn fail(&mut self, error: &ApiError) {
        log(error);
        // It is a struct of strings; where even that could not be written, the stream just ends.
        let _ = self.push(&ErrorBody::from(error));
    }

    fn done(&mut self) {
        self.0.put_slice(b"data: [DONE]\n\n");
    }

    fn take(&mut self) -> Bytes {
        self.0.split().freeze()
    }
}

type FirstPiece<S> = Result<(S, Option<Result<Chunk, ApiError>>), ApiError>;

/// Answers with a stream of events, or with an error where nothing was sent yet.
pub(super) async fn respond<S: Source + 'static>(
    opening: impl Future<Output = Result<S, ApiError>> + Send + 'static,
    format: impl Format<S>,
    keep_alive: Duration,
) -> Response<Body> {
    let mut first: BoxFuture<'static, FirstPiece<S>> = Box::pin(async move {
        let mut source = opening.await?;
        let piece = source.next().await;
        Ok((source, piece))
    });
    let first = match timeout(keep_alive, first.as_mut()).await {
        Ok(Err(error) | Ok((_, Some(Err(error))))) => return http_error(&error),
        Ok(Ok(ready)) => std::future::ready(Ok(ready)).boxed(),
        Err(_) => first,
    };
    let mut response = Response::new(Body::from_stream(write(first, format, keep_alive)));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks nginx not to collect the stream before it passes it on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn write<S: Source + 'static>(
    mut first: BoxFuture<'static, FirstPiece<S>>,
    mut format: impl Format<S>,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream! {
        let first = loop {
            match timeout(keep_alive, first.as_mut()).await {
                Ok(first) => break first,
                Err(_) => yield Ok(KEEP_ALIVE),
            }
        };
        let mut events = Events::default();
        let (mut source, item) = match first {
            Ok(ready) => ready,
            Err(error) => {
                events.fail(&error);
                yield Ok(events.take());
                return;
            }
        };
        let mut goes_on = format
            .opening(&source, &mut events)
            .and_then(|()| step(item, &source, &mut format, &mut events));
        while let Ok(true) = goes_on {
            let item = match source.next().now_or_never() {
                Some(item) if events.0.len() < BATCH_BYTES => item,
                ready => {
                    if !events.0.is_empty() {
                        yield Ok(events.take());
                    }
                    match ready {
                        Some(item) => item,
                        None => loop {
                            match timeout(keep_alive, source.next()).await {
                                Ok(item) => break item,
                                Err(_) => yield Ok(KEEP_ALIVE),
                            }
                        },
                    }
                }
            };
            goes_on = step(item, &source, &mut format, &mut events);
        }
        match goes_on {
            Ok(_) => events.done(),
            Err(error) => events.fail(&error),
        }
        yield Ok(events.take());
    }
}

/// Writes one item; false at the end.
fn step<S: Source>(
    item: Option<Result<Chunk, ApiError>>,
    source: &S,
    format: &mut impl Format<S>,
    events: &mut Events,
) -> Result<bool, ApiError> {
    match item {
        Some(chunk) => format.piece(&chunk?, source, events).map(|()| true),
        None => format.closing(events).map(|()| false),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        pin::Pin,
        task::{Context, Poll},
    };

    use axum::http::StatusCode;
    use http_body_util::BodyExt as _;
    use orchestra_core::{TokenId, step::FinishReason};
    use tokio::time::Instant;

    use super::*;
    use crate::http::{
        logprobs::Vocabulary,
        testing::{Script, last, piece},
    };

    /// Writes each piece's text, and marks the ends.
    struct Plain;

    impl<S: Source> Format<S> for Plain {
        fn opening(&mut self, _: &S, events: &mut Events) -> Result<(), ApiError> {
            events.push(&"opening")
        }

        fn piece(&mut self, chunk: &Chunk, _: &S, events: &mut Events) -> Result<(), ApiError> {
            events.push(&chunk.text)
        }

        fn closing(&mut self, events: &mut Events) -> Result<(), ApiError> {
            events.push(&"closing")
        }

        fn body(&mut self, _: &S, _: &[Collected]) -> Vec<u8> {
            Vec::new()
        }
    }

    const INTERVAL: Duration = Duration::from_secs(15);

    fn script(items: impl Into<VecDeque<Result<Chunk, ApiError>>>) -> Script {
        Script {
            prompts: vec![vec![0]],
            items: items.into(),
        }
    }

    fn worker_failed() -> ApiError {
        ApiError::new(ErrorCode::WorkerFailed, "the worker failed")
    }

    async fn text(response: Response<Body>) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn pieces_become_events_and_done_ends_them() {
        let source = script([
            Ok(piece(0, "ab", false)),
            Ok(last(0, FinishReason::Stop, 2)),
        ]);
        let response = respond(async { Ok(source) }, Plain, INTERVAL).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(
            response.headers()[header::CONTENT_TYPE],
            "text/event-stream"
        );
        let expected = "data: \"opening\"\n\ndata: \"ab\"\n\ndata: \"\"\n\n\
                        data: \"closing\"\n\ndata: [DONE]\n\n";
        assert_eq!(text(response).await, expected);
    }

    #[tokio::test]
    async fn what_fails_before_the_first_piece_has_its_own_status() {
        let refused = async { Err::<Script, _>(ApiError::new(ErrorCode::QueueFull, "full")) };
        let response = respond(refused, Plain, INTERVAL).await;
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);

        let response = respond(
            async { Ok(script([Err(worker_failed())])) },
            Plain,
            INTERVAL,
        )
        .await;
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    }

    #[tokio::test]
    async fn an_error_after_the_first_piece_is_the_last_event_and_not_done() {
        let source = script([Ok(piece(0, "a", false)), Err(worker_failed())]);
        let response = respond(async { Ok(source) }, Plain, INTERVAL).await;
        assert_eq!(response.status(), StatusCode::OK);
        insta::assert_snapshot!(text(response).await, @r#"
        data: "opening"

        data: "a"

        data: {"error":{"message":"the worker failed","type":"server_error","param":null,"code":"worker_failed"}}
        "#);
    }

    /// Each item comes after its wait.
    struct Slow {
        waits: VecDeque<(Duration, Chunk)>,
        sleep: Option<Pin<Box<tokio::time::Sleep>>>,
    }

    impl Stream for Slow {
        type Item = Result<Chunk, ApiError>;

        fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            let this = &mut *self;
            let Some((wait, _)) = this.waits.front() else {
                return Poll::Ready(None);
            };
            let sleep = this
                .sleep
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(*wait)));
            std::task::ready!(sleep.as_mut().poll(cx));
            this.sleep = None;
            Poll::Ready(this.waits.pop_front().map(|(_, chunk)| Ok(chunk)))
        }
    }

    impl Source for Slow {
        fn prompts(&self) -> Vec<&[TokenId]> {
            vec![&[0]]
        }

        fn vocabulary(&self) -> &dyn Vocabulary {
            &crate::http::testing::Letters
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments_before_and_between_pieces() {
        let waits = [
            (40, piece(0, "a", false)),
            (20, last(0, FinishReason::Stop, 1)),
        ];
        let waits = waits
            .map(|(seconds, chunk)| (Duration::from_secs(seconds), chunk))
            .into();
        let began = Instant::now();
        let slow = Slow { waits, sleep: None };
        let response = respond(async { Ok(slow) }, Plain, INTERVAL).await;
        assert_eq!(
            began.elapsed(),
            INTERVAL,
            "the status does not wait for the first piece"
        );
        let expected = [
            ": keep-alive",
            "data: \"opening\"",
            "data: \"a\"",
            ": keep-alive",
            "data: \"\"",
            "data: \"closing\"",
            "data: [DONE]",
        ];
        let text = text(response).await;
        assert_eq!(text.split_terminator("\n\n").collect::<Vec<_>>(), expected);
        assert_eq!(began.elapsed(), Duration::from_secs(60));
    }
}
