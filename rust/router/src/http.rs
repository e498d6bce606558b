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
pub(crate) mod chat;
mod choices;
mod completions;
mod envelope;
pub(crate) mod fields;
mod health;
mod ingress;
mod logprobs;
mod models;
#[cfg(test)]
mod robustness;
pub(crate) mod sampling;
mod sse;
#[cfg(test)]
mod testing;
mod unsupported;
mod usage;

use std::{borrow::Cow, sync::Arc};

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
    fields::Fields,
    sampling::OutputOptions,
    sse::Format,
};
use crate::{
    config::RouterConfig,
    corridor::relay::{self, Outward, RelayRequest, Route},
    error::ApiError,
    observe::Record,
    request::GenerateInput,
    state::RouterState,
};

/// The door as a service, for whoever accepts connections by other means than [`crate::Router`].
pub fn http_service(state: Arc<RouterState>, config: &RouterConfig) -> Router {
    state.set_settings(config.into());
    HttpDoor::new(state, config).into_router()
}

/// A request that was read, and the way that it goes.
enum Entry<T> {
    Corridor(T),
    Relay(RelayRequest),
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

    /// Reads a request, and decides by its model which way it goes: to Orchestra's workers or to foreign engines.
    async fn open<T: Send + 'static>(
        &self,
        request: Request,
        route: Route,
        parse: fn(&Fields<'_>) -> Result<T, ApiError>,
    ) -> Result<Entry<T>, Refusal> {
        let outward = Outward::of(request.headers());
        let state = Arc::clone(&self.state);
        self.read(request, move |body| {
            let fields = Fields::parse(body)?;
            let model = if state.models.has_foreign() {
                let name: Cow<'_, str> = fields.require("model", "a string")?;
                state.models.foreign(&name)
            } else {
                None
            };
            match model {
                Some(model) => relay::read(route, outward, model, body, &fields).map(Entry::Relay),
                None => parse(&fields).map(Entry::Corridor),
            }
        })
        .await
    }

    /// Sends a request to a foreign engine.
    async fn relay(
        &self,
        mut request: RelayRequest,
        record: Record,
    ) -> Result<Response<Body>, Refusal> {
        let keep_alive = self.state.settings().listen.sse_keep_alive.0;
        request.record = record;
        let answered = relay::relay(&self.state, request, keep_alive).await;
        answered.map_err(|error| {
            self.state.metrics.rejected(error.code);
            error.into()
        })
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
    match door
        .open(request, Route::Chat, ChatRequest::from_fields)
        .await?
    {
        Entry::Relay(request) => door.relay(request, record).await,
        Entry::Corridor(request) => {
            let format = ChatFormat::new(&request);
            door.answer(vec![request.input], (request.options, record), format)
                .await
        }
    }
}

async fn completions(
    State(door): State<Arc<HttpDoor>>,
    request: Request,
) -> Result<Response<Body>, Refusal> {
    let record = ingress::record_of(&request);
    let parse = CompletionRequest::from_fields;
    match door.open(request, Route::Completions, parse).await? {
        Entry::Relay(request) => door.relay(request, record).await,
        Entry::Corridor(request) => {
            let format = CompletionFormat::new(&request);
            door.answer(request.inputs, (request.options, record), format)
                .await
        }
    }
}

/// A JSON body as a response.
fn json(body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let value = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}
