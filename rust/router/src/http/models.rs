//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State},
    http::Response,
};
use orchestra_core::ErrorCode;
use serde::Serialize;

use super::{HttpDoor, body::Refusal, json};
use crate::{error::ApiError, respond::json_body, state::ModelInfo};

/// OpenAI's model object, with the context length that vLLM adds.
#[derive(Debug, Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: u32,
}

impl<'a> From<&'a ModelInfo> for Model<'a> {
    fn from(info: &'a ModelInfo) -> Self {
        let ModelInfo {
            id,
            max_model_len,
            created,
            ..
        } = info;
        let (created, max_model_len) = (*created, *max_model_len);
        Self {
            id,
            object: "model",
            created,
            owned_by: "orchestra",
            max_model_len,
        }
    }
}

#[derive(Debug, Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

/// The models that a request could name now.
pub(super) async fn list(State(door): State<Arc<HttpDoor>>) -> Response<Body> {
    let models = door.state.list_models();
    json(json_body(&List {
        object: "list",
        data: models.iter().map(Model::from).collect(),
    }))
}

/// One model; its name may contain slashes.
pub(super) async fn show(
    State(door): State<Arc<HttpDoor>>,
    Path(id): Path<String>,
) -> Result<Response<Body>, Refusal> {
    let models = door.state.list_models();
    let model = models
        .iter()
        .find(|model| model.id == id)
        .ok_or_else(|| ApiError {
            param: Some("model".to_owned()),
            ..ApiError::new(ErrorCode::ModelNotFound, "no such model is served here")
        })?;
    Ok(json(json_body(&Model::from(model))))
}
