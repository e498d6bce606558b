//! How an [`ApiError`] looks at each door. `docs/errors.md` is this file in words; a test keeps them alike.
//!
//! Each match names every code and has no wildcard, so that a new code does not compile without its row.

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
};
use orchestra_core::ErrorCode;
use serde::Serialize;
use tonic::{Code, Status, metadata::MetadataValue};

use crate::error::{ApiError, Origin};

/// gRPC metadata with the exact code, where several codes share a status.
pub const ERROR_CODE_KEY: &str = "orchestra-error-code";
/// gRPC metadata with the offending field.
pub const ERROR_PARAM_KEY: &str = "orchestra-error-param";
/// HTTP header and gRPC metadata with when to try again; the official clients read it before `retry-after`.
pub const RETRY_AFTER_MS_KEY: &str = "retry-after-ms";
/// HTTP header that tells the official clients whether to try again by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The HTTP status of a code.
pub const fn http_status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::ContextTooLong => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorCode::ModelNotFound => StatusCode::NOT_FOUND,
        ErrorCode::QueueFull => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::NoWorkers | ErrorCode::PreemptedOut | ErrorCode::ShuttingDown => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorCode::WorkerFailed => StatusCode::BAD_GATEWAY,
        ErrorCode::Cancelled => client_closed_request(),
        ErrorCode::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorCode::InvalidConfig | ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// 499, which the standard does not name and logs know. Nobody is left to read it.
const fn client_closed_request() -> StatusCode {
    match StatusCode::from_u16(499) {
        Ok(status) => status,
        Err(_) => StatusCode::BAD_REQUEST,
    }
}

/// The gRPC status of a code.
pub const fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::ContextTooLong => Code::InvalidArgument,
        ErrorCode::Unauthenticated => Code::Unauthenticated,
        ErrorCode::ModelNotFound => Code::NotFound,
        ErrorCode::QueueFull => Code::ResourceExhausted,
        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::NoWorkers | ErrorCode::WorkerFailed | ErrorCode::ShuttingDown => {
            Code::Unavailable
        }
        ErrorCode::PreemptedOut => Code::Aborted,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::Unsupported => Code::Unimplemented,
        ErrorCode::InvalidConfig | ErrorCode::Internal => Code::Internal,
    }
}

/// OpenAI's coarse `error.type`.
const fn openai_type(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::InvalidRequest
        | ErrorCode::ContextTooLong
        | ErrorCode::ModelNotFound
        | ErrorCode::Cancelled
        | ErrorCode::Unsupported => "invalid_request_error",
        ErrorCode::Unauthenticated => "authentication_error",
        ErrorCode::QueueFull => "rate_limit_error",
        ErrorCode::DeadlineExceeded
        | ErrorCode::NoWorkers
        | ErrorCode::WorkerFailed
        | ErrorCode::PreemptedOut
        | ErrorCode::ShuttingDown
        | ErrorCode::InvalidConfig
        | ErrorCode::Internal => "server_error",
    }
}

/// OpenAI's error object, as a response's body and as the last event of a stream.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

impl<'a> From<&'a ApiError> for ErrorBody<'a> {
    fn from(error: &'a ApiError) -> Self {
        Self {
            error: ErrorObject {
                message: &error.message,
                r#type: openai_type(error.code),
                param: error.param.as_deref(),
                code: error.code.as_str(),
            },
        }
    }
}

/// An error as an HTTP response, with the status of its code.
pub(crate) fn http_error(error: &ApiError) -> Response<Body> {
    http_error_as(http_status(error.code), error)
}

