//! Log-probabilities in OpenAI's two shapes: a list of objects for chat, parallel lists for completions. They are finite
//! here: the corridor shows those of tokens that cannot come as -9999, as OpenAI does.

use std::collections::HashSet;

use orchestra_core::{TokenId, step::TokenLogprobs};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::models::ModelEntry;

/// The model's tokens as text.
pub(super) trait Vocabulary: Send + Sync {
    /// The token's text; half characters show as U+FFFD.
    fn text(&self, token_id: TokenId) -> String;
    /// The bytes that the token adds to the text.
    fn bytes(&self, token_id: TokenId) -> &[u8];
}

impl Vocabulary for ModelEntry {
    fn text(&self, token_id: TokenId) -> String {
        self.decode_token(token_id)
    }

    fn bytes(&self, token_id: TokenId) -> &[u8] {
        self.token_bytes(token_id)
    }
}

/// `choices[].logprobs` of chat.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken<'a> {
    #[serde(flatten)]
    drawn: Token<'a>,
    top_logprobs: Vec<Token<'a>>,
}

#[derive(Debug, Serialize)]
struct Token<'a> {
    #[serde(rename = "token")]
    text: String,
    logprob: f32,
    bytes: &'a [u8],
}

impl<'a> Token<'a> {
    fn new(vocabulary: &'a dyn Vocabulary, token_id: TokenId, logprob: f32) -> Self {
        let (text, bytes) = (vocabulary.text(token_id), vocabulary.bytes(token_id));
        Self {
            text,
            logprob,
            bytes,
        }
    }
}

impl<'a> ChatLogprobs<'a> {
    /// One entry per token; `logprobs` is as long as `token_ids`.
    pub(super) fn new(
        vocabulary: &'a dyn Vocabulary,
        token_ids: &[TokenId],
        logprobs: &[TokenLogprobs],
    ) -> Self {
        let content = token_ids
            .iter()
            .zip(logprobs)
            .map(|(&token_id, logprobs)| ChatToken {
                drawn: Token::new(vocabulary, token_id, logprobs.chosen),
                top_logprobs: logprobs
                    .top
                    .iter()
                    .map(|&(token_id, logprob)| Token::new(vocabulary, token_id, logprob))
                    .collect(),
            });
        Self {
            content: content.collect(),
            refusal: None,
        }
    }
}

/// `choices[].logprobs` of completions.
#[derive(Debug, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<TopTokens>,
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// One entry per token. `offset` is where the first token's text begins, in characters; it is moved past the last.
    pub(super) fn new(
        vocabulary: &dyn Vocabulary,
        token_ids: &[TokenId],
        logprobs: &[TokenLogprobs],
        offset: &mut usize,
    ) -> Self {
        let mut this = Self {
            tokens: Vec::with_capacity(token_ids.len()),
            token_logprobs: logprobs.iter().map(|logprobs| logprobs.chosen).collect(),
            top_logprobs: Vec::with_capacity(token_ids.len()),
            text_offset: Vec::with_capacity(token_ids.len()),
        };
        for (&token_id, logprobs) in token_ids.iter().zip(logprobs) {
            let text = vocabulary.text(token_id);
            this.text_offset.push(*offset);
            *offset += text.chars().count();
            this.top_logprobs
                .push(TopTokens::new(vocabulary, token_id, logprobs));
            this.tokens.push(text);
        }
        this
    }
}

/// A JSON object from text to log-probability, the most likely first. OpenAI puts the drawn token among them, so there
/// may be one more than was asked for. Of tokens that read alike the likeliest is shown.
#[derive(Debug)]
struct TopTokens(Vec<(String, f32)>);

impl TopTokens {
    fn new(vocabulary: &dyn Vocabulary, chosen: TokenId, logprobs: &TokenLogprobs) -> Self {
        let drawn = (chosen, logprobs.chosen);
        let is_listed = logprobs.top.iter().any(|&(token_id, _)| token_id == chosen);
        let all = logprobs
            .top
            .iter()
            .copied()
            .chain((!is_listed).then_some(drawn));
        let mut seen = HashSet::new();
        let entries = all.filter_map(|(token_id, logprob)| {
            let text = vocabulary.text(token_id);
            seen.insert(text.clone()).then_some((text, logprob))
        });
        Self(entries.collect())
    }
}

impl Serialize for TopTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::testing::Letters;

    fn logprobs() -> Vec<TokenLogprobs> {
        vec![
            TokenLogprobs {
                chosen: -0.5,
                top: vec![(0, -0.5), (1, -1.25)],
            },
            TokenLogprobs {
                chosen: -9999.0,
                top: vec![(3, -0.25), (4, -2.5)],
            },
        ]
    }

    #[test]
    fn chat_shape() {
        let value = ChatLogprobs::new(&Letters, &[0, 2], &logprobs());
        insta::assert_snapshot!(serde_json::to_string(&value).unwrap(), @r#"{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]},{"token":"b","logprob":-1.25,"bytes":[98]}]},{"token":"c","logprob":-9999.0,"bytes":[99],"top_logprobs":[{"token":"d","logprob":-0.25,"bytes":[100]},{"token":"e","logprob":-2.5,"bytes":[101]}]}],"refusal":null}"#);
    }

    #[test]
    fn completions_shape() {
        let mut offset = 7;
        let value = CompletionLogprobs::new(&Letters, &[0, 2], &logprobs(), &mut offset);
        assert_eq!(offset, 9);
        insta::assert_snapshot!(serde_json::to_string(&value).unwrap(), @r#"{"tokens":["a","c"],"token_logprobs":[-0.5,-9999.0],"top_logprobs":[{"a":-0.5,"b":-1.25},{"d":-0.25,"e":-2.5,"c":-9999.0}],"text_offset":[7,8]}"#);
    }
}
