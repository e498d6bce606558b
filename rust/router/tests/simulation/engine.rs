//! A foreign engine's host: speaks as much of OpenAI's HTTP API as the router asks for, computes nothing, and
//! misbehaves when it is told to. Like vLLM it continues a last message of the assistant.

use std::{convert::Infallible, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{Response, StatusCode},
    response::IntoResponse as _,
    routing::{get, post},
};
use futures_util::{Stream, stream};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use serde_json::{Value, json};
use tokio::time;
use turmoil::net::TcpListener;

use crate::{faults::Orders, trace::token};

/// The model that all engines serve.
pub(crate) const MODEL: &str = "foreign";
/// Where engines listen.
pub(crate) const PORT: u16 = 9000;
const STEP: Duration = Duration::from_millis(5);

/// How an engine misbehaves once, in whatever it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misdeed {
    /// The stream ends in the middle.
    Cut,
    /// An event that is no JSON.
    Garbage,
    /// Half an event, then the end.
    Truncated,
    /// Nothing more comes.
    Stall,
    /// Status 500.
    Failed,
    /// Status 503.
    Busy,
    /// An answer that is no JSON.
    GarbageAnswer,
    /// No answer.
    Hang,
}

/// Serves until the host ends.
pub(crate) async fn run(orders: Orders<Misdeed>) -> turmoil::Result {
    let models = json!({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]});
    let app = Router::new()
        .route("/health", get(|| async {}))
        .route(
            "/version",
            get(|| async { json_answer(&json!({"version": "0.11.0"})) }),
        )
        .route("/v1/models", get(async move || json_answer(&models)))
        .route(
            "/v1/chat/completions",
            post(move |body: Bytes| answer(body, orders.clone())),
        );
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let service = TowerToHyperService::new(app.clone());
        // How a connection ends is the router's affair.
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

fn json_answer(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    let media_type = "application/json".parse().unwrap();
    response.headers_mut().insert("content-type", media_type);
    response
}

/// What is being generated.
struct Run {
    seed: u64,
    index: u32,
    end: u32,
    orders: Orders<Misdeed>,
    has_begun: bool,
    is_over: bool,
}

async fn answer(body: Bytes, orders: Orders<Misdeed>) -> Response<Body> {
    let request: Value = serde_json::from_slice(&body).unwrap();
    let messages = request["messages"].as_array().unwrap();
    let last = messages.last().unwrap();
    // A letter is a token.
    let index = match last["role"].as_str() {
        Some("assistant") => {
            assert_eq!(request["continue_final_message"], true);
            assert_eq!(request["add_generation_prompt"], false);
            last["content"].as_str().unwrap().len() as u32
        }
        _ => 0,
    };
    let run = Run {
        seed: request["seed"].as_u64().unwrap(),
        index,
        end: index + request["max_tokens"].as_u64().unwrap() as u32,
        orders,
        has_begun: false,
        is_over: false,
    };
    match run.orders.take_if(|it| {
        matches!(
            it,
            Misdeed::Failed | Misdeed::Busy | Misdeed::GarbageAnswer | Misdeed::Hang
        )
    }) {
        Some(Misdeed::Failed) => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Some(Misdeed::Busy) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Some(Misdeed::GarbageAnswer) => return "<html>".into_response(),
        Some(_) => std::future::pending::<()>().await,
        None => {}
    }
    if request["stream"] == true {
        let mut response = Response::new(Body::from_stream(run.events()));
        let media_type = "text/event-stream".parse().unwrap();
        response.headers_mut().insert("content-type", media_type);
        return response;
    }
    time::sleep(STEP * (run.end - run.index)).await;
    let message = json!({"role": "assistant", "content": run.letters(run.end)});
    let choice = json!({"index": 0, "message": message, "finish_reason": "length"});
    json_answer(
        &json!({"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}),
    )
}

impl Run {
    fn letters(&self, end: u32) -> String {
        let letters = (self.index..end).map(|index| char::from(token(self.seed, index) as u8));
        letters.collect()
    }

    fn events(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut run| async move {
            if run.is_over {
                return None;
            }
            time::sleep(STEP).await;
            let event = run.next().await?;
            Some((Ok(event), run))
        })
    }

    /// The next bytes of the stream; `None` where it is cut.
    async fn next(&mut self) -> Option<Bytes> {
        if !self.has_begun {
            self.has_begun = true;
            return Some(event(&json!({"role": "assistant", "content": ""}), None));
        }
        if self.index == self.end {
            self.is_over = true;
            let last = event(&json!({}), Some("length"));
            return Some([&last[..], b"data: [DONE]\n\n"].concat().into());
        }
        let end = self.index + 1;
        let next = event(&json!({"content": self.letters(end)}), None);
        let misdeed = self.orders.take_if(|it| {
            matches!(
                it,
                Misdeed::Cut | Misdeed::Garbage | Misdeed::Truncated | Misdeed::Stall
            )
        });
        self.index = end;
        self.is_over = misdeed.is_some();
        match misdeed {
            None => Some(next),
            Some(Misdeed::Garbage) => Some(Bytes::from_static(b"data: {\"choices\": [}\n\n")),
            Some(Misdeed::Truncated) => Some(next.slice(..next.len() / 2)),
            Some(Misdeed::Stall) => std::future::pending().await,
            Some(_) => None,
        }
    }
}

fn event(delta: &Value, finish_reason: Option<&str>) -> Bytes {
    let choice = json!({"index": 0, "delta": delta, "finish_reason": finish_reason});
    let chunk = json!({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]});
    format!("data: {chunk}\n\n").into()
}
