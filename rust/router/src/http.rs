//! The HTTP door. Its routes:
//!
//! | route | answer |
//! |---|---|
//! | `POST /v1/chat/completions` | [`chat`] |
//! | `POST /v1/completions` | [`completions`] |
//! | `GET /v1/models`, `GET /v1/models/{id}` | [`models`] |
//! | `GET /live`, `/ready`, `/health`, `/metrics` | [`health`] |

pub(crate) mod admin;
mod app;
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
    body::Body,
    extract::Request,
    http::{HeaderValue, Response, header},
};

pub use self::app::App;
use self::{
    body::Refusal,
    chat::{ChatFormat, ChatRequest},
    choices::{Choices, collect},
    completions::{CompletionFormat, CompletionRequest},
    fields::Fields,
    sampling::{OutputOptions, service_tier},
    sse::Format,
};
use crate::{
    caller::Caller,
    config::RouterConfig,
    corridor::relay::{self, Outward, RelayRequest, Route},
    error::ApiError,
    observe::Record,
    request::GenerateInput,
    state::RouterState,
    tenants::Tenant,
};

/// The door as a service, for whoever accepts connections by other means than [`crate::Router`].
pub fn http_service(state: Arc<RouterState>, config: &RouterConfig) -> App {
    state.set_settings(config.into());
    HttpDoor::new(state, config).into_app()
}

/// A request that was read, and the way that it goes.
enum Entry<T> {
    Corridor(T, Caller),
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

    /// Answers a request of either route that generates.
    async fn generate(
        &self,
        route: Route,
        request: Request,
        record: Record,
    ) -> Result<Response<Body>, Refusal> {
        let tenant = self.authenticate(&request)?;
        match route {
            Route::Chat => self.chat(request, tenant, record).await,
            Route::Completions => self.complete(request, tenant, record).await,
        }
    }

    async fn chat(
        &self,
        request: Request,
        tenant: Arc<Tenant>,
        record: Record,
    ) -> Result<Response<Body>, Refusal> {
        let parse = ChatRequest::from_fields;
        match self.open((request, Route::Chat), tenant, parse).await? {
            Entry::Relay(request) => self.relay(request, record).await,
            Entry::Corridor(request, caller) => {
                let format = ChatFormat::new(&request);
                let options = (request.options, record);
                self.answer((vec![request.input], caller), options, format)
                    .await
            }
        }
    }

    async fn complete(
        &self,
        request: Request,
        tenant: Arc<Tenant>,
        record: Record,
    ) -> Result<Response<Body>, Refusal> {
        let parse = CompletionRequest::from_fields;
        match self
            .open((request, Route::Completions), tenant, parse)
            .await?
        {
            Entry::Relay(request) => self.relay(request, record).await,
            Entry::Corridor(request, caller) => {
                let format = CompletionFormat::new(&request);
                let options = (request.options, record);
                self.answer((request.inputs, caller), options, format).await
            }
        }
    }

    /// Reads a request, and decides by its model which way it goes: to Orchestra's workers or to foreign engines.
    async fn open<T: Send + 'static>(
        &self,
        (request, route): (Request, Route),
        tenant: Arc<Tenant>,
        parse: fn(&Fields<'_>) -> Result<T, ApiError>,
    ) -> Result<Entry<T>, Refusal> {
        let outward = Outward::of(request.headers());
        let caller = self.caller(&request, tenant)?;
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
                Some(model) => {
                    let caller = caller.or_class(service_tier(&fields)?);
                    let mut request = relay::read(route, outward, model, body, &fields)?;
                    request.caller = caller;
                    Ok(Entry::Relay(request))
                }
                None => Ok(Entry::Corridor(parse(&fields)?, caller)),
            }
        })
        .await
    }

    /// Who asks, by the key that let the request in and by its headers.
    fn caller(&self, request: &Request, tenant: Arc<Tenant>) -> Result<Caller, Refusal> {
        let header = |key: &str| request.headers().get(key).map(HeaderValue::as_bytes);
        let settings = self.state.settings();
        let caller = Caller::read(&settings, tenant, header);
        caller.map_err(|error| {
            self.state.metrics.rejected(error.code);
            error.into()
        })
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
        (mut inputs, caller): (Vec<GenerateInput>, Caller),
        (options, record): (OutputOptions, Record),
        mut format: impl Format<Choices>,
    ) -> Result<Response<Body>, Refusal> {
        for input in &mut inputs {
            input.caller = caller.clone().or_class(input.caller.asked_class);
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

/// A JSON body as a response.
fn json(body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let value = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}
