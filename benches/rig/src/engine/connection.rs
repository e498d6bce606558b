//! One connection: requests one after another, each answered, or broken as ordered.

use std::{
    io::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Engine,
    control::{Fault, Order, add},
    render::{Render, Usage, error},
    request::{Generation, Refusal},
};
use crate::{
    http1::{BodyLength, BodyReader, Connection, Head},
    pace::Timer,
};

/// What is to become of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// The next request is read.
    Next,
    /// It is closed.
    Close,
    /// It is reset.
    Reset,
}

/// Counts a request as running while it lives.
struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One client's connection with what its requests reuse.
pub(super) struct Served {
    pub(super) engine: Arc<Engine>,
    pub(super) connection: Connection,
    /// The request as it came: head and body.
    message: Vec<u8>,
    /// Where the body begins in it.
    body_at: usize,
    pub(super) out: Vec<u8>,
    timer: Option<Timer>,
}

impl Engine {
    /// Serves one connection to its end. How it ends is the peer's affair.
    pub(super) async fn connection(self: Arc<Self>, connection: Connection) {
        let mut served = Served {
            engine: self,
            connection,
            message: Vec::new(),
            body_at: 0,
            out: Vec::new(),
            timer: None,
        };
        let mut after = Ok(After::Next);
        while matches!(after, Ok(After::Next)) {
            after = served.request().await;
        }
        if matches!(after, Ok(After::Reset)) {
            let _ = served.connection.stream.set_zero_linger();
        }
    }
}

impl Served {
    /// Reads one request and answers it.
    async fn request(&mut self) -> io::Result<After> {
        let Some(head) = self.connection.head().await? else {
            return Ok(After::Close);
        };
        let (method, path) = self.read(head).await?;
        let body = &self.message[self.body_at..];
        let control = self.engine.control();
        let after = match (method.as_str(), path.as_str()) {
            ("POST", "/v1/chat/completions") => self.generate(true).await?,
            ("POST", "/v1/completions") => self.generate(false).await?,
            ("GET", "/_control") => self.reply(200, &control.report()).await?,
            ("GET", "/_control/last") => self.reply(200, &control.last()).await?,
            ("DELETE", "/_control") => {
                control.disarm();
                self.reply(200, b"{}").await?
            }
            ("POST", "/_control") => {
                let order = serde_json::from_slice(body).map_err(|error| error.to_string());
                match order.and_then(|order| control.arm(order)) {
                    Ok(()) => self.reply(200, b"{}").await?,
                    Err(message) => self.reply(400, &error(400, &message)).await?,
                }
            }
            ("POST", path) => {
                let fact = self.engine.tokeniser(path, body);
                self.fact(fact).await?
            }
            (_, path) => {
                if matches!(path, "/health" | "/v1/models") {
                    add(&control.counters.probes);
                }
                let fact = self.engine.fact(path);
                self.fact(fact).await?
            }
        };
        Ok(if head.closes { After::Close } else { after })
    }

    /// Reads the message of `head` into place; its method and path.
    async fn read(&mut self, head: Head) -> io::Result<(String, String)> {
        self.message.clear();
        self.message
            .extend_from_slice(&self.connection.ahead()[..head.len]);
        self.body_at = head.len;
        self.connection.skip(head.len);
        let first = String::from_utf8_lossy(&self.message[..head.first_line]);
        let mut words = first.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default();
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let mut reader = match head.body {
            BodyLength::Bytes(bytes) => BodyReader::Bytes(bytes),
            BodyLength::Chunked => BodyReader::Chunked(crate::http1::Chunked::default()),
            BodyLength::Unsaid => BodyReader::Bytes(0),
        };
        while self.connection.body(&mut reader, &mut self.message).await? {}
        Ok((method, path))
    }

    async fn fact(&mut self, fact: Option<super::facts::Fact>) -> io::Result<After> {
        let (status, body) = fact.unwrap_or_else(|| (404, error(404, "no such route")));
        self.reply(status, &body).await
    }

    /// Writes a whole JSON answer.
    async fn reply(&mut self, status: u16, body: &[u8]) -> io::Result<After> {
        self.head(status, body.len());
        self.out.extend_from_slice(body);
        self.connection.write(&self.out).await?;
        Ok(After::Next)
    }

    /// Begins `out` with the head of a JSON answer of `length` bytes.
    fn head(&mut self, status: u16, length: usize) {
        self.out.clear();
        let reason = match status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            429 => "Too Many Requests",
            500 => "Internal Server Error",
            503 => "Service Unavailable",
            _ => "Status",
        };
        let _ = write!(
            self.out,
            "HTTP/1.1 {status} {reason}\r\nserver: mock-engine\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
    }

