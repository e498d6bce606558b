//! Traces, as a collector that speaks OTLP gets them.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use orchestra_router::RouterConfig;
use serde_json::json;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::support::{Client, MODEL, ask, config, get, post, start_with_worker, within};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// Takes traces over gRPC, as collectors do.
struct Collector(mpsc::Sender<Vec<Span>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let groups = request.into_inner().resource_spans;
        let scopes = groups.into_iter().flat_map(|group| group.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans).collect();
        self.0.send(spans).await.unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// A router's settings with a collector, and what that gets.
async fn collected() -> (RouterConfig, mpsc::Receiver<Vec<Span>>) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .unwrap();
    let mut config = config();
    config.observe.otlp_endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
    let (sender, spans) = mpsc::channel(16);
    let service = TraceServiceServer::new(Collector(sender));
    let serving = Server::builder()
        .add_service(service)
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    (config, spans)
}

fn completion(headers: &str, model: &str) -> String {
    let body = json!({"model": model, "prompt": "do not trace me", "stream": true}).to_string();
    post("/v1/completions", &body).replacen("\r\n", &format!("\r\n{headers}"), 1)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn shown(value: &AnyValue) -> String {
    match value.value.as_ref().unwrap() {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::ArrayValue(list) => list.values.iter().map(shown).collect(),
        other => panic!("{other:?}"),
    }
}

fn attributes(span: &Span) -> BTreeMap<&str, String> {
    let attributes = span.attributes.iter();
    attributes
        .map(|attribute| {
            (
                attribute.key.as_str(),
                shown(attribute.value.as_ref().unwrap()),
            )
        })
        .collect()
}

#[tokio::test]
async fn a_request_is_a_span_under_its_caller_s_with_one_for_each_stage() {
    let (config, mut spans) = collected().await;
    let (_router, at, mut worker) = start_with_worker(&config).await;
    let headers =
        format!("x-request-id: r1\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\n");
    let mut running = Client::send(at.http, completion(&headers, MODEL)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;
    worker.finish(start.sequence_id, 3, "two").await;
    running.until("data: [DONE]\n\n").await;
    drop(running);

    let spans = within("spans", spans.recv()).await.unwrap();
    let names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    let of_request = format!("text_completion {MODEL}");
    let expected = [
        &of_request,
        "tokenise",
        "admit",
        "place",
        "dispatch",
        "stream",
    ];
    assert_eq!(names, expected);
    let root = &spans[0];
    assert_eq!(root.kind(), SpanKind::Server);
    assert_eq!(hex(&root.parent_span_id), PARENT);
    assert!(
        spans
            .iter()
            .all(|span| hex(&span.trace_id) == TRACE && span.trace_state == "a=1")
    );
    let attributes = attributes(root);
    for (key, value) in [
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.request.model", MODEL),
        (
            "gen_ai.usage.input_tokens",
            &start.prompt_token_ids.len().to_string(),
        ),
        ("gen_ai.usage.output_tokens", "6"),
        ("gen_ai.response.finish_reasons", "length"),
        ("http.response.status_code", "200"),
        ("orchestra.request_id", "r1"),
        ("orchestra.worker", "w0"),
    ] {
        assert_eq!(
            attributes.get(key).map(String::as_str),
            Some(value),
            "{key}"
        );
    }
    assert_eq!(root.events.len(), 1);
    let mut end = root.start_time_unix_nano;
    for stage in &spans[1..] {
        assert_eq!(stage.parent_span_id, root.span_id);
        assert_eq!(stage.start_time_unix_nano, end, "{}", stage.name);
        end = stage.end_time_unix_nano;
    }
    assert_eq!(end, root.end_time_unix_nano);
    assert!(!format!("{spans:?}").contains("trace me"));
}

#[tokio::test]
async fn a_refused_request_ends_in_its_stage_and_an_unsampled_one_nowhere() {
    let (mut config, mut spans) = collected().await;
    config.observe.otlp_sample_share = 0.0;
    let (router, at, _worker) = start_with_worker(&config).await;
    let unsampled = format!("traceparent: 00-{TRACE}-{PARENT}-00\r\n");
    assert_eq!(get(at.http, "/v1/models").await.status, 200);
    for headers in ["", &unsampled] {
        assert_eq!(
            ask(at.http, completion(headers, "org/none")).await.status,
            404
        );
    }
    let sampled = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\n");
    assert_eq!(
        ask(at.http, completion(&sampled, "org/none")).await.status,
        404
    );
    // Shutdown does not wait for a batch to fill.
    within("stop", router.stop(std::future::pending())).await;
    let spans = within("spans", spans.recv()).await.unwrap();
    let names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["text_completion", "tokenise"]);
    assert_eq!(attributes(&spans[0])["error.type"], "model_not_found");
    assert!(
        spans
            .iter()
            .all(|span| span.status.as_ref().is_some_and(|status| status.code == 2))
    );
}

#[tokio::test]
async fn a_collector_that_is_away_costs_its_spans_and_no_request() {
    let mut config = config();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    config.observe.otlp_endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
    drop(listener);
    let (_router, at, _worker) = start_with_worker(&config).await;
    assert_eq!(ask(at.http, completion("", "org/none")).await.status, 404);
    let lost = async {
        while !get(at.http, "/metrics")
            .await
            .body
            .contains("orchestra_spans_dropped_total 2\n")
        {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    within("count of lost spans", lost).await;
}
