//! The workers: who they are and how they stand, and letting them go.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    http::{Response, StatusCode},
};
use orchestra_core::ErrorCode;
use serde::Serialize;

use super::{AdminDoor, status};
use crate::{
    error::ApiError,
    http::{body::Refusal, json},
    respond::json_body,
    workers::{OperateError, WorkerView},
};

#[derive(Debug, Serialize)]
struct List {
    workers: Vec<WorkerView>,
}

/// Every attached worker.
pub(super) async fn list(State(door): State<Arc<AdminDoor>>) -> Response<Body> {
    let workers = door.http.state.workers.list();
    json(json_body(&List { workers }))
}

/// No new requests for this worker; those that run go on.
pub(super) async fn drain(
    State(door): State<Arc<AdminDoor>>,
    Path(id): Path<String>,
) -> Result<Response<Body>, Refusal> {
    door.http.state.workers.hold_back(&id, true)?;
    tracing::info!(worker_id = id, "worker held back by an operator");
    Ok(status("held_back"))
}

/// The worker takes requests again.
pub(super) async fn undrain(
    State(door): State<Arc<AdminDoor>>,
    Path(id): Path<String>,
) -> Result<Response<Body>, Refusal> {
    door.http.state.workers.hold_back(&id, false)?;
    tracing::info!(worker_id = id, "worker no longer held back");
    Ok(status("ready"))
}

/// Lets a worker go once its sequences have ended, or with `?now=true` at once; they go on elsewhere then.
pub(super) async fn remove(
    State(door): State<Arc<AdminDoor>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response<Body>, Refusal> {
    let is_at_once = match query.as_deref() {
        None | Some("now=false") => false,
        Some("now=true") => true,
        Some(_) => {
            let message = "the query must be now=true or now=false";
            return Err(ApiError::invalid("now", message).into());
        }
    };
    let state = &door.http.state;
    let ending = state.workers.removal(&id, is_at_once)?;
    tracing::info!(worker_id = id, is_at_once, "an operator removes a worker");
    let shutdown = state.tasks.shutdown_token().clone();
    state.tasks.spawn(async move {
        let _: Option<()> = shutdown.run_until_cancelled(ending).await;
    });
    Ok(status(if is_at_once { "removed" } else { "draining" }))
}

impl From<OperateError> for Refusal {
    fn from(error: OperateError) -> Self {
        let message = error.to_string();
        match error {
            OperateError::Unknown => {
                Self::new(StatusCode::NOT_FOUND, ApiError::invalid("id", message))
            }
            OperateError::TooMany => ApiError::new(ErrorCode::QueueFull, message).into(),
        }
    }
}
