//! What a request's prefix is: its tokens, where the model's files are here and say how its engines tokenise, else its
//! text. The body goes to the engine as it is either way.

use std::time::SystemTime;

use orchestra_core::TokenId;
use serde_json::Value;

use super::read::{RelayRequest, Route};
use crate::{
    http::{chat, fields::Fields},
    models::ModelText,
    request::Prompt,
    state::RouterState,
    text::template::Conversation,
};

/// Prompts up to this size are tokenised where they arrive: that takes under about half a millisecond.
const INLINE_BYTES_MAX: usize = 1024;
/// Longer ones count as text: tokenising them would take longer than it saves.
const TOKENISED_BYTES_MAX: usize = 4 << 20;
/// Fields that make an engine write the prompt in a way of its own.
const UNKNOWN_FIELDS: [&str; 4] = [
    "chat_template",
    "continue_final_message",
    "documents",
    "mm_processor_kwargs",
];

/// The prompt of a body that was checked, if it is one that can be tokenised here.
pub(super) fn prompt(route: Route, fields: &Fields<'_>) -> Option<Prompt> {
    let raw = fields.raw(route.prompt_field())?;
    if raw.get().len() > TOKENISED_BYTES_MAX {
        return None;
    }
    match route {
        Route::Chat => chat_prompt(fields),
        Route::Completions => completion_prompt(raw.get()),
    }
}

fn chat_prompt(fields: &Fields<'_>) -> Option<Prompt> {
    if UNKNOWN_FIELDS.iter().any(|name| fields.raw(name).is_some()) {
        return None;
    }
    let value = |name| fields.read::<Value>(name, "JSON").ok().flatten();
    let mut template_kwargs = match value("chat_template_kwargs") {
        Some(Value::Object(kwargs)) => kwargs,
        _ => serde_json::Map::new(),
    };
    if let Some(adds) = value("add_generation_prompt") {
        template_kwargs.insert("add_generation_prompt".to_owned(), adds);
    }
    let tools = match (value("tools"), value("tool_choice")) {
        (_, Some(choice)) if choice == "none" => Vec::new(),
        (Some(Value::Array(tools)), _) => tools,
        _ => Vec::new(),
    };
    Some(Prompt::Chat {
        messages: chat::messages_of(fields.raw("messages")?).ok()?,
        tools,
        template_kwargs,
    })
}

/// Of several prompts the first: they go to one engine together.
fn completion_prompt(raw: &str) -> Option<Prompt> {
    let first = match serde_json::from_str(raw).ok()? {
        Value::Array(mut prompts) if prompts.first().is_some_and(|it| !it.is_number()) => {
            prompts.swap_remove(0)
        }
        prompt => prompt,
    };
    match first {
        Value::String(text) => Some(Prompt::Text(text)),
        ids @ Value::Array(_) => serde_json::from_value(ids).ok().map(Prompt::TokenIds),
        _ => None,
    }
}

impl RelayRequest {
    /// Finds out the tokens of the prompt, where that can be done. Where it cannot, its text stays its prefix, which
    /// finds nothing among tokens: a miss.
    pub(super) async fn tokenised(mut self, state: &RouterState) -> Self {
        let (Some(text), Some(prompt)) = (self.model.text.get().cloned(), self.prompt.take())
        else {
            return self;
        };
        let token_ids = if self.key.len() * size_of::<u32>() <= INLINE_BYTES_MAX {
            encode(&text, &prompt)
        } else {
            let encoding = state.tasks.run_blocking(move || encode(&text, &prompt));
            encoding.await.ok().flatten()
        };
        if let Some(token_ids) = token_ids.filter(|token_ids| !token_ids.is_empty()) {
            self.key = token_ids;
        }
        self
    }
}

fn encode(text: &ModelText, prompt: &Prompt) -> Option<Vec<TokenId>> {
    match prompt {
        Prompt::TokenIds(token_ids) => Some(token_ids.clone()),
        Prompt::Text(prompt) => text.tokenizer().encode(prompt, true).ok(),
        Prompt::Chat {
            messages,
            tools,
            template_kwargs,
        } => {
            let conversation = Conversation {
                messages,
                tools,
                template_kwargs,
            };
            let template = text.template().ok()?;
            let rendered = template.render(&conversation, SystemTime::now()).ok()?;
            text.tokenizer().encode(&rendered, false).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;

    fn prompt_of(route: Route, body: &Value) -> Option<Prompt> {
        let body = Bytes::from(body.to_string());
        prompt(route, &Fields::parse(&body).unwrap())
    }

    #[test]
    fn chats_are_read_as_an_engine_reads_them() {
        let messages = json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
        let body = json!({"model": "m", "messages": messages, "tools": [{"type": "function"}],
            "add_generation_prompt": false, "chat_template_kwargs": {"think": true}});
        let Some(Prompt::Chat {
            messages,
            tools,
            template_kwargs,
        }) = prompt_of(Route::Chat, &body)
        else {
            panic!("no chat")
        };
        assert_eq!(messages, [json!({"role": "user", "content": "hi"})]);
        assert_eq!(tools.len(), 1);
        assert_eq!(
            Value::Object(template_kwargs),
            json!({"add_generation_prompt": false, "think": true})
        );
    }

    #[test]
    fn what_an_engine_writes_in_its_own_way_is_not_tokenised() {
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
        let plain = json!([{"role": "user", "content": "hi"}]);
        for body in [
            json!({"messages": image}),
            json!({"messages": plain, "continue_final_message": true}),
            json!({"messages": plain, "chat_template": "x"}),
        ] {
            assert!(prompt_of(Route::Chat, &body).is_none(), "{body}");
        }
    }

    #[test]
    fn every_form_of_a_completion_s_prompt_is_read() {
        let of = |prompt: Value| prompt_of(Route::Completions, &json!({"prompt": prompt}));
        assert!(matches!(of(json!("a")), Some(Prompt::Text(text)) if text == "a"));
        assert!(matches!(of(json!(["a", "b"])), Some(Prompt::Text(text)) if text == "a"));
        assert!(matches!(of(json!([1, 2])), Some(Prompt::TokenIds(ids)) if ids == [1, 2]));
        assert!(matches!(of(json!([[1, 2], [3]])), Some(Prompt::TokenIds(ids)) if ids == [1, 2]));
        assert!(of(json!([{"prompt_embeds": "x"}])).is_none());
    }
}
