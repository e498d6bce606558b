//! Chat answers, whole and as events.

use orchestra_core::{TokenId, step::TokenLogprobs};
use serde::Serialize;

use super::ChatRequest;
use crate::{
    error::ApiError,
    http::{
        choices::{Collected, Source},
        envelope::{Envelope, UsageField},
        logprobs::{ChatLogprobs, Vocabulary},
        sampling::OutputOptions,
        sse::{Events, Format},
        usage::Tally,
    },
    request::Chunk,
    respond::json_body,
};

/// Writes chat answers.
#[derive(Debug)]
pub(in crate::http) struct ChatFormat {
    envelope: Envelope,
    options: OutputOptions,
    n: u32,
    with_logprobs: bool,
    tally: Tally,
}

impl ChatFormat {
    /// For the answer to `request`.
    pub(in crate::http) fn new(request: &ChatRequest) -> Self {
        let ChatRequest { input, options } = request;
        let object = if options.stream {
            "chat.completion.chunk"
        } else {
            "chat.completion"
        };
        Self {
            envelope: Envelope::new("chatcmpl", object, &input.model),
            options: *options,
            n: input.n,
            with_logprobs: input.sampling.logprobs.is_some(),
            tally: Tally::default(),
        }
    }

    fn logprobs<'a>(
        &self,
        vocabulary: &'a dyn Vocabulary,
        token_ids: &[TokenId],
        logprobs: &[TokenLogprobs],
    ) -> Option<ChatLogprobs<'a>> {
        self.with_logprobs
            .then(|| ChatLogprobs::new(vocabulary, token_ids, logprobs))
    }
}

impl<S: Source> Format<S> for ChatFormat {
    fn opening(&mut self, source: &S, events: &mut Events) -> Result<(), ApiError> {
        let prompts = source.prompts();
        self.tally = Tally::new(&prompts, self.n);
        for index in 0..self.n {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(""),
            };
            let choice = ChunkChoice {
                index,
                delta,
                ..ChunkChoice::default()
            };
            let choices = [choice];
            let mut answer = self.envelope.around(&choices);
            answer.usage = UsageField::before_the_end(self.options.include_usage);
            let is_first = index == 0 && self.options.return_token_ids;
            answer.prompt_token_ids = prompts.first().copied().filter(|_| is_first);
            events.push(&answer)?;
        }
        Ok(())
    }

    fn piece(&mut self, chunk: &Chunk, source: &S, events: &mut Events) -> Result<(), ApiError> {
        if let Some(finish) = &chunk.finish {
            self.tally.finished(chunk.index, finish);
        }
        let with_ids = self.options.return_token_ids && !chunk.token_ids.is_empty();
        let has_news = !chunk.text.is_empty() || chunk.finish.is_some() || with_ids;
        if !has_news && chunk.logprobs.is_empty() {
            // Its text is held back: half a character, or perhaps the start of a stop string.
            return Ok(());
        }
        let content = (!chunk.text.is_empty()).then_some(&chunk.text[..]);
        let logprobs = (!chunk.logprobs.is_empty())
            .then(|| self.logprobs(source.vocabulary(), &chunk.token_ids, &chunk.logprobs));
        let choices = [ChunkChoice {
            index: chunk.index,
            delta: Delta {
                content,
                ..Delta::default()
            },
            logprobs: logprobs.flatten(),
            finish_reason: chunk.finish.as_ref().map(|finish| finish.reason.as_str()),
            token_ids: with_ids.then_some(&chunk.token_ids[..]),
        }];
        let mut answer = self.envelope.around(&choices);
        answer.usage = UsageField::before_the_end(self.options.include_usage);
        events.push(&answer)
    }

    fn closing(&mut self, events: &mut Events) -> Result<(), ApiError> {
        if self.options.include_usage {
            let mut answer = self.envelope.around::<ChunkChoice<'_>>(&[]);
            answer.usage = UsageField::Known(self.tally.usage());
            events.push(&answer)?;
        }
        Ok(())
    }

    fn body(&mut self, source: &S, collected: &[Collected]) -> Vec<u8> {
        let prompts = source.prompts();
        self.tally = Tally::new(&prompts, self.n);
        let mut choices = Vec::with_capacity(collected.len());
        for (index, choice) in (0..).zip(collected) {
            if let Some(finish) = &choice.finish {
                self.tally.finished(index, finish);
            }
            choices.push(Choice {
                index,
                message: Message {
                    role: "assistant",
                    content: &choice.text,
                    refusal: None,
                },
                logprobs: self.logprobs(source.vocabulary(), &choice.token_ids, &choice.logprobs),
                finish_reason: choice.finish.as_ref().map(|finish| finish.reason.as_str()),
                token_ids: self
                    .options
                    .return_token_ids
                    .then_some(&choice.token_ids[..]),
            });
        }
        let mut answer = self.envelope.around(&choices);
        answer.usage = UsageField::Known(self.tally.usage());
        answer.prompt_token_ids = prompts
            .first()
            .copied()
            .filter(|_| self.options.return_token_ids);
        json_body(&answer)
    }
}

