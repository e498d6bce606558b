//! One model's tokeniser: text to token ids, and what each token adds to the text.

use orchestra_core::TokenId;
use rustc_hash::FxHashMap;
use tokenizers::Tokenizer;

use super::{bpe::ByteBpe, segments::Segments};

/// The files do not make a tokeniser.
#[derive(Clone, Debug, thiserror::Error)]
#[error("tokenizer.json cannot be read: {0}")]
pub struct TokenizerError(String);

/// A model's tokeniser.
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    joining: Joining,
    pieces: Pieces,
    token_bytes_max: usize,
    /// The short way to the same tokens, where there is one.
    bpe: Option<ByteBpe>,
    /// What was tokenised before; `None` where its text cannot be cut.
    segments: Option<Segments>,
}

/// How tokens join into text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joining {
    /// Each token stands for its own bytes, whatever comes before or after: byte-level BPE, `SentencePiece`.
    Bytes(Spelling),
    /// The tokeniser's decoder has to see a token's neighbours, as with `WordPiece`.
    Decoder,
}

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// Each byte is one printable character (GPT-2 and most models since).
    ByteLevel,
    /// `▁` is a space; `<0x41>` is a byte where the decoder says so.
    SentencePiece { byte_fallback: bool },
}

/// What each token adds to the text, end to end in one buffer.
#[derive(Debug, Default)]
struct Pieces {
    bytes: Vec<u8>,
    /// End of each token's bytes; its start is the end of the token before.
    ends: Vec<u32>,
    is_special: Vec<bool>,
}

impl ModelTokenizer {
    /// Reads a `tokenizer.json`. Takes tens of milliseconds for a large vocabulary: not for an async task.
    pub fn from_json(tokenizer_json: &[u8]) -> Result<Self, TokenizerError> {
        let mut tokenizer =
            Tokenizer::from_bytes(tokenizer_json).map_err(|e| TokenizerError(e.to_string()))?;
        // Files keep the settings of whoever trained the tokeniser; a prompt is never cut or padded.
        tokenizer
            .with_truncation(None)
            .map_err(|e| TokenizerError(e.to_string()))?;
        tokenizer.with_padding(None);
        let decoder = serde_json::to_value(tokenizer.get_decoder())
            .map_err(|e| TokenizerError(e.to_string()))?;
        let joining = Joining::of_decoder(&decoder);
        let pieces = Pieces::of_vocabulary(&tokenizer, joining);
        Ok(Self {
            joining,
            token_bytes_max: pieces.longest(),
            bpe: ByteBpe::new(tokenizer_json, &tokenizer),
            segments: Segments::new(&tokenizer),
            pieces,
            tokenizer,
        })
    }

    /// Token ids of `text`. Special tokens written in the text are recognised; with `add_special_tokens` the
    /// model's own (such as a beginning-of-sequence token) are added.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let short = self.bpe.as_ref().filter(|_| !add_special_tokens);
        let encode = |text: &str| {
            if let Some(token_ids) = short.and_then(|bpe| bpe.encode(text)) {
                return Ok(token_ids);
            }
            self.tokenizer
                .encode_fast(text, add_special_tokens)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|e| TokenizerError(e.to_string()))
        };
        match &self.segments {
            Some(segments) if !add_special_tokens => segments.encode(text, encode),
            _ => encode(text),
        }
    }

    /// Text of several tokens without the special ones. For tests and short pieces: it decodes from the start.
    pub fn decode(&self, token_ids: &[TokenId]) -> String {
        self.tokenizer.decode(token_ids, true).unwrap_or_default()
    }

    /// The bytes that the token adds to the text; a special token's are its name. Empty for unknown ids.
    pub fn token_bytes(&self, token_id: TokenId) -> &[u8] {
        self.pieces.get(token_id)
    }

    /// Whether the token is special, and so no part of the text.
    pub fn is_special(&self, token_id: TokenId) -> bool {
        self.pieces
            .is_special
            .get(token_id as usize)
            .copied()
            .unwrap_or(false)
    }

    /// Whether a token's text depends on its neighbours.
    pub(super) fn needs_context(&self) -> bool {
        self.joining == Joining::Decoder
    }

    /// Longest piece of text that one token stands for, bytes. At least 1.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }
}

impl Joining {
    /// Reads it off the `decoder` of a `tokenizer.json`.
    fn of_decoder(decoder: &serde_json::Value) -> Self {
        let steps: Vec<&serde_json::Value> = match decoder["decoders"].as_array() {
            Some(steps) => steps.iter().collect(),
            None => vec![decoder],
        };
        let has = |kind: &str| steps.iter().any(|step| step["type"] == kind);
        if has("ByteLevel") {
            return Self::Bytes(Spelling::ByteLevel);
        }
        let has_spaces = has("Metaspace") || steps.iter().any(|step| replaces_space(step));
        // Strip takes the space off the very first token of a text; output continues a prompt, so is never that.
        let all_known = steps.iter().all(|step| {
            let kind = step["type"].as_str().unwrap_or_default();
            matches!(kind, "Metaspace" | "ByteFallback" | "Fuse" | "Strip") || replaces_space(step)
        });
        if has_spaces && all_known {
            return Self::Bytes(Spelling::SentencePiece {
                byte_fallback: has("ByteFallback"),
            });
        }
        Self::Decoder
    }
}

