//! What happens to every HTTP request: it gets an identity and a span, it is counted, and it may be turned away.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
    middleware::Next,
};
use orchestra_core::ErrorCode;
use tracing::Instrument as _;

use super::{HttpDoor, body::Refusal};
use crate::{
    error::ApiError,
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

/// The outermost layer.
pub(super) async fn enter(
    State(door): State<Arc<HttpDoor>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let route = route_label(request.extensions().get::<MatchedPath>());
    let request_id = request_id(
        request
            .headers()
            .get(REQUEST_ID_KEY)
            .map(HeaderValue::as_bytes),
    );
    let span = tracing::info_span!("request", request_id, door = "http", route);
    let value = HeaderValue::from_str(&request_id).ok();
    if let Some(value) = value.clone() {
        // An engine hears the id that the client hears.
        request.headers_mut().insert(REQUEST_ID_KEY, value);
    }
    let mut response = next.run(request).instrument(span).await;
    door.state
        .metrics
        .http_response(route, response.status().as_u16());
    if let Some(value) = value {
        response.headers_mut().insert(REQUEST_ID_KEY, value);
    }
    response
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
