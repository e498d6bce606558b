//! The gRPC door: `orchestra.v1.Inference`, with the standard health and reflection services beside it.

mod wire;

use std::{pin::Pin, sync::Arc, time::Duration};

use axum::Router;
use futures_core::Stream;
use futures_util::StreamExt as _;
use orchestra_proto::v1::{
    GenerateRequest, GenerateResponse, ListModelsRequest, ListModelsResponse, Model,
    inference_server::{Inference, InferenceServer},
};
use tonic::{
    Request, Response, Status,
    metadata::{MetadataMap, MetadataValue},
    server::NamedService as _,
    service::Routes,
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::Instrument as _;

use crate::{
    caller::Caller,
    config::RouterConfig,
    corridor,
    error::ApiError,
    observe::{Arrival, EXPLAIN_KEY, Record, TRACEPARENT_KEY, TRACESTATE_KEY},
    request_id::{REQUEST_ID_KEY, request_id},
    respond::grpc_status,
    state::{ModelInfo, RouterState},
};

/// How often health follows readiness; a watcher hears of a change this late.
const HEALTH_INTERVAL: Duration = Duration::from_millis(200);

/// The door's services, ready to serve. Starts the task that keeps health up to date.
pub(crate) fn router(
    state: &Arc<RouterState>,
    config: &RouterConfig,
) -> Result<Router, tonic_reflection::server::Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(orchestra_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // Only what is served here; the workers' service is in the same file and on another listener.
            .with_service_name(InferenceServer::<Door>::NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    state
        .tasks
        .spawn(follow_readiness(Arc::clone(state), reporter));
    let door = Door {
        state: Arc::clone(state),
    };
    let inference =
        InferenceServer::new(door).max_decoding_message_size(config.listen.max_body_size.0);
    let routes = Routes::new(inference)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok(routes.prepare().into_axum_router())
}

async fn follow_readiness(state: Arc<RouterState>, reporter: HealthReporter) {
    let shutdown = state.tasks.shutdown_token().clone();
    let mut shown = None;
    while !shutdown.is_cancelled() {
        let is_ready = state.is_ready();
        if shown != Some(is_ready) {
            let status = if is_ready {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            // The empty name stands for the server as a whole.
            for name in ["", InferenceServer::<Door>::NAME] {
                reporter.set_service_status(name, status).await;
            }
            shown = Some(is_ready);
        }
        let _: Option<()> = shutdown
            .run_until_cancelled(tokio::time::sleep(HEALTH_INTERVAL))
            .await;
    }
}

/// `orchestra.v1.Inference`.
struct Door {
    state: Arc<RouterState>,
}

impl Door {
    /// Sends a request down the corridor.
    async fn open(
        &self,
        metadata: &MetadataMap,
        request: GenerateRequest,
        record: &Record,
    ) -> Result<corridor::TokenStream, ApiError> {
        let refused = |error: &ApiError| self.state.metrics.rejected(error.code);
        let authorization = metadata
            .get("authorization")
            .map(MetadataValue::as_encoded_bytes);
        let settings = self.state.settings();
        let tenant = settings.keys.check(authorization).inspect_err(refused)?;
        let header = |key: &str| metadata.get(key).map(MetadataValue::as_encoded_bytes);
        let caller = Caller::read(&settings, tenant, header).inspect_err(refused)?;
        let mut input = wire::generate_input(request).inspect_err(refused)?;
        let deadline = metadata
            .get("grpc-timeout")
            .and_then(|value| value.to_str().ok());
        let deadline = deadline.and_then(wire::grpc_timeout);
        input.timeout = input.timeout.into_iter().chain(deadline).min();
        input.caller = caller;
        input.record = record.clone();
        Box::pin(corridor::generate(&self.state, input))
            .await
            .inspect_err(refused)
    }
}

#[tonic::async_trait]
impl Inference for Door {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let given = |key| metadata.get(key).map(MetadataValue::as_encoded_bytes);
        let request_id = request_id(given(REQUEST_ID_KEY));
        let record = self.state.observers().record(&Arrival {
            door: "grpc",
            route: "orchestra.v1.Inference/Generate",
            request_id: &request_id,
            traceparent: given(TRACEPARENT_KEY),
            tracestate: given(TRACESTATE_KEY),
            wants_explanation: given(EXPLAIN_KEY) == Some(b"1"),
        });
        let trace_id = record.trace_id();
        let span = tracing::info_span!("request", request_id, trace_id, door = "grpc");
        let opening = self.open(&metadata, request, &record).instrument(span);
        let with_id = |metadata: &mut MetadataMap| {
            if let Ok(value) = request_id.parse() {
                metadata.insert(REQUEST_ID_KEY, value);
            }
        };
        let tokens = opening.await.map_err(|error| {
            let mut status = grpc_status(&error);
            record.failed(error.code);
            record.status(status.code() as u16);
            with_id(status.metadata_mut());
            status
        })?;
        let prompt_tokens = tokens.prompt_tokens();
        let responses: Self::GenerateStream = Box::pin(tokens.map(move |item| match item {
            Ok(chunk) => Ok(wire::generate_response(chunk, prompt_tokens)),
            Err(error) => Err(grpc_status(&error)),
        }));
        let mut response = Response::new(responses);
        with_id(response.metadata_mut());
        Ok(response)
    }

    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let authorization = request
            .metadata()
            .get("authorization")
            .map(MetadataValue::as_encoded_bytes);
        self.state
            .settings()
            .keys
            .check(authorization)
            .map_err(|error| grpc_status(&error))?;
        let models = self.state.list_models().into_iter().map(|info| {
            let ModelInfo {
                id,
                max_model_len,
                num_workers,
                ..
            } = info;
            Model {
                id,
                max_model_len,
                workers: num_workers,
            }
        });
        Ok(Response::new(ListModelsResponse {
            models: models.collect(),
        }))
    }
}
