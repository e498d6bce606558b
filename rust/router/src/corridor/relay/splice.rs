//! Joining a continuation to the answer that it continues, so that a client sees one stream: the same identity, no second
//! beginning, usage of both parts, and stop strings also where the two parts meet.

use bytes::{BufMut as _, BytesMut};
use serde_json::{Value, json};

use super::{
    memory::{Identity, Memory},
    read::Route,
};
use crate::text::stop::StopStrings;

/// Rewrites the events of a continuation.
#[derive(Debug)]
pub(super) struct Splice {
    route: Route,
    identity: Identity,
    /// Output tokens of the parts before.
    tokens_before: u32,
    /// Prompt tokens, where an engine before said it.
    prompt_tokens: Option<u32>,
    stop: StopStrings,
    /// Bytes that the stop strings hold back and that the client has already.
    sent: usize,
}

/// What became of an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Spliced {
    /// The client gets this instead.
    Data(Value),
    /// There is nothing in it for the client.
    Nothing,
    /// This, and a stop string has ended the answer.
    Stopped(Value),
}

impl Splice {
    /// A splice behind what `memory` has.
    pub(super) fn new(route: Route, memory: &Memory, stop: &[String]) -> Self {
        let mut stop = StopStrings::new(stop);
        let mut sent = 0;
        let mut tokens_before = 0;
        for choice in &memory.choices {
            let mut out = String::new();
            if stop.push(&choice.text, &mut out).is_some() {
                // The engine lets it pass, so it is none to it.
                stop = StopStrings::new(&[]);
                out.clone_from(&choice.text);
            }
            sent = choice.text.len() - out.len();
            tokens_before += choice.num_tokens;
        }
        Self {
            route,
            identity: memory.identity.clone().unwrap_or_default(),
            tokens_before,
            prompt_tokens: memory
                .usage
                .map(|usage| usage.prompt_tokens)
                .filter(|&count| count > 0),
            stop,
            sent,
        }
    }

    /// Rewrites the data of one event.
    pub(super) fn event(&mut self, data: &[u8]) -> Spliced {
        let Ok(mut event) = serde_json::from_slice::<Value>(data) else {
            return Spliced::Nothing;
        };
        self.identify(&mut event);
        self.add_usage(&mut event);
        let has_usage = event.get("usage").is_some_and(Value::is_object);
        let choice = event
            .get_mut("choices")
            .and_then(|choices| choices.get_mut(0));
        let Some(choice) = choice.filter(|choice| choice.is_object()) else {
            return if has_usage {
                Spliced::Data(event)
            } else {
                Spliced::Nothing
            };
        };
        let is_stopped = self.cut(choice);
        if is_stopped {
            choice["finish_reason"] = "stop".into();
        }
        if let Some(delta) = choice.get_mut("delta").and_then(Value::as_object_mut) {
            delta.remove("role");
        }
        let says_something = is_finished(choice) || says_something(choice);
        match (is_stopped, says_something || has_usage) {
            (true, _) => Spliced::Stopped(event),
            (false, true) => Spliced::Data(event),
            (false, false) => Spliced::Nothing,
        }
    }

    /// The last event of an answer that ended where its first part broke off.
    pub(super) fn last_event(&self, finish_reason: &str) -> Value {
        let mut choice = json!({"index": 0, "logprobs": null, "finish_reason": finish_reason});
        let (object, key, nothing) = match self.route {
            Route::Chat => ("chat.completion.chunk", "delta", json!({})),
            Route::Completions => ("text_completion", "text", json!("")),
        };
        choice[key] = nothing;
        let mut event =
            json!({"id": "", "object": object, "created": 0, "model": "", "choices": [choice]});
        self.identify(&mut event);
        event
    }

    /// The event with the usage, where both parts of it are known.
    pub(super) fn usage_event(&self, completion_tokens: u32) -> Option<Value> {
        let prompt_tokens = self.prompt_tokens?;
        let mut event = self.last_event("");
        event["choices"] = json!([]);
        event["usage"] = json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        });
        Some(event)
    }

    fn identify(&self, event: &mut Value) {
        let Some(event) = event.as_object_mut() else {
            return;
        };
        let Identity { id, created, model } = &self.identity;
        event.insert("id".to_owned(), id.as_str().into());
        event.insert("created".to_owned(), (*created).into());
        event.insert("model".to_owned(), model.as_str().into());
        event.remove("prompt_token_ids");
    }

    /// The engine counts what was sent before as prompt.
    fn add_usage(&mut self, event: &mut Value) {
        let Some(usage) = event.get_mut("usage").and_then(Value::as_object_mut) else {
            return;
        };
        let number =
            |usage: &serde_json::Map<String, Value>, key| usage.get(key).and_then(Value::as_u64);
        let before = u64::from(self.tokens_before);
        let own_prompt = number(usage, "prompt_tokens")
            .unwrap_or(0)
            .saturating_sub(before);
        let prompt = self.prompt_tokens.map_or(own_prompt, u64::from);
        let completion = number(usage, "completion_tokens").unwrap_or(0) + before;
        self.prompt_tokens = Some(prompt as u32);
        for (key, count) in [
            ("prompt_tokens", prompt),
            ("completion_tokens", completion),
            ("total_tokens", prompt + completion),
        ] {
            usage.insert(key.to_owned(), count.into());
        }
    }

    /// Cuts the text of a choice at a stop string; true where there is one.
    fn cut(&mut self, choice: &mut Value) -> bool {
        let is_last = is_finished(choice);
        let slot = match self.route {
            Route::Chat => choice
                .get_mut("delta")
                .and_then(|delta| delta.get_mut("content")),
            Route::Completions => choice.get_mut("text"),
        };
        let mut out = String::new();
        let text = slot
            .as_ref()
            .and_then(|slot| slot.as_str())
            .unwrap_or_default();
        let found = self.stop.push(text, &mut out).is_some();
        if is_last && !found {
            self.stop.finish(&mut out);
        }
        // What was held back of the first part is with the client already.
        let known = self.sent.min(out.len());
        self.sent -= known;
        let new = &out[known..];
        match slot {
            Some(slot) if slot.is_string() => *slot = new.into(),
            _ if new.is_empty() => {}
            _ => match self.route {
                Route::Chat => choice["delta"] = json!({"content": new}),
                Route::Completions => choice["text"] = new.into(),
            },
        }
        found
    }
}

fn is_finished(choice: &Value) -> bool {
    choice
        .get("finish_reason")
        .is_some_and(|reason| !reason.is_null())
}

/// Whether a choice has anything besides its frame.
fn says_something(choice: &Value) -> bool {
    let is_something = |value: &Value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    };
    let delta = choice.get("delta").and_then(Value::as_object);
    choice.get("text").is_some_and(is_something)
        || delta.is_some_and(|delta| delta.values().any(is_something))
}

/// Writes an event.
pub(super) fn write(event: &Value, out: &mut BytesMut) {
    out.put_slice(b"data: ");
    // Values are always JSON.
    out.put_slice(event.to_string().as_bytes());
    out.put_slice(b"\n\n");
}

#[cfg(test)]
mod tests;
