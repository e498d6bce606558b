//! A request's record as spans of OpenTelemetry: one for the request, one below it for each stage of the corridor.
//!
//! Names and attributes are those of the conventions for generative AI and for HTTP, and ours where these have none.
//! <https://opentelemetry.io/docs/specs/semconv/gen-ai/>

use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, ArrayValue, KeyValue, any_value::Value},
    trace::v1::{
        Span, Status,
        span::{Event, SpanKind},
        status::StatusCode,
    },
};
use tokio::time::Instant;

use super::{
    record::{Entry, Facts, Stage},
    trace_context::{TraceContext, fresh_id},
};

/// The spans below the request's, each with the stage that ends it; the last ends with the request.
const STAGES: [(&str, Option<Stage>); 5] = [
    ("tokenise", Some(Stage::Tokenised)),
    ("admit", Some(Stage::Admitted)),
    ("place", Some(Stage::Placed)),
    ("dispatch", Some(Stage::Dispatched)),
    ("stream", None),
];

/// The spans of a request that is over; none where its trace is not recorded.
pub(super) fn spans_of(entry: &Entry) -> Vec<Span> {
    let Some(trace) = entry.trace.as_ref().filter(|trace| trace.is_sampled) else {
        return Vec::new();
    };
    let facts = entry.facts.lock();
    let ended = facts.ended.unwrap_or(entry.arrived);
    let nanos = |instant: Instant| {
        let since_arrival = instant.saturating_duration_since(entry.arrived);
        unix_nanos(entry.arrived_at + since_arrival)
    };
    let mut spans = Vec::with_capacity(1 + STAGES.len());
    spans.push(Span {
        name: name(entry.route, &facts.model),
        kind: SpanKind::Server.into(),
        span_id: trace.span_id.to_be_bytes().to_vec(),
        parent_span_id: trace
            .parent_id
            .map(|id| id.to_be_bytes().to_vec())
            .unwrap_or_default(),
        attributes: attributes(entry, &facts),
        status: status(&facts),
        events: first_token(&facts, nanos),
        ..span(trace, nanos(entry.arrived), nanos(ended))
    });
    if operation(entry.route).is_none() {
        return spans;
    }
    let mut begin = entry.arrived;
    for (name, last) in STAGES {
        let reached = match last {
            Some(stage) => facts.stages[stage as usize],
            None => Some(ended),
        };
        // A choice may be placed before the request as a whole is said to be admitted.
        let end = reached.unwrap_or(ended).max(begin);
        spans.push(Span {
            name: name.to_owned(),
            kind: SpanKind::Internal.into(),
            span_id: fresh_id().to_be_bytes().to_vec(),
            parent_span_id: trace.span_id.to_be_bytes().to_vec(),
            status: if reached.is_none() || last.is_none() {
                status(&facts)
            } else {
                None
            },
            ..span(trace, nanos(begin), nanos(end))
        });
        if reached.is_none() {
            // The request ended in this stage.
            break;
        }
        begin = end;
    }
    spans
}

fn span(trace: &TraceContext, begin: u64, end: u64) -> Span {
    Span {
        trace_id: trace.trace_id.to_be_bytes().to_vec(),
        trace_state: trace.state.clone().unwrap_or_default(),
        start_time_unix_nano: begin,
        end_time_unix_nano: end,
        ..Span::default()
    }
}

/// Operation and model.
fn name(route: &str, model: &str) -> String {
    let operation = operation(route).unwrap_or(route);
    if model.is_empty() {
        operation.to_owned()
    } else {
        format!("{operation} {model}")
    }
}

/// What the conventions call it; `None` where the route generates nothing, and so has no stages.
fn operation(route: &str) -> Option<&'static str> {
    match route {
        "/v1/chat/completions" => Some("chat"),
        "/v1/completions" => Some("text_completion"),
        "orchestra.v1.Inference/Generate" => Some("generate_content"),
        _ => None,
    }
}

fn attributes(entry: &Entry, facts: &Facts) -> Vec<KeyValue> {
    let mut all = vec![
        text("orchestra.request_id", &entry.request_id),
        text("orchestra.door", entry.door),
    ];
    if let Some(operation) = operation(entry.route) {
        all.push(text("gen_ai.operation.name", operation));
        all.push(text("gen_ai.provider.name", "orchestra"));
    }
    if entry.door == "http" {
        all.push(text("http.route", entry.route));
        all.push(number("http.response.status_code", facts.status.into()));
    } else {
        all.push(text("rpc.method", entry.route));
        all.push(number("rpc.grpc.status_code", facts.status.into()));
    }
    if !facts.model.is_empty() {
        all.push(text("gen_ai.request.model", &facts.model));
    }
    if facts.prompt_tokens > 0 {
        all.push(number("gen_ai.usage.input_tokens", facts.prompt_tokens));
    }
    if let Some(reason) = facts.finish {
        all.push(number(
            "gen_ai.usage.output_tokens",
            facts.completion_tokens,
        ));
        all.push(number(
            "gen_ai.usage.cache_read.input_tokens",
            facts.cached_tokens,
        ));
        let reasons = ArrayValue {
            values: vec![value(Value::StringValue(reason.as_str().to_owned()))],
        };
        let reasons = Value::ArrayValue(reasons);
        all.push(attribute("gen_ai.response.finish_reasons", reasons));
    }
    if let Some(class) = facts.class {
        all.push(text("orchestra.class", class.as_str()));
    }
    if let Some(tenant) = &facts.tenant {
        all.push(text("orchestra.tenant", tenant));
    }
    if !facts.worker().is_empty() {
        all.push(text("orchestra.worker", facts.worker()));
        all.push(number("orchestra.replays", facts.replays.into()));
        all.push(number("orchestra.retries", facts.retries.into()));
        all.push(number("orchestra.pauses", facts.pauses.into()));
    }
    if let Some(code) = facts.code {
        all.push(text("error.type", code.as_str()));
    }
    all
}

fn status(facts: &Facts) -> Option<Status> {
    let code = facts.code?;
    Some(Status {
        message: code.as_str().to_owned(),
        code: StatusCode::Error.into(),
    })
}

fn first_token(facts: &Facts, nanos: impl Fn(Instant) -> u64) -> Vec<Event> {
    let reached = facts.stages[Stage::FirstToken as usize];
    let event = |instant| Event {
        time_unix_nano: nanos(instant),
        name: "first token".to_owned(),
        ..Event::default()
    };
    reached.map(event).into_iter().collect()
}

pub(super) fn text(key: &str, text: &str) -> KeyValue {
    attribute(key, Value::StringValue(text.to_owned()))
}

fn number(key: &str, number: u64) -> KeyValue {
    attribute(key, Value::IntValue(number as i64))
}

fn attribute(key: &str, inner: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(value(inner)),
        ..KeyValue::default()
    }
}

fn value(value: Value) -> AnyValue {
    AnyValue { value: Some(value) }
}

fn unix_nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64
}
