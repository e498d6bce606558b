//! Reading a request as far as the router has to: which model, how to answer, what its prefix is. The body itself is
//! not taken apart.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderValue, header};
use bytes::Bytes;
use tokio::time::Instant;

use super::{
    check::{self, Checked},
    key,
};
use crate::{
    caller::Caller, error::ApiError, http::fields::Fields, models::ForeignModel, observe::Record,
    request::Prompt, request_id::REQUEST_ID_KEY,
};

/// How much of a prompt decides about its placement, bytes; the rest does not count as its prefix.
const KEY_BYTES_MAX: usize = 256 << 10;
/// Headers of a client that go to the engine: W3C trace context.
const TRACE_HEADERS: [&str; 3] = ["traceparent", "tracestate", "baggage"];
/// The longest of their values that is passed on.
const TRACE_BYTES_MAX: usize = 1024;

/// Which route of OpenAI's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Chat,
    Completions,
}

impl Route {
    /// The path.
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }

    /// The field that holds the prompt.
    pub(super) const fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completions => "prompt",
        }
    }
}

/// What of a client's head goes to the engine: header lines, each ended by CRLF.
pub(crate) struct Outward(Vec<u8>);

impl Outward {
    /// Picks it out.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut lines = Vec::with_capacity(128);
        for name in [REQUEST_ID_KEY].iter().chain(&TRACE_HEADERS) {
            // A header value holds no line break.
            let value = headers.get(*name).map(HeaderValue::as_bytes);
            if let Some(value) = value.filter(|value| value.len() <= TRACE_BYTES_MAX) {
                for part in [name.as_bytes(), b": ", value, b"\r\n"] {
                    lines.extend_from_slice(part);
                }
            }
        }
        let accepts = headers.get(header::ACCEPT).map(HeaderValue::as_bytes);
        if accepts.is_some_and(|value| value == b"text/event-stream") {
            lines.extend_from_slice(b"accept: text/event-stream\r\n");
        }
        Self(lines)
    }

    pub(super) fn lines(&self) -> &[u8] {
        &self.0
    }
}

/// A request for a foreign engine.
pub(crate) struct RelayRequest {
    pub(super) route: Route,
    pub(super) model: Arc<ForeignModel>,
    pub(super) outward: Outward,
    /// What the client wrote.
    pub(super) body: Bytes,
    pub(super) checked: Checked,
    /// The prefix that decides about the placement: tokens, or the text of the prompt, four bytes to a token.
    pub(super) key: Vec<u32>,
    /// To be tokenised, where the model's files are here.
    pub(super) prompt: Option<Box<Prompt>>,
    pub(super) arrived: Instant,
    pub(crate) caller: Caller,
    /// What is taken down of it.
    pub(crate) record: Record,
}

/// Reads a body whose model foreign engines have.
pub(crate) fn read(
    route: Route,
    outward: Outward,
    model: Arc<ForeignModel>,
    body: &Bytes,
    fields: &Fields<'_>,
) -> Result<RelayRequest, ApiError> {
    let checked = check::check(route, body, fields)?;
    let text = fields.raw(route.prompt_field()).map_or("", |raw| raw.get());
    let has_text = model.text.get().is_some();
    Ok(RelayRequest {
        prompt: has_text
            .then(|| key::prompt(route, fields))
            .flatten()
            .map(Box::new),
        route,
        model,
        outward,
        body: body.clone(),
        checked,
        key: pack(text.as_bytes()),
        arrived: Instant::now(),
        caller: Caller::default(),
        record: Record::default(),
    })
}

/// Text as the scheduler's tokens: four bytes each, little-endian, so that its blocks are chunks of 128 bytes. What is
/// left over is padded; a chunk that is not full has no identity anyway.
fn pack(text: &[u8]) -> Vec<u32> {
    let text = &text[..text.len().min(KEY_BYTES_MAX)];
    let mut key = Vec::with_capacity(text.len().div_ceil(4));
    let (words, rest) = text.as_chunks::<4>();
    key.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        key.push(u32::from_le_bytes(last));
    }
    key
}