fn replaces_space(step: &serde_json::Value) -> bool {
    step["type"] == "Replace" && step["pattern"]["String"] == "▁" && step["content"] == " "
}

impl Pieces {
    fn of_vocabulary(tokenizer: &Tokenizer, joining: Joining) -> Self {
        let size = tokenizer
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |&id| id + 1);
        let alphabet = byte_level_alphabet();
        let added = tokenizer.get_added_tokens_decoder();
        let mut pieces = Self::default();
        for id in 0..size {
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            let is_special = added.get(&id).is_some_and(|token| token.special);
            match joining {
                Joining::Bytes(spelling) if !is_special => {
                    spelling.append_bytes(&token, &alphabet, &mut pieces.bytes);
                }
                Joining::Bytes(_) | Joining::Decoder => pieces.bytes.extend(token.as_bytes()),
            }
            pieces.ends.push(pieces.bytes.len() as u32);
            pieces.is_special.push(is_special);
        }
        pieces
    }

    fn get(&self, token_id: TokenId) -> &[u8] {
        let index = token_id as usize;
        let Some(&end) = self.ends.get(index) else {
            return &[];
        };
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// Longest piece of text that one token stands for, bytes. At least 1.
    fn longest(&self) -> usize {
        let starts = std::iter::once(&0).chain(&self.ends);
        let lengths = self.ends.iter().zip(starts).map(|(end, start)| end - start);
        lengths.max().unwrap_or(1).max(1) as usize
    }
}

impl Spelling {
    fn append_bytes(self, token: &str, alphabet: &FxHashMap<char, u8>, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = out.len();
                for character in token.chars() {
                    if let Some(&byte) = alphabet.get(&character) {
                        out.push(byte);
                        continue;
                    }
                    // Not spelled in the alphabet, as added tokens may be: the token is its own text.
                    out.truncate(start);
                    out.extend(token.as_bytes());
                    return;
                }
            }
            Self::SentencePiece { byte_fallback } => match fallback_byte(token) {
                Some(byte) if byte_fallback => out.push(byte),
                _ => out.extend(token.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// `<0x41>` is byte 0x41.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and on, in order.
pub(super) fn byte_level_alphabet() -> FxHashMap<char, u8> {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut substitutes = '\u{100}'..;
    let mut alphabet = FxHashMap::default();
    for byte in 0..=u8::MAX {
        let character = if is_printable(byte) {
            Some(char::from(byte))
        } else {
            substitutes.next()
        };
        alphabet.extend(character.map(|character| (character, byte)));
    }
    alphabet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures::{self, BOS, END};

    fn tokenizer() -> ModelTokenizer {
        ModelTokenizer::from_json(&fixtures::byte_level(fixtures::LLAMA3_WORDS)).unwrap()
    }

    #[test]
    fn special_tokens_are_added_on_request_and_always_read() {
        let tokenizer = tokenizer();
        assert_eq!(
            tokenizer.encode("hello world", true).unwrap(),
            [BOS, 259, 264]
        );
        assert_eq!(tokenizer.encode("hello world", false).unwrap(), [259, 264]);
        assert_eq!(
            tokenizer.encode("<|bos|>a<|end|>", false).unwrap(),
            [BOS, 97, END]
        );
    }

    #[test]
    fn a_prompt_is_never_truncated() {
        assert_eq!(tokenizer().encode("abcdefgh", true).unwrap().len(), 9);
    }

    #[test]
    fn text_comes_back() {
        let tokenizer = tokenizer();
        for text in [
            "",
            "hello  world\r\n\n x",
            "don't 1234567 ÄÖ 中文 😀👨‍👩‍👧",
            "\u{0} \t  end ",
        ] {
            assert_eq!(
                tokenizer.decode(&tokenizer.encode(text, true).unwrap()),
                text
            );
        }
    }

    #[test]
    fn each_token_has_its_bytes() {
        let tokenizer = tokenizer();
        for byte in 0..=u8::MAX {
            assert_eq!(tokenizer.token_bytes(byte.into()), [byte]);
        }
        assert_eq!(tokenizer.token_bytes(264), b" world");
        assert_eq!(tokenizer.token_bytes(END), b"<|end|>");
        assert_eq!(tokenizer.token_bytes(267), b"<think>");
        assert_eq!(tokenizer.token_bytes(1_000_000), b"");
        assert_eq!(tokenizer.token_bytes_max(), b"<|bos|>".len());
        assert!(tokenizer.is_special(END) && !tokenizer.is_special(267));
    }

    #[test]
    fn a_file_that_is_no_tokeniser_is_an_error() {
        for bytes in [&b""[..], b"{}", b"[1", b"\xff"] {
            assert!(ModelTokenizer::from_json(bytes).is_err());
        }
    }
}
