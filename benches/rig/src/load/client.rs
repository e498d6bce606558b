//! One client: a connection that is kept, one request at a time.

use std::{
    io::{self, Write as _},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::net::TcpStream;

use super::{
    Run,
    report::{Samples, keep},
};
use crate::{
    http1::{BodyLength, BodyReader, Chunked, Connection},
    words,
};

/// Rest after an error, so that a dead target is not hammered.
const PAUSE: Duration = Duration::from_millis(5);

/// How one request failed.
enum Failure {
    Connect,
    Broken,
    Status,
    Unfinished,
    WrongWords,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Broken
    }
}

/// A client and what it has seen.
pub(super) struct Client {
    run: Arc<Run>,
    number: usize,
    connection: Option<Connection>,
    request: Vec<u8>,
    body: Vec<u8>,
    answer: Vec<u8>,
    samples: Samples,
}

impl Client {
    pub(super) fn new(run: Arc<Run>, number: usize) -> Self {
        Self {
            run,
            number,
            connection: None,
            request: Vec::new(),
            body: Vec::new(),
            answer: Vec::new(),
            samples: Samples::default(),
        }
    }

    /// Asks until the run is over.
    pub(super) async fn run(mut self) -> Samples {
        let run = Arc::clone(&self.run);
        while let Some(number) = run.next() {
            self.samples.requests += 1;
            let asked = tokio::time::timeout(run.config.timeout, self.ask(number)).await;
            let errors = &mut self.samples.errors;
            match asked {
                Ok(Ok(())) => continue,
                Ok(Err(Failure::Connect)) => errors.connect += 1,
                Ok(Err(Failure::Broken)) => errors.broken += 1,
                Ok(Err(Failure::Status)) => errors.status += 1,
                Ok(Err(Failure::Unfinished)) => errors.unfinished += 1,
                Ok(Err(Failure::WrongWords)) => errors.wrong_words += 1,
                Err(_) => errors.timeout += 1,
            }
            self.connection = None;
            tokio::time::sleep(PAUSE).await;
        }
        self.samples
    }

    async fn ask(&mut self, number: u64) -> Result<(), Failure> {
        let run = Arc::clone(&self.run);
        let targets = &run.config.targets;
        let target = targets[self.number % targets.len()];
        self.body.clear();
        let key = run.prompts.write(number, &mut self.body);
        self.request.clear();
        let _ = write!(
            self.request,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {target}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.body.len()
        );
        self.request.extend_from_slice(&self.body);
        // A connection that is kept has been open before; opening the first one is not a request's time.
        if self.connection.is_none() {
            let stream = TcpStream::connect(target)
                .await
                .map_err(|_| Failure::Connect)?;
            self.connection = Some(Connection::new(stream)?);
        }
        let Some(connection) = self.connection.as_mut() else {
            return Err(Failure::Connect);
        };
        let began = Instant::now();
        connection.write(&self.request).await?;
        self.answer.clear();
        let status = receive(connection, &mut self.answer, began, &mut self.samples).await?;
        if status != 200 {
            return Err(Failure::Status);
        }
        keep(&mut self.samples.latency, began.elapsed());
        self.check(key)
    }

    /// Whether the answer is whole, and where asked, right word by word.
    fn check(&self, key: Option<u64>) -> Result<(), Failure> {
        let config = &self.run.config;
        if config.streams && !self.answer.ends_with(b"data: [DONE]\n\n") {
            return Err(Failure::Unfinished);
        }
        let Some(key) = key else {
            return Ok(());
        };
        let said = if config.streams {
            said_in_events(&self.answer)
        } else {
            said_in_whole(&self.answer)
        };
        let said = said.ok_or(Failure::Unfinished)?;
        let expected = words::Progress {
            words: config.words,
            bytes: 0,
        };
        match words::progress(key, said.as_bytes()) {
            Some(progress) if progress == expected => Ok(()),
            _ => Err(Failure::WrongWords),
        }
    }
}

/// Reads one answer to its end; its status.
async fn receive(
    connection: &mut Connection,
    answer: &mut Vec<u8>,
    began: Instant,
    samples: &mut Samples,
) -> io::Result<u16> {
    let head = connection
        .head()
        .await?
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let first = connection
        .ahead()
        .get(..head.first_line)
        .unwrap_or_default();
    let status = str::from_utf8(first)
        .ok()
        .and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let is_stream = head.body == BodyLength::Chunked;
    connection.skip(head.len);
    let mut reader = match head.body {
        BodyLength::Bytes(bytes) => BodyReader::Bytes(bytes),
        BodyLength::Chunked => BodyReader::Chunked(Chunked::default()),
        BodyLength::Unsaid => BodyReader::ToEnd,
    };
    let mut last = None;
    loop {
        let from = answer.len();
        let is_more = connection.body(&mut reader, answer).await?;
        let events = if is_stream {
            events_in(answer, from..answer.len())
        } else {
            0
        };
        if events > 0 {
            let now = Instant::now();
            match last.replace(now) {
                None => keep(&mut samples.ttft, now - began),
                Some(before) => keep(&mut samples.gaps, now - before),
            }
            samples.events += events;
        }
        if !is_more {
            return status.ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
    }
}

/// Events that end in this part of a stream.
fn events_in(stream: &[u8], part: Range<usize>) -> u64 {
    let from = part.start.saturating_sub(1);
    stream[from..part.end]
        .windows(2)
        .filter(|two| two == b"\n\n")
        .count() as u64
}

fn said_in_events(stream: &[u8]) -> Option<String> {
    let mut said = String::new();
    for line in str::from_utf8(stream).ok()?.lines() {
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data != "[DONE]" {
            let event: Value = serde_json::from_str(data).ok()?;
            let choices = event.get("choices")?.as_array()?;
            if let Some(choice) = choices.first() {
                said += choice["delta"]["content"].as_str().unwrap_or_default();
            }
        }
    }
    Some(said)
}

fn said_in_whole(body: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    answer["choices"][0]["message"]["content"]
        .as_str()
        .map(str::to_owned)
}
