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
    tenants::Tenant,
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

const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_KEY);

/// How the routes begin whose requests are recorded.
const FOR_CLIENTS: &str = "/v1/";

/// What is outermost: `answering` gets the request and what is taken down of it.
pub(super) async fn enter<F: Future<Output = Response<Body>>>(
    door: &HttpDoor,
    route: &'static str,
    mut request: Request,
    answering: impl FnOnce(Request, Record) -> F,
) -> Response<Body> {
    let (request_id, record) = arrive(door, &request, route);
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
        request.headers_mut().insert(REQUEST_ID, value);
    }
    let mut response = answering(request, record.clone()).instrument(span).await;
    let status = response.status().as_u16();
    door.state.metrics.http_response(route, status);
    record.status(status);
    if let Some(&code) = response.extensions().get::<ErrorCode>() {
        record.failed(code);
    }
    if let Some(value) = value {
        response.headers_mut().insert(REQUEST_ID, value);
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

/// The route as metrics name it.
pub(super) fn route_label(matched: Option<&MatchedPath>) -> &'static str {
    let matched = matched.map_or("", MatchedPath::as_str);
    ROUTES
        .into_iter()
        .find(|route| *route == matched)
        .unwrap_or("other")
}

/// Lets a request with a key through.
pub(super) async fn let_in(
    State(door): State<Arc<HttpDoor>>,
    request: Request,
    next: Next,
) -> Result<Response<Body>, Refusal> {
    door.authenticate(&request)?;
    Ok(next.run(request).await)
}

impl HttpDoor {
    /// Whose request it is, by its key.
    pub(super) fn authenticate(&self, request: &Request) -> Result<Arc<Tenant>, Refusal> {
        let settings = self.state.settings();
        let tenant = settings.keys.check(authorization(request.headers()));
        tenant.map_err(|error| {
            self.state.metrics.rejected(error.code);
            error.into()
        })
    }
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