/// An error as an HTTP response with a status of HTTP's own: 404 for a route, 405, 408, 413, 415.
pub(crate) fn http_error_as(status: StatusCode, error: &ApiError) -> Response<Body> {
    log(error);
    let body = json_body(&ErrorBody::from(error));
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    // For whoever takes the answer down.
    response.extensions_mut().insert(error.code);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    let retryable = if error.code.retryable() {
        "true"
    } else {
        "false"
    };
    headers.insert(SHOULD_RETRY, HeaderValue::from_static(retryable));
    if let Some(milliseconds) = retry_after_ms(error) {
        headers.insert(
            header::RETRY_AFTER,
            HeaderValue::from(milliseconds.div_ceil(1000)),
        );
        headers.insert(RETRY_AFTER_MS_KEY, HeaderValue::from(milliseconds));
    }
    if error.code == ErrorCode::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Serialises what cannot fail to serialise: structs of strings and numbers.
pub(crate) fn json_body<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// When to try again: each retryable error says so, one second where nothing better is known.
fn retry_after_ms(error: &ApiError) -> Option<u64> {
    error
        .retry_after_ms
        .or_else(|| error.code.retryable().then_some(1000))
}

/// An error as a gRPC status; the metadata carry what the status cannot.
pub(crate) fn grpc_status(error: &ApiError) -> Status {
    log(error);
    let mut status = Status::new(grpc_code(error.code), error.message.clone());
    let metadata = status.metadata_mut();
    metadata.insert(
        ERROR_CODE_KEY,
        MetadataValue::from_static(error.code.as_str()),
    );
    if let Some(param) = error.param.as_ref().and_then(|param| param.parse().ok()) {
        metadata.insert(ERROR_PARAM_KEY, param);
    }
    if let Some(milliseconds) = retry_after_ms(error) {
        metadata.insert(RETRY_AFTER_MS_KEY, MetadataValue::from(milliseconds));
    }
    status
}

/// Level by blame. A full queue is ours but comes in floods, and has its metric.
pub(crate) fn log(error: &ApiError) {
    let code = error.code.as_str();
    match error.origin() {
        Origin::Orchestra if error.code == ErrorCode::Internal => {
            tracing::error!(code, message = error.message, "request failed");
        }
        Origin::Worker if error.code == ErrorCode::WorkerFailed => {
            tracing::warn!(code, message = error.message, "request failed");
        }
        Origin::Client | Origin::Worker | Origin::Orchestra => {
            tracing::debug!(code, param = error.param, "request refused");
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    /// The table of docs/errors.md: code, HTTP, gRPC, Python, retry.
    fn documented() -> Vec<Vec<String>> {
        include_str!("../../../docs/errors.md")
            .lines()
            .filter(|line| line.starts_with("| `"))
            .map(|line| {
                let cells = line.trim_matches('|').split('|');
                cells
                    .map(|cell| cell.trim().trim_matches('`').to_owned())
                    .collect()
            })
            // The classes of the registered memory, further down, have fewer columns.
            .filter(|row: &Vec<String>| row.len() == 5)
            .collect()
    }

    #[tokio::test]
    async fn each_code_looks_as_the_docs_say_at_both_doors() {
        let rows = documented();
        let codes: Vec<_> = rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(codes, ErrorCode::ALL.map(ErrorCode::as_str));
        for (row, code) in rows.iter().zip(ErrorCode::ALL) {
            let error = ApiError::new(code, "why");
            let response = http_error(&error);
            let status = response.status().as_u16();
            assert!(
                row[1].starts_with(&status.to_string()),
                "{code}: {status}, {}",
                row[1]
            );
            assert_eq!(
                row[2],
                format!("{:?}", grpc_status(&error).code()),
                "{code}"
            );

            let retry_after = response.headers().contains_key(header::RETRY_AFTER);
            assert_eq!(retry_after, row[1].contains("Retry-After"), "{code}");
            assert_eq!(retry_after, code.retryable(), "{code}");
            assert_eq!(row[4] == "yes", code.retryable(), "{code}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["error"]["code"], code.as_str());
            assert_eq!(body["error"]["message"], "why");
            assert!(body["error"]["param"].is_null());
        }
    }

    #[test]
    fn each_code_has_its_own_metadata_where_grpc_has_one_status() {
        for code in ErrorCode::ALL {
            let status = grpc_status(&ApiError::new(code, "why"));
            assert_eq!(
                status.metadata().get(ERROR_CODE_KEY).unwrap(),
                code.as_str()
            );
            assert_eq!(
                status.metadata().contains_key(RETRY_AFTER_MS_KEY),
                code.retryable()
            );
        }
    }

    #[test]
    fn fields_and_times_reach_the_client() {
        let error = ApiError::invalid("temperature", "too hot").retry_after_ms(1_001);
        let response = http_error(&error);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        assert_eq!(response.headers()["retry-after-ms"], "1001");
        assert_eq!(response.headers()["x-should-retry"], "false");
        let status = grpc_status(&error);
        assert_eq!(
            status.metadata().get(ERROR_PARAM_KEY).unwrap(),
            "temperature"
        );
        let json = serde_json::to_string(&ErrorBody::from(&error)).unwrap();
        insta::assert_snapshot!(json, @r#"{"error":{"message":"too hot","type":"invalid_request_error","param":"temperature","code":"invalid_request"}}"#);
    }
}
