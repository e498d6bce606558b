//! Completion answers, whole and as events.

use std::borrow::Cow;

use orchestra_core::{TokenId, step::TokenLogprobs};
use serde::Serialize;

use super::CompletionRequest;
use crate::{
    error::ApiError,
    http::{
        choices::{Collected, Source},
        envelope::{Envelope, UsageField},
        logprobs::{CompletionLogprobs, Vocabulary},
        sampling::OutputOptions,
        sse::{Events, Format},
        usage::Tally,
    },
    request::{Chunk, Prompt},
    respond::json_body,
};

/// Writes completion answers.
#[derive(Debug)]
pub(in crate::http) struct CompletionFormat {
    envelope: Envelope,
    options: OutputOptions,
    n: u32,
    with_logprobs: bool,
    /// Per prompt, its text as it was given; `None` where it came as token ids. Empty without `echo`.
    echoes: Vec<Option<String>>,
    tally: Tally,
    /// Per choice, where the next token's text begins, in characters.
    offsets: Vec<usize>,
}

impl CompletionFormat {
    /// For the answer to `request`.
    pub(in crate::http) fn new(request: &CompletionRequest) -> Self {
        let CompletionRequest {
            inputs,
            options,
            echo,
        } = request;
        let echoed = if *echo { &inputs[..] } else { &[] };
        let echoes = echoed.iter().map(|input| match &input.prompt {
            Prompt::Text(text) => Some(text.clone()),
            Prompt::TokenIds(_) | Prompt::Chat { .. } => None,
        });
        let first = inputs.first();
        Self {
            // OpenAI gives a completion's events the same name as the whole.
            envelope: Envelope::new(
                "cmpl",
                "text_completion",
                first.map_or("", |input| &input.model),
            ),
            options: *options,
            n: first.map_or(1, |input| input.n),
            with_logprobs: first.is_some_and(|input| input.sampling.logprobs.is_some()),
            echoes: echoes.collect(),
            tally: Tally::default(),
            offsets: Vec::new(),
        }
    }

    fn start(&mut self, source: &impl Source) {
        let prompts = source.prompts();
        self.tally = Tally::new(&prompts, self.n);
        self.offsets = vec![0; prompts.len() * self.n as usize];
    }

    /// What `echo` puts before a choice.
    fn echo(&self, index: u32, source: &impl Source) -> Option<String> {
        let prompt = (index / self.n) as usize;
        match self.echoes.get(prompt)? {
            Some(text) => Some(text.clone()),
            None => Some(decode(source.prompts().get(prompt)?, source.vocabulary())),
        }
    }

    fn logprobs(
        &mut self,
        index: u32,
        vocabulary: &dyn Vocabulary,
        token_ids: &[TokenId],
        logprobs: &[TokenLogprobs],
    ) -> Option<CompletionLogprobs> {
        let offset = self.offsets.get_mut(index as usize)?;
        self.with_logprobs
            .then(|| CompletionLogprobs::new(vocabulary, token_ids, logprobs, offset))
    }

