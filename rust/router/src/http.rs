//! The HTTP door. Its routes:
//!
//! | route | answer |
//! |---|---|
//! | `POST /v1/chat/completions` | [`chat`] |
//! | `POST /v1/completions` | [`completions`] |
//! | `GET /v1/models`, `GET /v1/models/{id}` | [`models`] |
//! | `GET /live`, `/ready`, `/health`, `/metrics` | [`health`] |

pub(crate) mod admin;
mod body;
mod chat;
mod choices;
mod completions;
mod envelope;
mod fields;
mod health;
mod ingress;
mod logprobs;
mod models;
#[cfg(test)]
mod robustness;
mod sampling;
mod sse;
#[cfg(test)]
mod testing;
mod unsupported;
mod usage;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Response, header},
    middleware,
    routing::{get, post},
};

use self::{
    body::Refusal,
    chat::{ChatFormat, ChatRequest},
    choices::{Choices, collect},
    completions::{CompletionFormat, CompletionRequest},
    sampling::OutputOptions,
    sse::Format,
};
use crate::{config::RouterConfig, observe::Record, request::GenerateInput, state::RouterState};

/// The door as a service, for whoever accepts connections by other means than [`crate::Router`].
pub fn http_service(state: Arc<RouterState>, config: &RouterConfig) -> Router {
    state.set_settings(config.into());
    HttpDoor::new(state, config).into_router()
}

/// What every handler needs.
pub(crate) struct HttpDoor {
    state: Arc<RouterState>,
    max_body_bytes: usize,
}

impl HttpDoor {
    /// The door to `state`.
    pub(crate) fn new(state: Arc<RouterState>, config: &RouterConfig) -> Self {
        Self {
            state,
            max_body_bytes: config.listen.max_body_size.0,
        }
    }

    /// The door's routes, ready to serve.
    pub(crate) fn into_router(self) -> Router {
        let door = Arc::new(self);
        let for_clients = Router::new()
            .route("/v1/chat/completions", post(chat_completions))
            .route("/v1/completions", post(completions))
            .route("/v1/models", get(models::list))
            .route("/v1/models/{*id}", get(models::show))
            .route_layer(middleware::from_fn_with_state(
                Arc::clone(&door),
                ingress::authenticate,
            ));
        let for_operators = Router::new()
            .route("/live", get(health::live))
            .route("/ready", get(health::ready))
            .route("/health", get(health::ready))
            .route("/metrics", get(health::metrics));
        for_clients
            .merge(for_operators)
            .fallback(ingress::no_such_route)
            .method_not_allowed_fallback(ingress::wrong_method)
            .layer(middleware::from_fn_with_state(
                Arc::clone(&door),
                ingress::enter,
            ))
            .with_state(door)
    }

    /// Sends `inputs` down the corridor and writes what comes back.
    async fn answer(
        &self,
        mut inputs: Vec<GenerateInput>,
        (options, record): (OutputOptions, Record),
        mut format: impl Format<Choices>,
    ) -> Result<Response<Body>, Refusal> {
        for input in &mut inputs {
            input.record = record.clone();
        }
        let count: usize = inputs.iter().map(|input| input.n as usize).sum();
        let state = Arc::clone(&self.state);
        let opening = async move { Choices::open(&state, inputs).await };
        if options.stream {
            let keep_alive = self.state.settings().listen.sse_keep_alive.0;
            return Ok(sse::respond(opening, format, keep_alive).await);
        }
        let mut source = Box::pin(opening).await?;
        let collected = collect(&mut source, count).await?;
        Ok(json(format.body(&source, &collected)))
    }
}

async fn chat_completions(
    State(door): State<Arc<HttpDoor>>,
    request: Request,
) -> Result<Response<Body>, Refusal> {
    let record = ingress::record_of(&request);
    let request = door.read(request, ChatRequest::parse).await?;
    let format = ChatFormat::new(&request);
    door.answer(vec![request.input], (request.options, record), format)
        .await
}

async fn completions(
    State(door): State<Arc<HttpDoor>>,
    request: Request,
) -> Result<Response<Body>, Refusal> {
    let record = ingress::record_of(&request);
    let request = door.read(request, CompletionRequest::parse).await?;
    let format = CompletionFormat::new(&request);
    door.answer(request.inputs, (request.options, record), format)
        .await
}

/// A JSON body as a response.
fn json(body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let value = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}