    /// Answers a generation request, or breaks it.
    async fn generate(&mut self, is_chat: bool) -> io::Result<After> {
        let began = Instant::now();
        let engine = Arc::clone(&self.engine);
        let (config, control) = (&engine.config, engine.control());
        let counters = &control.counters;
        add(&counters.requests);
        let parsed = Generation::parse(config, is_chat, &self.message[self.body_at..]);
        control.remember(&mut self.message);
        let generation = match parsed {
            Ok(generation) => generation,
            Err(Refusal(status, message)) => {
                add(&counters.refused);
                return self.reply(status, &error(status, &message)).await;
            }
        };
        let running = counters.running.fetch_add(1, Ordering::Relaxed);
        let _running = Running(&counters.running);
        if running >= config.max_concurrency {
            add(&counters.refused);
            return self
                .reply(
                    config.busy_status,
                    &error(config.busy_status, "too many requests"),
                )
                .await;
        }
        if generation.is_continuation() {
            add(&counters.continued);
        }
        let fault = control.take();
        if let Some(order) = &fault
            && (!generation.streams || order.after_events == 0 || is_before_head(order.fault))
            && let Some(after) = self.break_at_once(order).await?
        {
            return Ok(after);
        }
        let after = if generation.streams {
            self.stream(generation, began, fault.as_ref()).await
        } else {
            self.whole(generation, began, fault.as_ref()).await
        };
        match after {
            Ok(After::Next) => add(&counters.completed),
            Ok(_) => {}
            // Writing failed: there is no client any more.
            Err(_) => control.gone(),
        }
        after
    }

    /// The faults that need no answer around them; `None` for those that do.
    async fn break_at_once(&mut self, order: &Order) -> io::Result<Option<After>> {
        Ok(Some(match order.fault {
            Fault::Reset => After::Reset,
            Fault::Fin => After::Close,
            Fault::Exit => exit(),
            Fault::Status => {
                self.reply(order.status, &error(order.status, "ordered"))
                    .await?
            }
            Fault::GarbageJson => self.reply(200, br#"{"id":"cmpl-1","choices":["#).await?,
            Fault::HangHeaders => {
                self.connection.closed().await;
                self.engine.control().gone();
                After::Close
            }
            Fault::Hold => {
                let engine = Arc::clone(&self.engine);
                tokio::select! {
                    () = engine.control().released() => return Ok(None),
                    _ = self.connection.closed() => self.gone(),
                }
            }
            _ => return Ok(None),
        }))
    }

    /// Waits until `when`; whether the client left meanwhile.
    pub(super) async fn wait(&mut self, when: Instant) -> io::Result<bool> {
        if when <= Instant::now() {
            return Ok(false);
        }
        let timer = match &mut self.timer {
            Some(timer) => timer,
            empty => empty.insert(Timer::new()?),
        };
        tokio::select! {
            rung = timer.until(when) => rung.map(|()| false),
            _ = self.connection.closed() => Ok(true),
        }
    }

    pub(super) fn gone(&self) -> After {
        self.engine.control().gone();
        After::Close
    }

    async fn whole(
        &mut self,
        mut generation: Generation,
        began: Instant,
        fault: Option<&Order>,
    ) -> io::Result<After> {
        let engine = Arc::clone(&self.engine);
        let cached = engine.cache.lock().insert(&generation.prompt);
        let choices: Vec<Vec<_>> = generation
            .choices
            .iter_mut()
            .map(|choice| std::iter::from_fn(|| choice.piece()).collect())
            .collect();
        let words: usize = choices.iter().map(Vec::len).sum();
        let pace = pace_of(&engine, fault);
        let steps = choices.iter().map(Vec::len).max().unwrap_or(0) as u32;
        let when = began + engine.config.ttft + pace * steps.saturating_sub(1);
        if self.wait(when).await? {
            return Ok(self.gone());
        }
        let ids = if generation.token_ids {
            generation.prompt_token_ids(&generation.choices)
        } else {
            Vec::new()
        };
        let usage = Usage {
            prompt: generation.prompt_tokens,
            cached,
            completion: words,
        };
        let number = self.number();
        let render = Render::new(&generation, &engine, number);
        let body = render.body(&choices, &ids, usage);
        self.engine
            .control()
            .counters
            .words
            .fetch_add(words as u64, Ordering::Relaxed);
        self.head(200, body.len());
        let fault = fault.filter(|order| !matches!(order.fault, Fault::Slow | Fault::Hold));
        let is_cut = fault.is_some();
        let sent = if is_cut { body.len() / 2 } else { body.len() };
        self.out.extend_from_slice(&body[..sent]);
        self.connection.write(&self.out).await?;
        match fault.map(|order| order.fault) {
            None => Ok(After::Next),
            Some(Fault::HangStream) => {
                self.connection.closed().await;
                Ok(self.gone())
            }
            Some(_) => Ok(After::Close),
        }
    }

    pub(super) fn number(&self) -> u64 {
        self.engine
            .control()
            .counters
            .requests
            .load(Ordering::Relaxed)
    }
}

/// Time between words.
pub(super) fn pace_of(engine: &Engine, fault: Option<&Order>) -> Duration {
    fault
        .filter(|order| order.fault == Fault::Slow)
        .map_or(engine.config.itl, |order| {
            Duration::from_millis(order.itl_ms)
        })
}

fn is_before_head(fault: Fault) -> bool {
    use Fault::{GarbageJson, HangHeaders, Hold, Status};
    matches!(fault, Status | GarbageJson | HangHeaders | Hold)
}

/// Ends the process as a crash does.
pub(super) fn exit() -> ! {
    #[expect(
        clippy::disallowed_methods,
        clippy::exit,
        reason = "a crash is what was ordered: no drop is to run"
    )]
    std::process::exit(1)
}
