//! Answers as OpenAI's JSON, written by hand: the mock shares a core with the load generator.

use std::io::Write as _;

use super::{Engine, answer::Piece, request::Generation};

/// What every event of one answer repeats.
pub(super) struct Render {
    is_chat: bool,
    logprobs: bool,
    token_ids: bool,
    /// `{"id":…,"object":…,"created":…,"model":…`.
    opening: String,
}

/// Tokens of one request, for `usage`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    /// Of the prompt, those that the prefix cache had.
    pub(super) cached: usize,
    pub(super) completion: usize,
}

impl Render {
    pub(super) fn new(generation: &Generation, engine: &Engine, number: u64) -> Self {
        let (prefix, object) = match (generation.is_chat, generation.streams) {
            (true, true) => ("chatcmpl", "chat.completion.chunk"),
            (true, false) => ("chatcmpl", "chat.completion"),
            (false, _) => ("cmpl", "text_completion"),
        };
        let model = quoted(engine.config.model.as_bytes());
        let (created, fingerprint) = (engine.created, &engine.fingerprint);
        Self {
            is_chat: generation.is_chat,
            logprobs: generation.logprobs,
            token_ids: generation.token_ids,
            opening: format!(
                r#"{{"id":"{prefix}-{number:016x}","object":"{object}","created":{created},"model":{model},"system_fingerprint":"{fingerprint}""#
            ),
        }
    }

    /// The first event of a chat choice: its role, and the prompt's ids where they were asked for.
    pub(super) fn role_event(&self, out: &mut Vec<u8>, choice: usize, prompt_ids: Option<&[u32]>) {
        let _ = write!(out, "data: {}", self.opening);
        if let Some(ids) = prompt_ids {
            let _ = write!(out, r#","prompt_token_ids":{ids:?}"#);
        }
        let delta = r#""delta":{"role":"assistant","content":""}"#;
        let _ = write!(
            out,
            r#","choices":[{{"index":{choice},{delta},"logprobs":null,"finish_reason":null}}]}}"#
        );
        out.extend_from_slice(b"\n\n");
    }

    /// The event of one word, or of some.
    pub(super) fn event(&self, out: &mut Vec<u8>, choice: usize, pieces: &[Piece]) {
        let _ = write!(
            out,
            r#"data: {},"choices":[{{"index":{choice},"#,
            self.opening
        );
        self.text(out, "delta", &text_of(pieces));
        self.ending(out, pieces);
        out.extend_from_slice(b"]}\n\n");
    }

    /// The last event before `[DONE]` where usage was asked for.
    pub(super) fn usage_event(&self, out: &mut Vec<u8>, usage: Usage) {
        let _ = write!(out, r#"data: {},"choices":[],"#, self.opening);
        usage.write(out);
        out.extend_from_slice(b"}\n\n");
    }

    /// A whole answer.
    pub(super) fn body(&self, choices: &[Vec<Piece>], prompt_ids: &[u32], usage: Usage) -> Vec<u8> {
        let mut out = self.opening.clone().into_bytes();
        if self.token_ids && self.is_chat {
            let _ = write!(out, r#","prompt_token_ids":{prompt_ids:?}"#);
        }
        out.extend_from_slice(br#","choices":["#);
        for (index, pieces) in choices.iter().enumerate() {
            let text = text_of(pieces);
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(out, r#"{comma}{{"index":{index},"#);
            self.text(&mut out, "message", &text);
            if self.token_ids && !self.is_chat {
                let _ = write!(out, r#","prompt_token_ids":{prompt_ids:?}"#);
            }
            self.ending(&mut out, pieces);
        }
        out.extend_from_slice(b"],");
        usage.write(&mut out);
        out.push(b'}');
        out
    }

    /// The text of a choice; a chat's is inside `holder`.
    fn text(&self, out: &mut Vec<u8>, holder: &str, text: &str) {
        let _ = if self.is_chat {
            let role = if holder == "message" {
                r#""role":"assistant","#
            } else {
                ""
            };
            write!(out, r#""{holder}":{{{role}"content":{text}}}"#)
        } else {
            write!(out, r#""text":{text}"#)
        };
    }

    /// What follows the text in a choice, and its closing brace.
    fn ending(&self, out: &mut Vec<u8>, pieces: &[Piece]) {
        if self.token_ids {
            let ids: Vec<u32> = pieces.iter().map(|piece| piece.id).collect();
            let _ = write!(out, r#","token_ids":{ids:?}"#);
        }
        out.extend_from_slice(br#","logprobs":"#);
        if self.logprobs {
            self.logprobs(out, pieces);
        } else {
            out.extend_from_slice(b"null");
        }
        let _ = match pieces.last().and_then(|piece| piece.finish) {
            Some(finish) => write!(out, r#","finish_reason":"{finish}"}}"#),
            None => write!(out, r#","finish_reason":null}}"#),
        };
    }

    fn logprobs(&self, out: &mut Vec<u8>, pieces: &[Piece]) {
        let list = |entry: &dyn Fn(&Piece) -> String| {
            pieces.iter().map(entry).collect::<Vec<_>>().join(",")
        };
        let token = |piece: &Piece| quoted(piece.text.as_bytes());
        let _ = if self.is_chat {
            let entries = list(&|piece| {
                let one = format!(
                    r#""token":{},"logprob":{:.4},"bytes":{:?}"#,
                    token(piece),
                    logprob(piece),
                    piece.text.as_bytes()
                );
                format!(r#"{{{one},"top_logprobs":[{{{one}}}]}}"#)
            });
            write!(out, r#"{{"content":[{entries}]}}"#)
        } else {
            write!(
                out,
                r#"{{"tokens":[{}],"token_logprobs":[{}],"top_logprobs":[{}],"text_offset":[{}]}}"#,
                list(&token),
                list(&|piece| format!("{:.4}", logprob(piece))),
                list(&|piece| format!("{{{}:{:.4}}}", token(piece), logprob(piece))),
                list(&|piece| (piece.index * 9).to_string()),
            )
        };
    }
}

impl Usage {
    fn write(self, out: &mut Vec<u8>) {
        let Self {
            prompt,
            cached,
            completion,
        } = self;
        let total = prompt + completion;
        let _ = write!(
            out,
            r#""usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{total}"#
        );
        let _ = write!(
            out,
            r#","prompt_tokens_details":{{"cached_tokens":{cached}}}}}"#
        );
    }
}

/// What pieces say, as a JSON string.
fn text_of(pieces: &[Piece]) -> String {
    let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
    quoted(text.as_bytes())
}

/// Between 0 and -1, and the same whenever the word is said.
fn logprob(piece: &Piece) -> f64 {
    -f64::from(piece.id & 0xff) / 256.0
}

/// Text as a JSON string. Cannot fail: bytes that are no UTF-8 are replaced.
pub(super) fn quoted(text: &[u8]) -> String {
    serde_json::Value::from(String::from_utf8_lossy(text)).to_string()
}

/// An error in OpenAI's shape.
pub(super) fn error(status: u16, message: &str) -> Vec<u8> {
    let kind = if status < 500 {
        "BadRequestError"
    } else {
        "InternalServerError"
    };
    let message = quoted(message.as_bytes());
    format!(r#"{{"error":{{"message":{message},"type":"{kind}","param":null,"code":{status}}}}}"#)
        .into_bytes()
}
