//! What happens to every HTTP request: it gets an identity and a span, it is counted, and it may be turned away.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header},
    middleware::Next,
};
use orchestra_core::ErrorCode;
use tracing::Instrument as _;

use super::{HttpDoor, body::Refusal};
use crate::{
    error::ApiError,
    observe::{Arrival, EXPLAIN_KEY, Record, TRACEPARENT_KEY, TRACESTATE_KEY},
    request_id::{REQUEST_ID_KEY, request_id},
};

/// The routes as metrics name them; the paths that clients type are not among the labels.
const ROUTES: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{*id}",
    "/live",
    "/ready",
    "/health",
    "/metrics",
];

/// How the routes begin whose requests are recorded.
const FOR_CLIENTS: &str = "/v1/";

/// The outermost layer.
pub(super) async fn enter(
    State(door): State<Arc<HttpDoor>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let route = route_label(request.extensions().get::<MatchedPath>());
    let (request_id, record) = arrive(&door, &request, route);
    request.extensions_mut().insert(record.clone());
    if let Some(traceparent) = record.traceparent().and_then(|text| text.parse().ok()) {
        // What an engine does for the request belongs under our span.
        let key = HeaderName::from_static(TRACEPARENT_KEY);
        request.headers_mut().insert(key, traceparent);
    }
    let trace_id = record.trace_id();
    let span = tracing::info_span!("request", request_id, trace_id, door = "http", route);
    let value = HeaderValue::from_str(&request_id).ok();
    if let Some(value) = value.clone() {
        // An engine hears the id that the client hears.
        request.headers_mut().insert(REQUEST_ID_KEY, value);
    }
    let mut response = next.run(request).instrument(span).await;
    let status = response.status().as_u16();
    door.state.metrics.http_response(route, status);
    record.status(status);
    if let Some(&code) = response.extensions().get::<ErrorCode>() {
        record.failed(code);
    }
    if let Some(value) = value {
        response.headers_mut().insert(REQUEST_ID_KEY, value);
    }
    response
}

/// The request's identity, and the record of one that a client sends.
fn arrive(door: &HttpDoor, request: &Request, route: &'static str) -> (String, Record) {
    let given = |key| request.headers().get(key).map(HeaderValue::as_bytes);
    let request_id = request_id(given(REQUEST_ID_KEY));
    if !route.starts_with(FOR_CLIENTS) {
        return (request_id, Record::default());
    }
    let record = door.state.observers().record(&Arrival {
        door: "http",
        route,
        request_id: &request_id,
        traceparent: given(TRACEPARENT_KEY),
        tracestate: given(TRACESTATE_KEY),
        wants_explanation: given(EXPLAIN_KEY) == Some(b"1"),
    });
    (request_id, record)
}

/// What is taken down of the request.
pub(super) fn record_of(request: &Request) -> Record {
    let record = request.extensions().get::<Record>();
    record.cloned().unwrap_or_default()
}

fn route_label(matched: Option<&MatchedPath>) -> &'static str {
    let matched = matched.map_or("", MatchedPath::as_str);
    ROUTES
        .into_iter()
        .find(|route| *route == matched)
        .unwrap_or("other")
}

/// Lets a request with a key through, and notes whose it is.
pub(super) async fn authenticate(
    State(door): State<Arc<HttpDoor>>,
    mut request: Request,
    next: Next,
) -> Result<Response<Body>, Refusal> {
    let tenant = door
        .state
        .settings()
        .keys
        .check(authorization(request.headers()))
        .inspect_err(|error| {
            door.state.metrics.rejected(error.code);
        })?;
    request.extensions_mut().insert(tenant);
    Ok(next.run(request).await)
}

pub(super) fn authorization(headers: &HeaderMap) -> Option<&[u8]> {
    headers
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes)
}

/// Any path that is not ours.
pub(super) async fn no_such_route() -> Refusal {
    let error = ApiError::new(ErrorCode::InvalidRequest, "there is no such route");
    Refusal::new(StatusCode::NOT_FOUND, error)
}

/// A path of ours with another method; axum adds `allow`.
pub(super) async fn wrong_method() -> Refusal {
    let error = ApiError::new(
        ErrorCode::InvalidRequest,
        "the route does not take this method",
    );
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, error)
}
