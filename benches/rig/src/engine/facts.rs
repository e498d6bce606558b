//! What an engine says about itself, and the tokeniser's routes.

use serde::Deserialize;

use super::{Engine, Kind, render::quoted};
use crate::words;

/// Status and JSON body.
pub(super) type Fact = (u16, Vec<u8>);

#[derive(Deserialize)]
struct Tokenize {
    prompt: String,
}

#[derive(Deserialize)]
struct Detokenize {
    tokens: Vec<u32>,
}

impl Engine {
    /// The answer to a `GET` that is none of `/_control`; `None` where this kind has no such route.
    pub(super) fn fact(&self, path: &str) -> Option<Fact> {
        let kind = self.config.kind;
        let model = quoted(self.config.model.as_bytes());
        let json = match (path, kind) {
            ("/v1/models", _) => self.models(&model),
            ("/health", Kind::Vllm | Kind::Sglang) | ("/health_generate", Kind::Sglang) => {
                String::new()
            }
            ("/health", Kind::LlamaCpp) => r#"{"status":"ok"}"#.to_owned(),
            ("/version", Kind::Vllm) => r#"{"version":"0.11.0"}"#.to_owned(),
            ("/get_model_info" | "/model_info", Kind::Sglang) => {
                format!(r#"{{"model_path":{model},"is_generation":true}}"#)
            }
            ("/get_server_info" | "/server_info", Kind::Sglang) => {
                format!(r#"{{"model_path":{model},"served_model_name":{model},"version":"0.5.0"}}"#)
            }
            ("/props", Kind::LlamaCpp) => {
                let context = self.config.max_model_len;
                format!(
                    r#"{{"default_generation_settings":{{"n_ctx":{context}}},"model_path":{model},"build_info":"b6000"}}"#
                )
            }
            _ => return None,
        };
        Some((200, json.into_bytes()))
    }

    fn models(&self, model: &str) -> String {
        let (context, created) = (self.config.max_model_len, self.created);
        let (owner, more) = match self.config.kind {
            Kind::Vllm => (
                "vllm",
                format!(r#","root":{model},"max_model_len":{context}"#),
            ),
            Kind::Sglang => (
                "sglang",
                format!(r#","root":{model},"max_model_len":{context}"#),
            ),
            Kind::LlamaCpp => (
                "llamacpp",
                format!(r#","meta":{{"n_ctx_train":{context}}}"#),
            ),
            Kind::Plain => ("someone", String::new()),
        };
        format!(
            r#"{{"object":"list","data":[{{"id":{model},"object":"model","created":{created},"owned_by":"{owner}"{more}}}]}}"#
        )
    }

    /// `POST /tokenize` and `/detokenize`; `None` where this kind has no such route.
    pub(super) fn tokeniser(&self, path: &str, body: &[u8]) -> Option<Fact> {
        let has_one = matches!(self.config.kind, Kind::Vllm | Kind::Sglang);
        let answer = match path {
            "/tokenize" if has_one => tokenize(body, self.config.max_model_len),
            "/detokenize" if has_one => detokenize(body),
            _ => return None,
        };
        Some(answer.map_or_else(
            |message| (400, super::render::error(400, &message)),
            |json| (200, json.into_bytes()),
        ))
    }
}

fn tokenize(body: &[u8], max_model_len: u32) -> Result<String, String> {
    let asked: Tokenize = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let ids = words::ids_of_text(asked.prompt.as_bytes());
    Ok(format!(
        r#"{{"count":{},"max_model_len":{max_model_len},"tokens":{ids:?}}}"#,
        ids.len()
    ))
}

fn detokenize(body: &[u8]) -> Result<String, String> {
    let asked: Detokenize = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let text = words::text_of_ids(&asked.tokens)
        .map_err(|place| format!("tokens[{place}] is no id of the vocabulary"))?;
    Ok(format!(r#"{{"prompt":{}}}"#, quoted(&text)))
}
