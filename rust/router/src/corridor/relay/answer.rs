//! Answers that go to the client in one piece: an engine's own, or ours in its place.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
};
use bytes::Bytes;
use memchr::memmem;
use orchestra_core::ErrorCode;
use serde::{Deserialize, de::IgnoredAny};

use super::events::Usage;
use crate::{
    engines::EngineUrl,
    error::ApiError,
    respond::{ErrorBody, http_error, json_body},
};

/// When to try again where an engine that is busy does not say it.
const RETRY_AFTER_SECONDS: u64 = 1;

/// An answer of an engine, read to its end.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Whole {
    /// Whether the body is JSON, as every answer of this API is; and what it cost, where it says so.
    pub(super) fn read(&self) -> (bool, Option<Usage>) {
        #[derive(Deserialize)]
        struct Answer {
            usage: Option<Usage>,
        }
        match serde_json::from_slice::<Answer>(&self.body) {
            Ok(answer) => (true, answer.usage),
            Err(error) => (error.is_data() && self.is_json(), None),
        }
    }

    fn is_json(&self) -> bool {
        serde_json::from_slice::<IgnoredAny>(&self.body).is_ok()
    }

    /// The answer as the client gets it, the body byte for byte.
    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() =
            StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
        *response.headers_mut() = self.headers;
        response
    }

    /// An error as the client gets it. What names the engine's address, or is no JSON, is replaced by words of ours.
    pub(super) fn into_error_response(mut self, url: &EngineUrl) -> Response<Body> {
        let names_engine = memmem::find(&self.body, url.host().as_bytes()).is_some();
        if names_engine || !self.is_json() {
            let code = match self.status {
                429 => ErrorCode::QueueFull,
                _ => ErrorCode::WorkerFailed,
            };
            let message = format!("the engine answered with status {}", self.status);
            let error = ApiError::new(code, message);
            self.body = json_body(&ErrorBody::from(&error)).into();
            let media_type = HeaderValue::from_static("application/json");
            self.headers.insert(header::CONTENT_TYPE, media_type);
        }
        if matches!(self.status, 429 | 503) && !self.headers.contains_key(header::RETRY_AFTER) {
            let seconds = HeaderValue::from(RETRY_AFTER_SECONDS);
            self.headers.insert(header::RETRY_AFTER, seconds);
        }
        self.into_response()
    }
}

/// Why a request was given up.
#[derive(Debug)]
pub(super) enum GiveUp {
    /// In our words.
    Ours(ApiError),
    /// In those of the last engine.
    Theirs(Box<Whole>, EngineUrl),
    /// The answer broke off, and no engine takes it up again.
    NotContinuable,
}

impl GiveUp {
    pub(super) fn into_response(self) -> Response<Body> {
        match self {
            Self::Ours(error) => http_error(&error),
            Self::Theirs(answer, url) => answer.into_error_response(&url),
            Self::NotContinuable => http_error(&self.into_error()),
        }
    }

    /// As the last event of a stream, where the status is gone.
    pub(super) fn into_error(self) -> ApiError {
        match self {
            Self::Ours(error) => error,
            Self::NotContinuable => {
                let message = "the engine failed, and this answer cannot be continued on another";
                ApiError::new(ErrorCode::WorkerFailed, message)
            }
            Self::Theirs(answer, _) => {
                let code = if answer.status == 429 {
                    ErrorCode::QueueFull
                } else {
                    ErrorCode::WorkerFailed
                };
                ApiError::new(
                    code,
                    format!("the engine answered with status {}", answer.status),
                )
            }
        }
    }
}
