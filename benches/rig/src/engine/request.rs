//! What a generation request asks for.

use std::borrow::Cow;

use serde::Deserialize;

use super::{EngineConfig, Kind, answer::Answer};
use crate::words::{self, count_ids};

/// Choices of one request at most.
const MAX_CHOICES: u32 = 128;

/// The body, with the fields that the mock reads.
#[derive(Debug, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "OpenAI's fields are what they are"
)]
pub(super) struct Body<'a> {
    #[serde(borrow)]
    model: Option<Cow<'a, str>>,
    #[serde(borrow)]
    messages: Option<Vec<Message<'a>>>,
    #[serde(borrow)]
    prompt: Option<Prompt<'a>>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    #[serde(default)]
    stream: bool,
    n: Option<u32>,
    seed: Option<u64>,
    #[serde(borrow)]
    stop: Option<Stop<'a>>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<Logprobs>,
    #[serde(default)]
    return_token_ids: bool,
    #[serde(default)]
    ignore_eos: bool,
    #[serde(default)]
    continue_final_message: bool,
    add_generation_prompt: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    content: Option<Content<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content<'a> {
    #[serde(borrow)]
    Text(Cow<'a, str>),
    Parts(#[serde(borrow)] Vec<Part<'a>>),
}

#[derive(Debug, Deserialize)]
struct Part<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt<'a> {
    #[serde(borrow)]
    Text(Cow<'a, str>),
    Ids(Vec<u32>),
    Texts(#[serde(borrow)] [Cow<'a, str>; 1]),
    IdLists([Vec<u32>; 1]),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop<'a> {
    #[serde(borrow)]
    One(Cow<'a, str>),
    Many(#[serde(borrow)] Vec<Cow<'a, str>>),
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// A flag in chat, a number in completions; the mock gives one alternative to each token in either.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Logprobs {
    Flag(bool),
    Count(#[expect(dead_code, reason = "its presence is what counts")] u32),
}

/// A request that will be answered.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a field of the request"
)]
pub(super) struct Generation {
    pub(super) is_chat: bool,
    pub(super) streams: bool,
    pub(super) include_usage: bool,
    pub(super) logprobs: bool,
    pub(super) token_ids: bool,
    /// The text before the answer, with what a continuation brought of it.
    pub(super) prompt: Vec<u8>,
    /// Of that, the bytes that are no part of the answer.
    pub(super) asked_bytes: usize,
    pub(super) prompt_tokens: usize,
    pub(super) choices: Vec<Answer>,
}

/// Why a request is answered with an error: status and message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) u16, pub(super) String);

fn bad(message: impl Into<String>) -> Refusal {
    Refusal(400, message.into())
}

impl Generation {
    /// Reads a body as the engine of this kind would.
    pub(super) fn parse(
        config: &EngineConfig,
        is_chat: bool,
        json: &[u8],
    ) -> Result<Self, Refusal> {
        let body: Body<'_> =
            serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
        if config.kind == Kind::Vllm
            && body
                .model
                .as_deref()
                .is_some_and(|model| model != config.model)
        {
            return Err(Refusal(404, "The model does not exist.".to_owned()));
        }
        let n = body.n.unwrap_or(1);
        if n == 0 || n > MAX_CHOICES {
            return Err(bad(format!("n must be from 1 to {MAX_CHOICES}")));
        }
        let (prompt, may_continue) = body.prompt(config.kind, is_chat)?;
        let seed = body.seed.unwrap_or(0);
        let of_first = |asked: &[u8]| words::key(asked, seed, 0);
        let (asked_bytes, progress) = if may_continue {
            let (asked, progress) = words::split(&prompt, of_first);
            (asked.len(), progress)
        } else {
            (prompt.len(), words::Progress::default())
        };
        if n > 1 && progress != words::Progress::default() {
            return Err(bad("n must be 1 where an answer is continued"));
        }
        let prompt_tokens = count_ids(asked_bytes) + progress.words as usize;
        let max_tokens = body.max_tokens(config, prompt_tokens)?;
        let natural = if body.ignore_eos {
            words::MAX_WORDS
        } else {
            config.words
        };
        let stops = body.stops();
        let choices = (0..n).map(|choice| {
            let key = words::key(&prompt[..asked_bytes], seed, choice);
            Answer::new(key, progress, (max_tokens, natural), stops.clone())
        });
        Ok(Self {
            is_chat,
            streams: body.stream,
            include_usage: body
                .stream_options
                .is_some_and(|options| options.include_usage),
            logprobs: !matches!(body.logprobs, None | Some(Logprobs::Flag(false))),
            token_ids: body.return_token_ids && config.kind == Kind::Vllm,
            choices: choices.collect(),
            asked_bytes,
            prompt_tokens,
            prompt,
        })
    }

    /// Whether the request carried the beginning of an answer.
    pub(super) fn is_continuation(&self) -> bool {
        self.asked_bytes < self.prompt.len()
    }

    /// The prompt as ids: text in threes, words as their own.
    pub(super) fn prompt_token_ids(&self, choices: &[Answer]) -> Vec<u32> {
        let mut ids = words::ids_of_text(&self.prompt[..self.asked_bytes]);
        if let Some(answer) = choices.first() {
            ids.extend(answer.ids_before());
        }
        ids
    }
}

impl Body<'_> {
    /// The text before the answer, and whether the answer may have begun in it.
    fn prompt(&self, kind: Kind, is_chat: bool) -> Result<(Vec<u8>, bool), Refusal> {
        if is_chat {
            return self.conversation(kind);
        }
        let ids = match self
            .prompt
            .as_ref()
            .ok_or_else(|| bad("prompt is missing"))?
        {
            Prompt::Text(text) | Prompt::Texts([text]) => {
                return Ok((text.as_bytes().to_vec(), true));
            }
            Prompt::Ids(ids) | Prompt::IdLists([ids]) => ids,
        };
        if kind == Kind::Plain {
            return Err(bad("prompt must be a string"));
        }
        let text = words::text_of_ids(ids)
            .map_err(|place| bad(format!("prompt[{place}] is no id of the vocabulary")))?;
        Ok((text, true))
    }

    /// The messages as a template would write them; [`crate::words`] says whose readers depend on it.
    fn conversation(&self, kind: Kind) -> Result<(Vec<u8>, bool), Refusal> {
        let messages = self
            .messages
            .as_deref()
            .ok_or_else(|| bad("messages is missing"))?;
        let (last, before) = messages
            .split_last()
            .ok_or_else(|| bad("messages is empty"))?;
        let asks = self.continue_final_message;
        let continues = last.role == "assistant"
            && match kind {
                Kind::Vllm | Kind::Sglang => asks,
                Kind::LlamaCpp => true,
                Kind::Plain => false,
            };
        if kind == Kind::Vllm && asks && self.add_generation_prompt != Some(false) {
            return Err(bad(
                "continue_final_message needs add_generation_prompt to be false",
            ));
        }
        let mut text = Vec::new();
        for message in if continues { before } else { messages } {
            text.extend_from_slice(format!("<|{}|>", message.role).as_bytes());
            message.write(&mut text);
            text.push(b'\n');
        }
        text.extend_from_slice(b"<|assistant|>");
        if continues {
            last.write(&mut text);
        }
        Ok((text, continues))
    }

    fn max_tokens(&self, config: &EngineConfig, prompt_tokens: usize) -> Result<u32, Refusal> {
        let room = (config.max_model_len as usize).saturating_sub(prompt_tokens) as u32;
        let asked = self.max_completion_tokens.or(self.max_tokens);
        if asked == Some(0) {
            return Err(bad("max_tokens must be at least 1"));
        }
        if room == 0 || asked.is_some_and(|asked| asked > room) {
            return Err(bad(format!(
                "This model's maximum context length is {} tokens; the prompt has {prompt_tokens}",
                config.max_model_len
            )));
        }
        Ok(asked.unwrap_or(room))
    }

    fn stops(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.to_string()],
            Some(Stop::Many(stops)) => stops.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Message<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        match &self.content {
            None => {}
            Some(Content::Text(text)) => out.extend_from_slice(text.as_bytes()),
            Some(Content::Parts(parts)) => {
                for part in parts {
                    out.extend_from_slice(part.text.as_deref().unwrap_or_default().as_bytes());
                }
            }
        }
    }
}
