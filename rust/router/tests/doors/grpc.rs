//! `orchestra.v1.Inference` over gRPC.

use orchestra_proto::v1::{self, generate_request::Prompt, inference_client::InferenceClient};
use orchestra_router::{Addresses, respond, tenants::TenantConfig};
use tonic::{Code, Request, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{MODEL, config, start, start_with_worker, within};

async fn channel(at: Addresses) -> Channel {
    Channel::from_shared(format!("http://{}", at.grpc))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

fn request(prompt: Prompt) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: MODEL.to_owned(),
        prompt: Some(prompt),
        ..Default::default()
    }
}

fn text(text: &str) -> v1::GenerateRequest {
    request(Prompt::Text(text.to_owned()))
}

#[tokio::test]
async fn tokens_stream_with_their_usage() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let mut client = InferenceClient::new(channel(at).await);
    let mut request = Request::new(text("hello"));
    request
        .metadata_mut()
        .insert("x-request-id", "mine-1".parse().unwrap());
    let response = client.generate(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine-1");
    let mut stream = response.into_inner();
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    let first = within("piece", stream.message()).await.unwrap().unwrap();
    assert_eq!((first.text.as_str(), first.token_ids.len()), ("one", 3));
    worker.finish(start.sequence_id, 3, "!").await;
    let last = within("piece", stream.message()).await.unwrap().unwrap();
    let finish = last.finish.unwrap();
    assert_eq!(finish.reason(), v1::FinishReason::Length);
    let usage = finish.usage.unwrap();
    assert_eq!(usage.prompt_tokens as usize, start.prompt_token_ids.len());
    assert_eq!(usage.completion_tokens, 4);
    assert_eq!(within("end", stream.message()).await.unwrap(), None);
}

#[tokio::test]
async fn a_caller_that_leaves_ends_its_request() {
    let (_router, at, mut worker) = start_with_worker(&config()).await;
    let mut client = InferenceClient::new(channel(at).await);
    let stream = client.generate(text("x")).await.unwrap().into_inner();
    let start = worker.start().await;
    drop(stream);
    assert_eq!(worker.abort().await, start.sequence_id);
}

#[tokio::test]
async fn refusals_are_statuses_with_the_exact_code_and_field() {
    let (_router, at, _worker) = start_with_worker(&config()).await;
    let mut client = InferenceClient::new(channel(at).await);
    let hot = v1::SamplingParams {
        temperature: Some(3.0),
        ..Default::default()
    };
    let long = v1::TokenIds {
        ids: vec![97; 5000],
    };
    let cases = [
        (
            v1::GenerateRequest::default(),
            Code::InvalidArgument,
            "invalid_request",
            Some("model"),
        ),
        (
            v1::GenerateRequest {
                sampling: Some(hot),
                ..text("x")
            },
            Code::InvalidArgument,
            "invalid_request",
            Some("temperature"),
        ),
        (
            request(Prompt::TokenIds(long)),
            Code::InvalidArgument,
            "context_too_long",
            None,
        ),
        (
            v1::GenerateRequest {
                model: "secret".to_owned(),
                ..text("x")
            },
            Code::NotFound,
            "model_not_found",
            Some("model"),
        ),
    ];
    for (request, code, exact, param) in cases {
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert_eq!(
            status.metadata().get(respond::ERROR_CODE_KEY).unwrap(),
            exact
        );
        if let Some(param) = param {
            assert_eq!(
                status.metadata().get(respond::ERROR_PARAM_KEY).unwrap(),
                param
            );
        }
        assert!(status.metadata().contains_key("x-request-id"));
        assert!(!status.message().contains("secret"));
    }
}

#[tokio::test]
async fn health_follows_readiness() {
    let config = config();
    let (_router, at, worker) = start_with_worker(&config).await;
    let mut client = HealthClient::new(channel(at).await);
    let service = "orchestra.v1.Inference".to_owned();
    let watch = client.watch(HealthCheckRequest { service }).await.unwrap();
    let mut watch = watch.into_inner();
    let mut seen = ServingStatus::Unknown;
    while seen != ServingStatus::Serving {
        seen = within("status", watch.message())
            .await
            .unwrap()
            .unwrap()
            .status();
    }
    drop(worker);
    let next = within("status", watch.message()).await.unwrap().unwrap();
    assert_eq!(next.status(), ServingStatus::NotServing);
    let whole = client
        .check(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(whole.status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn models_are_listed_to_those_with_a_key() {
    let mut config = config();
    config.api_keys = vec!["sk-1".parse().unwrap()];
    let (_router, at) = start(&config);
    let mut client = InferenceClient::new(channel(at).await);
    let status = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let status = client.generate(text("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let mut request = Request::new(v1::ListModelsRequest {});
    request
        .metadata_mut()
        .insert("authorization", "Bearer sk-1".parse().unwrap());
    assert!(
        client
            .list_models(request)
            .await
            .unwrap()
            .into_inner()
            .models
            .is_empty()
    );
}

#[tokio::test]
async fn the_workers_service_is_not_at_the_clients_door() {
    let (_router, at) = start(&config());
    let mut gateway = v1::worker_gateway_client::WorkerGatewayClient::new(channel(at).await);
    let status = gateway.attach(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn metadata_say_who_asks_and_how_urgently() {
    let mut config = config();
    config.trust_tenant_header = true;
    config.tenants = vec![TenantConfig {
        name: "none".to_owned(),
        max_queued_requests: Some(0),
        ..TenantConfig::default()
    }];
    config.corridor.max_concurrent_requests = 1;
    let (_router, at, mut worker) = start_with_worker(&config).await;
    let mut client = InferenceClient::new(channel(at).await);
    let with = |key: &'static str, value: &str| {
        let mut request = Request::new(text("x"));
        let value = value.parse().unwrap();
        request.metadata_mut().insert(key, value);
        request
    };
    let refused = client.generate(with("x-orchestra-class", "urgent")).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let param = refused.metadata().get(respond::ERROR_PARAM_KEY);
    assert_eq!(param.unwrap(), "x-orchestra-class");

    let _running = client.generate(text("x")).await.unwrap();
    worker.start().await;
    let refused = client.generate(with("x-orchestra-tenant", "none")).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("of this tenant"), "{refused:?}");
    assert!(refused.metadata().contains_key(respond::RETRY_AFTER_MS_KEY));
}
