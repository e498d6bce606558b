//! The clients' host: many clients that ask, check every token, and sometimes leave in the middle.

use std::{cell::Cell, rc::Rc, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time};
use turmoil::net::TcpStream;

use crate::{
    chat::chat_until,
    router::{HTTP_PORT, ROUTER},
    trace::{Trace, token},
    worker::MODEL,
};

/// Of each kind: half ask Orchestra's workers, half foreign engines.
const CLIENTS: u64 = 12;
const TOKENS_MAX: u32 = 60;
/// One request of so many is left in the middle.
const LEAVES: u32 = 16;
/// How long a client waits that was told to come again.
pub(crate) const PAUSE: Duration = Duration::from_millis(50);
/// How urgent requests are: of class `batch`, `standard`, `interactive`.
pub(crate) const TIERS: [&str; 3] = ["flex", "default", "priority"];

/// Runs the clients until `is_over`; each finishes the request that it has begun.
pub(crate) async fn run(seed: u64, is_over: Rc<Cell<bool>>, trace: Trace) -> turmoil::Result {
    let ready = || {
        Request::get("/ready")
            .header("host", ROUTER)
            .body(Full::default())
    };
    while send(ready().unwrap()).await.status() != StatusCode::OK {
        time::sleep(PAUSE).await;
    }
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let client = Client {
            rng: fastrand::Rng::with_seed(seed ^ (number << 32)),
            trace: trace.clone(),
        };
        clients.spawn_local(client.ask_until(Rc::clone(&is_over)));
        let rng = fastrand::Rng::with_seed(!seed ^ (number << 32));
        clients.spawn_local(chat_until(rng, Rc::clone(&is_over), trace.clone()));
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    for (what, metric) in [
        ("stopped for others", "orchestra_requests_preempted_total"),
        (
            "engines: stopped for others",
            "orchestra_engine_attempts_total{outcome=\"stopped\"}",
        ),
    ] {
        for number in 0..counter(metric).await {
            trace.note(what, number);
        }
    }
    Ok(())
}

/// A counter of the router's.
async fn counter(name: &str) -> u64 {
    let metrics = Request::get("/metrics").header("host", ROUTER);
    let answer = send(metrics.body(Full::default()).unwrap()).await;
    let text = answer.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(text.to_vec()).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().parse().unwrap()
}

/// A JSON request.
pub(crate) fn post(path: &str, body: &Value) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", ROUTER)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .unwrap()
}

/// Sends a request on a connection of its own, which ends with the answer's body.
pub(crate) async fn send(request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect((ROUTER, HTTP_PORT)).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender.send_request(request).await.unwrap()
}

/// One request, and what has come of it.
struct Asked {
    seed: u64,
    choices: usize,
    max_tokens: u32,
    tier: &'static str,
    is_streamed: bool,
    /// Tokens after which the client leaves.
    leaves_after: Option<usize>,
    token_ids: Vec<Vec<u32>>,
    texts: Vec<String>,
    ends: Vec<u32>,
}

struct Client {
    rng: fastrand::Rng,
    trace: Trace,
}

impl Client {
    async fn ask_until(mut self, is_over: Rc<Cell<bool>>) {
        while !is_over.get() {
            let mut asked = self.draw();
            // Refused before anything began: at this moment there may be no worker at all.
            while !self.ask(&mut asked).await {
                time::sleep(PAUSE).await;
            }
        }
    }

    fn draw(&mut self) -> Asked {
        let choices = self.rng.usize(1..=2);
        let max_tokens = self.rng.u32(1..=TOKENS_MAX);
        let is_streamed = self.rng.u32(..4) != 0;
        let leaves = is_streamed && self.rng.u32(..LEAVES) == 0;
        Asked {
            seed: self.rng.u64(..),
            choices,
            max_tokens,
            tier: TIERS[self.rng.usize(..TIERS.len())],
            is_streamed,
            leaves_after: leaves.then(|| self.rng.usize(..max_tokens as usize)),
            token_ids: vec![Vec::new(); choices],
            texts: vec![String::new(); choices],
            ends: vec![0; choices],
        }
    }

