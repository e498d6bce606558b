//! Continuing an answer on another engine: the client's request once more, with the answer so far in it.
//!
//! | engine | chat | completions |
//! |---|---|---|
//! | vLLM, `SGLang` | the text as a last message of the assistant, `continue_final_message` | prompt and text, or token ids |
//! | llama.cpp | the text as a last message of the assistant, which it goes on with by itself | the same |
//! | others | cannot be continued | prompt and text |
//!
//! Only what an engine takes back in can be continued truthfully: the text of one choice. An answer with calls of tools,
//! reasoning or a grammar, of several choices or with positions in its log-probabilities is not.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, value::RawValue};

use super::{
    memory::Memory,
    read::{RelayRequest, Route},
};
use crate::{
    engines::{EngineConfig, EngineKind, ReplayMeans},
    http::{fields::Fields, sampling::stop_strings},
};

/// Fields that bind an answer to a grammar, which would begin anew in the middle of it.
const GRAMMARS: [&str; 9] = [
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
];
/// Fields under which text behind the prompt is not what the answer so far is.
const ODD: [&str; 3] = ["echo", "best_of", "use_beam_search"];
/// Limits on the output, which has begun already.
const TOKEN_LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "min_tokens"];
/// What `/v1/completions` generates where nobody sets a limit.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// What an answer needs to be continued, whichever engine does it.
pub(super) struct Resumption {
    request: Arc<RelayRequest>,
    text: String,
    token_ids: Option<Vec<u32>>,
    num_tokens: u32,
    /// The stop strings that the client gave, which may be cut in two where the answer broke off.
    pub(super) stop: Vec<String>,
}

impl Resumption {
    /// `None` where the answer cannot be continued truthfully.
    pub(super) fn new(request: &Arc<RelayRequest>, memory: &Memory) -> Option<Self> {
        let fields = Fields::parse(&request.body).ok()?;
        let [choice] = &memory.choices[..] else {
            return None;
        };
        let is_plain = |name: &&str| match fields.raw(name).map(RawValue::get) {
            None | Some("false") => true,
            Some("1") => *name == "best_of",
            Some(value) => *name == "response_format" && is_text_format(value),
        };
        let is_fit = memory.is_plain(request.route) && GRAMMARS.iter().chain(&ODD).all(is_plain);
        let keeps_stop = fields.switch("include_stop_str_in_output").ok()?;
        let stop = if keeps_stop {
            Vec::new()
        } else {
            stop_strings(&fields).ok()?
        };
        is_fit.then(|| Self {
            request: Arc::clone(request),
            text: choice.text.clone(),
            token_ids: choice.token_ids.clone(),
            num_tokens: choice.num_tokens,
            stop,
        })
    }

    /// Output tokens that may still come; `None` where there is no limit.
    pub(super) fn tokens_left(&self, kind: EngineKind) -> Option<u32> {
        let has_default = !matches!(kind, EngineKind::LlamaCpp | EngineKind::Tgi);
        let default =
            (self.request.route == Route::Completions && has_default).then_some(MAX_TOKENS_DEFAULT);
        let limit = self.request.checked.max_tokens.or(default)?;
        Some(limit.saturating_sub(self.num_tokens))
    }

    /// The body for this engine, or `None` where that has no means to continue.
    pub(super) fn body(&self, engine: &EngineConfig, kind: EngineKind) -> Option<Bytes> {
        let fields = Fields::parse(&self.request.body).ok()?;
        let changes = self.changes(&fields, engine, kind)?;
        let mut body = Map::new();
        for (name, raw) in fields.iter() {
            if !changes.iter().any(|(changed, _)| *changed == name) {
                body.insert(name.to_owned(), serde_json::from_str(raw.get()).ok()?);
            }
        }
        for (name, value) in changes {
            body.insert(name.to_owned(), value);
        }
        for name in TOKEN_LIMITS {
            let limit = body.get(name).and_then(Value::as_u64);
            if let Some(limit) = limit {
                let left = limit.saturating_sub(self.num_tokens.into());
                body.insert(name.to_owned(), left.into());
            }
        }
        if self.request.route == Route::Completions && !body.contains_key("max_tokens") {
            let left = self.tokens_left(kind);
            body.extend(left.map(|left| ("max_tokens".to_owned(), left.into())));
        }
        serde_json::to_vec(&Value::Object(body))
            .ok()
            .map(Bytes::from)
    }

