//! How many tokens a text is, where the engine that wrote it did not say.
//!
//! Engines put several tokens into one event where the reader is slow, so events count too few. Asked in this order: the
//! model's own tokeniser, where its files are here; an engine of the model that has a route for it; nobody, and each
//! piece of text counts as one token. A text is mostly cut into tokens as it was written, but need not be.

use std::time::Duration;

use bytes::BytesMut;
use serde::Deserialize;
use tokio::time;

use super::admit::Admitted;
use crate::engines::{
    EngineKind,
    engine::{Engine, Outgoing},
};

/// How long an engine may take for it: a client waits.
const TIMEOUT: Duration = Duration::from_millis(200);
/// The longest answer; it lists every token.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// vLLM's and `SGLang`'s answer, as far as it is needed.
#[derive(Deserialize)]
struct Tokenised {
    count: u32,
}

/// Tokens of `text`, where somebody knows.
pub(super) async fn count_tokens(admitted: &Admitted, text: &str) -> Option<u32> {
    let model = &admitted.request.model;
    if let Some(known) = model.text.get() {
        let token_ids = known.tokenizer().encode(text, false).ok()?;
        return u32::try_from(token_ids.len()).ok();
    }
    let body = serde_json::json!({
        "model": model.name,
        "prompt": text,
        "add_special_tokens": false,
    });
    let body = body.to_string();
    for worker in admitted.state.engines.workers_of(&model.name) {
        let can_count = {
            let status = worker.engine.status.lock();
            status.is_available() && matches!(status.kind, EngineKind::Vllm | EngineKind::Sglang)
        };
        if can_count {
            let asked = time::timeout(TIMEOUT, ask(&worker.engine, body.as_bytes())).await;
            if let Ok(Some(count)) = asked {
                return Some(count);
            }
        }
    }
    None
}

async fn ask(engine: &Engine, body: &[u8]) -> Option<u32> {
    let outgoing = Outgoing {
        method: "POST",
        path: "/tokenize",
        headers: b"",
        body,
    };
    let (head, mut connection) = engine.send(&outgoing, TIMEOUT).await.ok()?;
    let mut answer = BytesMut::new();
    while connection.read_body(&mut answer).await.ok()? {
        if answer.len() > ANSWER_BYTES_MAX {
            return None;
        }
    }
    engine.put_back(connection);
    let tokenised: Tokenised = serde_json::from_slice(&answer).ok()?;
    (head.status == 200).then_some(tokenised.count)
}
