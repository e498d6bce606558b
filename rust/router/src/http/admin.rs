//! The operators' door, on a listener of its own. Its routes:
//!
//! | route | does |
//! |---|---|
//! | `GET /admin/workers` | [`workers::list`] |
//! | `POST /admin/workers` | [`workers::add`] |
//! | `POST /admin/workers/{id}/drain`, `…/undrain` | [`workers::drain`], [`workers::undrain`] |
//! | `DELETE /admin/workers/{id}` | [`workers::remove`] |
//! | `GET /admin/decisions/{request_id}` | [`decision`] |
//! | `POST /admin/drain` | [`drain`]: the router itself |
//! | `GET /admin/config` | [`config_in_effect`] |
//! | `PUT /admin/log` | [`set_log`] |
//! | `GET /metrics` | [`metrics`]: as on the clients' door |
//! | `GET /` | [`dashboard`]: a page that shows the two that list and count |
//!
//! Its answers and errors look like those of the clients' door, and its bodies are read with the same limits.

mod dashboard;
mod workers;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{MatchedPath, Path, Request, State},
    http::{Response, StatusCode, header},
    middleware::{self, Next},
    routing::{delete, get, post, put},
};
use bytes::Bytes;
use orchestra_core::ErrorCode;
use serde::{Deserialize, Serialize};

use super::{HttpDoor, body::Refusal, health, ingress, json};
use crate::{
    config::{RouterConfig, Setting},
    error::ApiError,
    operations::Operations,
    respond::json_body,
    state::RouterState,
};

/// The routes as metrics name them.
const ROUTES: [&str; 9] = [
    "/admin/workers",
    "/admin/workers/{id}",
    "/admin/workers/{id}/drain",
    "/admin/workers/{id}/undrain",
    "/admin/decisions/{request_id}",
    "/admin/drain",
    "/admin/config",
    "/admin/log",
    "/metrics",
];

/// What every handler needs.
struct AdminDoor {
    /// Reads bodies.
    http: HttpDoor,
    operations: Arc<Operations>,
}

/// The operators' door to `state`, ready to serve.
pub(crate) fn router(
    state: Arc<RouterState>,
    operations: Arc<Operations>,
    config: &RouterConfig,
) -> Router {
    let door = Arc::new(AdminDoor {
        http: HttpDoor::new(state, config),
        operations,
    });
    Router::new()
        .route("/admin/workers", get(workers::list).post(workers::add))
        .route("/admin/workers/{id}", delete(workers::remove))
        .route("/admin/workers/{id}/drain", post(workers::drain))
        .route("/admin/workers/{id}/undrain", post(workers::undrain))
        .route("/admin/decisions/{request_id}", get(decision))
        .route("/admin/drain", post(drain))
        .route("/admin/config", get(config_in_effect))
        .route("/admin/log", put(set_log))
        .route("/metrics", get(metrics))
        .merge(dashboard::routes())
        .fallback(ingress::no_such_route)
        .method_not_allowed_fallback(ingress::wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&door), enter))
        .with_state(door)
}

/// The outermost layer: counts, and lets operators in.
async fn enter(State(door): State<Arc<AdminDoor>>, request: Request, next: Next) -> Response<Body> {
    let matched = request.extensions().get::<MatchedPath>();
    let matched = matched.map_or("", MatchedPath::as_str);
    let known = ROUTES.into_iter().find(|route| *route == matched);
    let state = Arc::clone(&door.http.state);
    let checked = if dashboard::is_file(matched) {
        Ok(())
    } else {
        door.check(&request)
    };
    let response = match checked {
        Ok(()) => next.run(request).await,
        Err(refusal) => axum::response::IntoResponse::into_response(refusal),
    };
    let status = response.status().as_u16();
    state
        .metrics
        .http_response(known.unwrap_or("other"), status);
    response
}

impl AdminDoor {
    /// Refuses requests without the key, and those that a page in a browser sends: an operator's browser reaches this
    /// listener, but what asks for it there need not be the operator.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let headers = request.headers();
        if headers.contains_key(header::ORIGIN) {
            let error = ApiError::invalid("origin", "web pages may not operate a router");
            return Err(Refusal::new(StatusCode::FORBIDDEN, error));
        }
        let settings = self.http.state.settings();
        let given = ingress::authorization(headers);
        let checked = settings.admin_keys.check(given);
        checked.map(drop).map_err(Refusal::from)
    }
}

/// An answer that says no more than that it was done.
#[derive(Debug, Serialize)]
struct Status {
    status: &'static str,
}

fn status(status: &'static str) -> Response<Body> {
    json(json_body(&Status { status }))
}

/// New requests are refused from now on, those that run go on, `/ready` says no. The process stays.
async fn drain(State(door): State<Arc<AdminDoor>>) -> Response<Body> {
    tracing::info!("draining: an operator asked for it");
    door.http.state.begin_drain();
    status("draining")
}

/// Where a request was placed and why: one of the last `--decisions`.
async fn decision(
    State(door): State<Arc<AdminDoor>>,
    Path(request_id): Path<String>,
) -> Result<Response<Body>, Refusal> {
    let found = door.http.state.observers().decision(&request_id);
    let found = found.ok_or_else(|| {
        let message = "no request with this id was placed lately";
        Refusal::new(
            StatusCode::NOT_FOUND,
            ApiError::invalid("request_id", message),
        )
    })?;
    Ok(json(json_body(&found)))
}

/// The router's metrics, for the page.
async fn metrics(State(door): State<Arc<AdminDoor>>) -> Result<Response<Body>, Refusal> {
    health::encoded(&door.http.state)
}

#[derive(Debug, Serialize)]
struct SettingView<'a> {
    key: &'a str,
    values: &'a [String],
    source: String,
}

impl<'a> From<&'a Setting> for SettingView<'a> {
    fn from(setting: &'a Setting) -> Self {
        Self {
            key: &setting.key,
            values: &setting.values,
            source: setting.source.to_string(),
        }
    }
}

#[derive(Debug, Serialize)]
struct ConfigView<'a> {
    settings: Vec<SettingView<'a>>,
}

/// The settings in effect and where each comes from; keys are masked.
async fn config_in_effect(State(door): State<Arc<AdminDoor>>) -> Response<Body> {
    let settings = door.operations.settings();
    json(json_body(&ConfigView {
        settings: settings.iter().map(SettingView::from).collect(),
    }))
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct LogFilter {
    filter: String,
}

impl LogFilter {
    fn parse(body: &Bytes) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|_| {
            ApiError::invalid("filter", "the body must be an object with the text filter")
        })
    }
}

/// Changes what is logged until the next reload or restart.
async fn set_log(
    State(door): State<Arc<AdminDoor>>,
    request: Request,
) -> Result<Response<Body>, Refusal> {
    let wish = door.http.read(request, LogFilter::parse).await?;
    door.operations
        .log
        .set(&wish.filter)
        .map_err(|error| ApiError {
            param: Some("filter".to_owned()),
            ..ApiError::new(ErrorCode::InvalidRequest, error.to_string())
        })?;
    tracing::info!("an operator changed what is logged");
    Ok(json(json_body(&wish)))
}