    /// Whether this engine has means to continue.
    pub(super) fn suits(&self, engine: &EngineConfig, kind: EngineKind) -> bool {
        let fields = Fields::parse(&self.request.body).ok();
        let changes = fields.and_then(|fields| self.changes(&fields, engine, kind));
        changes.is_some()
    }

    /// The fields that carry the answer so far.
    fn changes(
        &self,
        fields: &Fields<'_>,
        engine: &EngineConfig,
        kind: EngineKind,
    ) -> Option<Vec<(&'static str, Value)>> {
        match self.request.route {
            Route::Chat => self.chat(fields, engine.replay, kind),
            Route::Completions => self.completions(fields, engine.replay),
        }
    }

    fn chat(
        &self,
        fields: &Fields<'_>,
        replay: ReplayMeans,
        kind: EngineKind,
    ) -> Option<Vec<(&'static str, Value)>> {
        let is_flagged = match (replay, kind) {
            (ReplayMeans::ContinueFinalMessage, _)
            | (ReplayMeans::Auto, EngineKind::Vllm | EngineKind::Sglang) => true,
            (ReplayMeans::PromptText, _) | (ReplayMeans::Auto, EngineKind::LlamaCpp) => false,
            _ => return None,
        };
        let mut messages: Vec<Value> = fields.read("messages", "").ok()??;
        let goes_on = fields.switch("continue_final_message").ok()? || !is_flagged;
        let last = messages
            .last_mut()
            .filter(|last| goes_on && last["role"] == "assistant");
        if let Some(last) = last {
            // The client's own last message was the beginning of the answer.
            let content = last["content"].as_str()?;
            let joined = format!("{content}{}", self.text);
            last["content"] = joined.into();
        } else {
            messages.push(serde_json::json!({"role": "assistant", "content": self.text}));
        }
        let mut changes = vec![("messages", Value::Array(messages))];
        if is_flagged {
            changes.push(("add_generation_prompt", false.into()));
            changes.push(("continue_final_message", true.into()));
        }
        Some(changes)
    }

    fn completions(
        &self,
        fields: &Fields<'_>,
        replay: ReplayMeans,
    ) -> Option<Vec<(&'static str, Value)>> {
        let prompt: Value = fields.read("prompt", "").ok()??;
        let token_ids = self.token_ids.as_ref();
        let prompt = match prompt {
            Value::String(text)
                if matches!(replay, ReplayMeans::Auto | ReplayMeans::PromptText) =>
            {
                Value::String(text + &self.text)
            }
            Value::Array(mut ids)
                if matches!(replay, ReplayMeans::Auto | ReplayMeans::TokenIds)
                    && ids.first().is_some_and(Value::is_u64) =>
            {
                ids.extend(token_ids?.iter().map(|&id| Value::from(id)));
                Value::Array(ids)
            }
            // A list with one prompt.
            Value::Array(mut prompts) if prompts.len() == 1 && replay != ReplayMeans::None => {
                match &mut prompts[0] {
                    Value::String(text) if replay != ReplayMeans::TokenIds => {
                        text.push_str(&self.text);
                    }
                    Value::Array(ids) if replay != ReplayMeans::PromptText => {
                        ids.extend(token_ids?.iter().map(|&id| Value::from(id)));
                    }
                    _ => return None,
                }
                Value::Array(prompts)
            }
            _ => return None,
        };
        Some(vec![("prompt", prompt)])
    }
}

/// `{"type": "text"}`, which is no grammar.
fn is_text_format(value: &str) -> bool {
    let format: Result<Map<String, Value>, _> = serde_json::from_str(value);
    format.is_ok_and(|format| format.get("type").is_some_and(|kind| kind == "text"))
}

#[cfg(test)]
mod tests;