#[derive(Debug, Serialize)]
struct Choice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Debug, Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Debug, Default, Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Debug, Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt as _;
    use orchestra_core::step::FinishReason;

    use super::*;
    use crate::http::{
        choices::collect,
        sse,
        testing::{Script, last, piece},
    };

    fn request(body: &str) -> ChatRequest {
        let messages = r#""messages": [{"role": "user", "content": "x"}]"#;
        ChatRequest::parse(format!(r#"{{"model": "demo", {messages}{body}}}"#).as_bytes()).unwrap()
    }

    /// A format whose identity does not change from run to run.
    fn format(request: &ChatRequest) -> ChatFormat {
        let mut format = ChatFormat::new(request);
        format.envelope.fix_identity("chatcmpl-0");
        format
    }

    async fn events(request: &ChatRequest, source: Script) -> String {
        let format = format(request);
        let keep_alive = Duration::from_secs(15);
        let response = sse::respond(async { Ok(source) }, format, keep_alive).await;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_stream_of_events() {
        let items = [
            Ok(piece(0, "he", false)),
            // A token whose text is held back.
            Ok(Chunk {
                token_ids: vec![3],
                ..Chunk::default()
            }),
            Ok(piece(0, "llo", false)),
            Ok(last(0, FinishReason::Stop, 6)),
        ];
        let source = Script {
            prompts: vec![(0..20).collect()],
            items: items.into(),
        };
        let request = request(r#", "stream": true, "stream_options": {"include_usage": true}"#);
        insta::assert_snapshot!(events(&request, source).await);
    }

    #[tokio::test]
    async fn a_stream_with_logprobs_token_ids_and_two_choices() {
        let items = [
            Ok(piece(1, "b", true)),
            Ok(piece(0, "a", true)),
            Ok(last(0, FinishReason::Length, 1)),
            Ok(last(1, FinishReason::Stop, 1)),
        ];
        let source = Script {
            prompts: vec![vec![7, 8]],
            items: items.into(),
        };
        let body = r#", "stream": true, "n": 2, "logprobs": true, "return_token_ids": true"#;
        insta::assert_snapshot!(events(&request(body), source).await);
    }

    #[tokio::test]
    async fn one_body() {
        let items = [
            Ok(piece(1, "b", true)),
            Ok(piece(0, "a", true)),
            Ok(last(1, FinishReason::Stop, 1)),
            Ok(piece(0, "c", true)),
            Ok(last(0, FinishReason::Length, 2)),
        ];
        let mut source = Script {
            prompts: vec![(0..20).collect()],
            items: items.into(),
        };
        let request = request(r#", "n": 2, "logprobs": true, "return_token_ids": true"#);
        let collected = collect(&mut source, 2).await.unwrap();
        let body = format(&request).body(&source, &collected);
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        insta::assert_snapshot!(serde_json::to_string_pretty(&value).unwrap());
    }

    #[tokio::test]
    async fn a_choice_without_an_end_is_an_error_and_not_a_short_answer() {
        let mut source = Script {
            prompts: vec![vec![0]],
            items: [Ok(piece(0, "a", false))].into(),
        };
        let error = collect(&mut source, 1).await.unwrap_err();
        assert_eq!(error.code, orchestra_core::ErrorCode::Internal);
    }
}
