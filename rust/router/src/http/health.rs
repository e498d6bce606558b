//! What operators and load balancers ask.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Response, StatusCode, header},
};
use orchestra_core::ErrorCode;

use super::{HttpDoor, body::Refusal, json};
use crate::{error::ApiError, state::RouterState};

/// The process runs. Says nothing about workers: restarting the router would not bring them back.
pub(super) async fn live() -> Response<Body> {
    json(br#"{"status":"live"}"#.to_vec())
}

/// A request could be served now: a worker that takes work is attached, and no shutdown has begun.
pub(super) async fn ready(State(door): State<Arc<HttpDoor>>) -> Response<Body> {
    if door.state.is_ready() {
        return json(br#"{"status":"ready"}"#.to_vec());
    }
    let mut response = json(br#"{"status":"not_ready"}"#.to_vec());
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response
}

/// The metrics as Prometheus reads them.
pub(super) async fn metrics(State(door): State<Arc<HttpDoor>>) -> Result<Response<Body>, Refusal> {
    encoded(&door.state)
}

/// The same, for whoever asks at another door.
pub(super) fn encoded(state: &RouterState) -> Result<Response<Body>, Refusal> {
    let text = state
        .metrics
        .encode()
        .map_err(|_| ApiError::new(ErrorCode::Internal, "the metrics could not be written"))?;
    let mut response = Response::new(Body::from(text));
    let media_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    Ok(response)
}