    fn event(&self, choices: &[Choice<'_>], events: &mut Events) -> Result<(), ApiError> {
        let mut answer = self.envelope.around(choices);
        answer.usage = UsageField::before_the_end(self.options.include_usage);
        events.push(&answer)
    }
}

/// Token ids as text, special tokens by their name.
fn decode(token_ids: &[TokenId], vocabulary: &dyn Vocabulary) -> String {
    let bytes: Vec<u8> = token_ids
        .iter()
        .flat_map(|&id| vocabulary.bytes(id))
        .copied()
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl<S: Source> Format<S> for CompletionFormat {
    fn opening(&mut self, source: &S, events: &mut Events) -> Result<(), ApiError> {
        self.start(source);
        let prompts = source.prompts();
        for index in 0..self.offsets.len() as u32 {
            let echo = self.echo(index, source);
            let prompt = prompts.get((index / self.n) as usize).copied();
            if echo.is_none() && !self.options.return_token_ids {
                continue;
            }
            let choice = Choice {
                index,
                text: Cow::Owned(echo.unwrap_or_default()),
                prompt_token_ids: prompt.filter(|_| self.options.return_token_ids),
                ..Choice::default()
            };
            self.event(&[choice], events)?;
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
        let (ids, logprobs) = (&chunk.token_ids, &chunk.logprobs);
        let logprobs = if logprobs.is_empty() {
            None
        } else {
            self.logprobs(chunk.index, source.vocabulary(), ids, logprobs)
        };
        let choice = Choice {
            index: chunk.index,
            text: Cow::Borrowed(&chunk.text),
            logprobs,
            finish_reason: chunk.finish.as_ref().map(|finish| finish.reason.as_str()),
            token_ids: with_ids.then_some(&ids[..]),
            prompt_token_ids: None,
        };
        self.event(&[choice], events)
    }

    fn closing(&mut self, events: &mut Events) -> Result<(), ApiError> {
        if self.options.include_usage {
            let mut answer = self.envelope.around::<Choice<'_>>(&[]);
            answer.usage = UsageField::Known(self.tally.usage());
            events.push(&answer)?;
        }
        Ok(())
    }

    fn body(&mut self, source: &S, collected: &[Collected]) -> Vec<u8> {
        self.start(source);
        let prompts = source.prompts();
        let mut choices = Vec::with_capacity(collected.len());
        for (index, choice) in (0..).zip(collected) {
            if let Some(finish) = &choice.finish {
                self.tally.finished(index, finish);
            }
            let (ids, logprobs) = (&choice.token_ids, &choice.logprobs);
            let prompt = prompts.get((index / self.n) as usize).copied();
            choices.push(Choice {
                index,
                text: self
                    .echo(index, source)
                    .map_or(Cow::Borrowed(&choice.text), |echo| {
                        Cow::Owned(echo + &choice.text)
                    }),
                logprobs: self.logprobs(index, source.vocabulary(), ids, logprobs),
                finish_reason: choice.finish.as_ref().map(|finish| finish.reason.as_str()),
                token_ids: self.options.return_token_ids.then_some(&ids[..]),
                prompt_token_ids: prompt.filter(|_| self.options.return_token_ids),
            });
        }
        let mut answer = self.envelope.around(&choices);
        answer.usage = UsageField::Known(self.tally.usage());
        json_body(&answer)
    }
}

#[derive(Debug, Default, Serialize)]
struct Choice<'a> {
    index: u32,
    text: Cow<'a, str>,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
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

    fn request(body: &str) -> CompletionRequest {
        CompletionRequest::parse(format!(r#"{{"model": "demo", {body}}}"#).as_bytes()).unwrap()
    }

    fn format(request: &CompletionRequest) -> CompletionFormat {
        let mut format = CompletionFormat::new(request);
        format.envelope.fix_identity("cmpl-0");
        format
    }

    async fn events(request: &CompletionRequest, source: Script) -> String {
        let format = format(request);
        let keep_alive = Duration::from_secs(15);
        let response = sse::respond(async { Ok(source) }, format, keep_alive).await;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_stream_of_events() {
        let items = [
            Ok(piece(0, "he", true)),
            Ok(piece(0, "llo", true)),
            Ok(last(0, FinishReason::Length, 5)),
        ];
        let source = Script {
            prompts: vec![(0..20).collect()],
            items: items.into(),
        };
        let body = r#""prompt": "x", "stream": true, "logprobs": 1, "return_token_ids": true,
                      "stream_options": {"include_usage": true}"#;
        insta::assert_snapshot!(events(&request(body), source).await);
    }

    #[tokio::test]
    async fn an_echo_comes_first_as_it_was_given_or_decoded() {
        let items = [
            Ok(last(0, FinishReason::Stop, 0)),
            Ok(last(1, FinishReason::Stop, 0)),
        ];
        let source = Script {
            prompts: vec![vec![7, 8], vec![9]],
            items: items.into(),
        };
        let body = r#""prompt": [[7, 8], [9]], "stream": true, "echo": true"#;
        insta::assert_snapshot!(events(&request(body), source).await);
        assert_eq!(
            format(&request(r#""prompt": "hé", "echo": true"#)).echoes,
            [Some("hé".into())]
        );
    }

    #[tokio::test]
    async fn one_body_for_two_prompts_of_two_choices() {
        let items = (0..4).flat_map(|index| {
            [
                Ok(piece(index, "ab", true)),
                Ok(last(index, FinishReason::Stop, 2)),
            ]
        });
        let prompts = vec![(0..20).collect(), (0..30).collect()];
        let mut source = Script {
            prompts,
            items: items.collect(),
        };
        let request = request(r#""prompt": ["x", "y"], "n": 2, "logprobs": 1, "echo": false"#);
        let collected = collect(&mut source, 4).await.unwrap();
        let body = format(&request).body(&source, &collected);
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        insta::assert_snapshot!(serde_json::to_string_pretty(&value).unwrap());
    }
}