    /// Sends the request and reads the answer to its end. `false` where it was refused.
    async fn ask(&self, asked: &mut Asked) -> bool {
        let body = json!({
            "model": MODEL, "prompt": "x", "seed": asked.seed, "max_tokens": asked.max_tokens,
            "n": asked.choices, "stream": asked.is_streamed, "return_token_ids": true,
            "service_tier": asked.tier,
        });
        let answer = send(post("/v1/completions", &body)).await;
        let come_again = [
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        if come_again.contains(&answer.status()) {
            self.trace.note("refused", 0);
            return false;
        }
        assert_eq!(answer.status(), StatusCode::OK);
        let has_left = self.read(asked, answer.into_body()).await;
        if has_left {
            self.trace.note("client left", asked.seed);
        } else {
            asked.check();
            self.trace.note("answered", asked.seed);
        }
        true
    }

    /// `true` where the client left before the end.
    async fn read(&self, asked: &mut Asked, body: Incoming) -> bool {
        if !asked.is_streamed {
            let body = body.collect().await.unwrap().to_bytes();
            asked.take(&serde_json::from_slice(&body).unwrap());
            return false;
        }
        let mut events = events_of(body);
        while let Some(Some(event)) = events.next().await {
            asked.take(&event);
            let received: usize = asked.token_ids.iter().map(Vec::len).sum();
            if asked.leaves_after.is_some_and(|limit| received > limit) {
                return true;
            }
        }
        false
    }
}

/// The events of a stream.
pub(crate) fn events_of(body: Incoming) -> Events {
    Events {
        body,
        received: Vec::new(),
    }
}

/// See [`events_of`].
pub(crate) struct Events {
    body: Incoming,
    received: Vec<u8>,
}

impl Events {
    /// The next event, `Some(None)` for `[DONE]`; `None` where the body ends.
    pub(crate) async fn next(&mut self) -> Option<Option<Value>> {
        loop {
            if let Some(end) = self.received.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.received.drain(..end + 2).collect();
                if event.starts_with(b":") {
                    continue;
                }
                let data = event.strip_prefix(b"data: ").expect("not an event");
                if data.trim_ascii() == b"[DONE]" {
                    return Some(None);
                }
                return Some(Some(serde_json::from_slice(data).unwrap()));
            }
            let Some(frame) = self.body.frame().await else {
                assert!(self.received.is_empty(), "the stream ends in half an event");
                return None;
            };
            let data = frame.expect("the stream was cut").into_data().unwrap();
            self.received.extend_from_slice(&data);
        }
    }
}

impl Asked {
    /// Takes in an event of a stream, or a whole answer.
    fn take(&mut self, answer: &Value) {
        assert!(answer["error"].is_null(), "{answer}");
        for choice in answer["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            assert_eq!(self.ends[index], 0, "something after the end: {answer}");
            self.texts[index].push_str(choice["text"].as_str().unwrap());
            let new = choice["token_ids"].as_array().into_iter().flatten();
            self.token_ids[index].extend(new.map(|id| id.as_u64().unwrap() as u32));
            self.ends[index] += u32::from(!choice["finish_reason"].is_null());
        }
    }

    /// Every token once, in order; its text; one end.
    fn check(&self) {
        for choice in 0..self.choices {
            let seed = self.seed.wrapping_add(choice as u64);
            let due: Vec<_> = (0..self.max_tokens)
                .map(|index| token(seed, index))
                .collect();
            assert_eq!(
                self.token_ids[choice], due,
                "lost, repeated or out of order"
            );
            let text: String = due.iter().map(|&id| char::from(id as u8)).collect();
            assert_eq!(self.texts[choice], text);
            assert_eq!(self.ends[choice], 1);
        }
    }
}
