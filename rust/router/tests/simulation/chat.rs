//! Clients of the foreign engines: each letter of each answer is checked.

use std::{cell::Cell, rc::Rc};

use http_body_util::BodyExt as _;
use hyper::{StatusCode, body::Incoming};
use serde_json::{Value, json};
use tokio::time;

use crate::{
    client::{PAUSE, TIERS, events_of, post, send},
    engine::MODEL,
    trace::{Trace, token},
};

const LETTERS_MAX: u32 = 60;
/// One request of so many is left in the middle.
const LEAVES: u32 = 16;

/// How an answer ended.
#[derive(PartialEq, Eq)]
enum End {
    Complete,
    /// With a proper error.
    Refused,
    Left,
}

/// One client, until `is_over`.
pub(crate) async fn chat_until(mut rng: fastrand::Rng, is_over: Rc<Cell<bool>>, trace: Trace) {
    while !is_over.get() {
        let seed = rng.u64(..) >> 1;
        let due: String = (0..rng.u32(1..=LETTERS_MAX))
            .map(|index| char::from(token(seed, index) as u8))
            .collect();
        let is_streamed = rng.u32(..4) != 0;
        let leaves = is_streamed && rng.u32(..LEAVES) == 0;
        let leaves_after = leaves.then(|| rng.usize(..due.len()));
        let tier = TIERS[rng.usize(..TIERS.len())];
        let body = json!({
            "model": MODEL, "seed": seed, "max_tokens": due.len(), "stream": is_streamed,
            "service_tier": tier, "messages": [{"role": "user", "content": "x"}],
        });
        let answer = send(post("/v1/chat/completions", &body)).await;
        if answer.status() != StatusCode::OK {
            assert!(
                answer.status().is_server_error()
                    || answer.status() == StatusCode::TOO_MANY_REQUESTS,
                "{answer:?}"
            );
            trace.note("engines: refused", seed);
            time::sleep(PAUSE).await;
            continue;
        }
        let end = if is_streamed {
            read(answer.into_body(), &due, leaves_after).await
        } else {
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["choices"][0]["message"]["content"], due);
            End::Complete
        };
        let what = match end {
            End::Complete => "engines: answered",
            End::Refused => "engines: given up with an error event",
            End::Left => "engines: client left",
        };
        trace.note(what, seed);
    }
}

/// Reads a stream, and asserts that every letter comes once and in its place.
async fn read(body: Incoming, due: &str, leaves_after: Option<usize>) -> End {
    let mut events = events_of(body);
    let mut text = String::new();
    let mut is_finished = false;
    while let Some(event) = events.next().await {
        let Some(event) = event else {
            assert!(is_finished, "[DONE] without a finish");
            assert_eq!(text, due);
            return End::Complete;
        };
        if !event["error"].is_null() {
            assert!(!is_finished, "an error after the end: {event}");
            assert!(events.next().await.is_none(), "something after the error");
            return End::Refused;
        }
        let choice = &event["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        assert!(due.starts_with(&text), "{text} is not how {due} begins");
        is_finished |= !choice["finish_reason"].is_null();
        if leaves_after.is_some_and(|limit| text.len() > limit) {
            return End::Left;
        }
    }
    panic!("the stream was cut after {text}, which was to be {due}");
}
