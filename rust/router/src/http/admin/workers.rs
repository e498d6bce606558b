//! Orchestra's workers and foreign engines: who they are and how they stand, taking engines in, letting both go. An
//! engine's id is its URL.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, RawQuery, Request, State},
    http::{Response, StatusCode},
};
use bytes::Bytes;
use orchestra_core::ErrorCode;
use serde::Serialize;

use super::{AdminDoor, status};
use crate::{
    engines::{EngineConfig, EngineError, EngineStatus, EngineUrl},
    error::ApiError,
    http::{body::Refusal, json},
    respond::json_body,
    workers::{OperateError, WorkerView},
};

#[derive(Debug, Serialize)]
struct List {
    workers: Vec<WorkerView>,
    engines: Vec<EngineStatus>,
}

/// Every attached worker and every engine.
pub(super) async fn list(State(door): State<Arc<AdminDoor>>) -> Response<Body> {
    let state = &door.http.state;
    json(json_body(&List {
        workers: state.workers.list(),
        engines: state.list_engines(),
    }))
}

/// Takes an engine in; the body is what the file has in an `[[engine]]` table.
pub(super) async fn add(
    State(door): State<Arc<AdminDoor>>,
    request: Request,
) -> Result<Response<Body>, Refusal> {
    let config = door.http.read(request, parse).await?;
    door.http.state.add_engine(config)?;
    Ok(status("added"))
}

fn parse(body: &Bytes) -> Result<EngineConfig, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = match error.path().to_string() {
            path if path == "." => "engine".to_owned(),
            path => path,
        };
        ApiError::invalid(field, error.inner().to_string())
    })
}

/// No new requests for this one; those that run go on.
pub(super) async fn drain(
    State(door): State<Arc<AdminDoor>>,
    Path(id): Path<String>,
) -> Result<Response<Body>, Refusal> {
    hold_back(&door, &id, true)?;
    Ok(status("held_back"))
}

/// It takes requests again.
pub(super) async fn undrain(
    State(door): State<Arc<AdminDoor>>,
    Path(id): Path<String>,
) -> Result<Response<Body>, Refusal> {
    hold_back(&door, &id, false)?;
    Ok(status("ready"))
}

fn hold_back(door: &AdminDoor, id: &str, is_held_back: bool) -> Result<(), Refusal> {
    let state = &door.http.state;
    if let Ok(url) = id.parse::<EngineUrl>() {
        return Ok(state.drain_engine(&url, is_held_back)?);
    }
    state.workers.hold_back(id, is_held_back)?;
    tracing::info!(worker_id = id, is_held_back, "an operator holds work back");
    Ok(())
}

/// Lets one go once its requests have ended, or with `?now=true` at once; they go on elsewhere then.
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
    let answer = status(if is_at_once { "removed" } else { "draining" });
    if let Ok(url) = id.parse::<EngineUrl>() {
        if is_at_once {
            state.remove_engine(&url)?;
        } else {
            state.retire_engine(&url, None)?;
        }
        return Ok(answer);
    }
    let ending = state.workers.removal(&id, is_at_once)?;
    tracing::info!(worker_id = id, is_at_once, "an operator removes a worker");
    let shutdown = state.tasks.shutdown_token().clone();
    state.tasks.spawn(async move {
        let _: Option<()> = shutdown.run_until_cancelled(ending).await;
    });
    Ok(answer)
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Invalid(issues) => match issues.into_iter().next() {
                Some(issue) => ApiError::invalid(issue.key, issue.message).into(),
                None => ApiError::invalid("engine", message).into(),
            },
            EngineError::Duplicate => {
                Self::new(StatusCode::CONFLICT, ApiError::invalid("url", message))
            }
            EngineError::Unknown => {
                Self::new(StatusCode::NOT_FOUND, ApiError::invalid("id", message))
            }
            EngineError::TooMany => ApiError::new(ErrorCode::QueueFull, message).into(),
        }
    }
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
