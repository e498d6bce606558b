//! Reads request bodies: never more than the limit, never longer than the time.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Body as _;
use orchestra_core::ErrorCode;

use super::{HttpDoor, unsupported::unsupported};
use crate::{
    error::ApiError,
    respond::{http_error_as, http_status},
};

/// Bodies above this size are parsed beside the event loop, which a parse of 16 MiB would hold up for 50 ms.
const PARSE_INLINE_BYTES: usize = 256 << 10;
/// How much of a body that was refused is read and thrown away.
const DISCARD_BYTES_MAX: usize = 64 << 20;

/// An error with the HTTP status that says it best.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    error: ApiError,
}

impl Refusal {
    /// A status of HTTP's own.
    pub(super) fn new(status: StatusCode, error: ApiError) -> Self {
        Self { status, error }
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self {
            status: http_status(error.code),
            error,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        http_error_as(self.status, &self.error)
    }
}

impl HttpDoor {
    /// Reads and parses a body; a refusal is counted.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        request: Request,
        parse: impl FnOnce(&Bytes) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let parsed = match self.read_bytes(request).await {
            Ok(body) => self.parse(body, parse).await.map_err(Refusal::from),
            Err(refusal) => Err(refusal),
        };
        parsed.inspect_err(|refusal| self.state.metrics.rejected(refusal.error.code))
    }

    async fn parse<T: Send + 'static>(
        &self,
        body: Bytes,
        parse: impl FnOnce(&Bytes) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if body.len() <= PARSE_INLINE_BYTES {
            return parse(&body);
        }
        self.state.tasks.run_blocking(move || parse(&body)).await?
    }

    async fn read_bytes(&self, request: Request) -> Result<Bytes, Refusal> {
        check_headers(request.headers())?;
        let mut body = request.into_body();
        let limit = self.max_body_bytes;
        // Before the first byte is read, so that a client that waits for "100 Continue" sends none.
        if body.size_hint().lower() > limit as u64 {
            return Err(self.too_large(body));
        }
        let reading = Limited::new(&mut body, limit).collect();
        let body_timeout = self.state.settings().listen.body_timeout.0;
        match tokio::time::timeout(body_timeout, reading).await {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(self.too_large(body)),
            // The connection broke, so nobody reads this.
            Ok(Err(_)) => Err(ApiError::new(ErrorCode::Cancelled, "the body broke off").into()),
            Err(_) => {
                let seconds = body_timeout.as_secs_f64();
                let message = format!("the body did not arrive within {seconds} s");
                let error = ApiError::new(ErrorCode::InvalidRequest, message);
                Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, error))
            }
        }
    }

    /// Refuses a body, and reads some of the rest beside: many clients look for an answer only when they have sent
    /// everything, and closing on them would take the answer away.
    fn too_large(&self, body: Body) -> Refusal {
        let rest = Limited::new(body, DISCARD_BYTES_MAX).into_data_stream();
        let discard = rest
            .take_while(|read| std::future::ready(read.is_ok()))
            .for_each(|_| async {});
        let body_timeout = self.state.settings().listen.body_timeout.0;
        self.state.tasks.spawn(async move {
            // What is left after that loses its answer.
            let _ = tokio::time::timeout(body_timeout, discard).await;
        });
        let message = format!(
            "the body is larger than the limit of {} bytes",
            self.max_body_bytes
        );
        let error = ApiError::new(ErrorCode::InvalidRequest, message);
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, error)
    }
}

/// JSON only. A browser can send any other type to a router on localhost from a foreign page, without asking first.
fn check_headers(headers: &HeaderMap) -> Result<(), Refusal> {
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .map_or(&b""[..], HeaderValue::as_bytes);
    let media_type = content_type
        .split(|&byte| byte == b';')
        .next()
        .unwrap_or_default();
    if !media_type
        .trim_ascii()
        .eq_ignore_ascii_case(b"application/json")
    {
        let error = ApiError::invalid("content-type", "content-type must be application/json");
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
    }
    let encoding = headers
        .get(header::CONTENT_ENCODING)
        .map(HeaderValue::as_bytes);
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        let error = unsupported("content-encoding", "encoded bodies are not offered");
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
    }
    Ok(())
}
