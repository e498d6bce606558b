//! Tokens to text, one at a time: what comes out is never half a character, and never changes afterwards.

use std::sync::Arc;

use orchestra_core::TokenId;

use super::tokenizer::ModelTokenizer;

/// Tokens of context that a decoder with neighbours sees before the new ones.
const CONTEXT_TOKENS: usize = 5;
/// Tokens that may wait for their text; a decoder that has nothing to say after so many never will.
const WAITING_TOKENS_MAX: usize = 16;
/// A prompt's last character has at most this many bytes, so at most as many tokens.
const CHARACTER_BYTES_MAX: usize = 4;

/// One sequence's text so far.
///
/// Where each token stands for fixed bytes (byte-level BPE, `SentencePiece`) the cost per token is its length.
/// Other decoders are asked about a short window of tokens.
pub struct Detokenizer {
    tokenizer: Arc<ModelTokenizer>,
    state: State,
}

enum State {
    /// Bytes of a character that is not complete; at most three.
    Bytes { pending: Vec<u8> },
    /// The last tokens. Those before `read` are context, their text is out.
    Window { tokens: Vec<TokenId>, read: usize },
}

impl Detokenizer {
    /// Ready for the first token after `prompt`. Where a prompt of token ids ends inside a character, the output
    /// begins with the whole character.
    pub fn new(tokenizer: Arc<ModelTokenizer>, prompt: &[TokenId]) -> Self {
        let tail = |count: usize| {
            prompt
                .iter()
                .skip(prompt.len().saturating_sub(count))
                .copied()
        };
        let state = if tokenizer.needs_context() {
            let tokens: Vec<TokenId> = tail(CONTEXT_TOKENS)
                .filter(|&token| !tokenizer.is_special(token))
                .collect();
            State::Window {
                read: tokens.len(),
                tokens,
            }
        } else {
            let mut pending = Vec::new();
            for token in tail(CHARACTER_BYTES_MAX).filter(|&token| !tokenizer.is_special(token)) {
                pending.extend(tokenizer.token_bytes(token));
            }
            take_characters(&mut pending, &mut String::new());
            State::Bytes { pending }
        };
        Self { tokenizer, state }
    }

    /// Appends to `out` the text that is certain with this token. Special tokens have none.
    pub fn push(&mut self, token_id: TokenId, out: &mut String) {
        if self.tokenizer.is_special(token_id) {
            return;
        }
        match &mut self.state {
            State::Bytes { pending } => {
                let bytes = self.tokenizer.token_bytes(token_id);
                if pending.is_empty()
                    && let Ok(text) = str::from_utf8(bytes)
                {
                    out.push_str(text);
                    return;
                }
                pending.extend(bytes);
                take_characters(pending, out);
            }
            State::Window { tokens, read } => {
                tokens.push(token_id);
                let is_long = tokens.len() - *read > WAITING_TOKENS_MAX;
                read_window(&self.tokenizer, tokens, read, is_long, out);
            }
        }
    }

    /// The end: what stays incomplete becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        match &mut self.state {
            State::Bytes { pending } => {
                out.push_str(&String::from_utf8_lossy(pending));
                pending.clear();
            }
            State::Window { tokens, read } => {
                read_window(&self.tokenizer, tokens, read, true, out);
            }
        }
    }
}

/// Moves complete characters from `pending` to `out`; bytes that are part of none become U+FFFD.
fn take_characters(pending: &mut Vec<u8>, out: &mut String) {
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        out.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let is_last = taken + invalid.len() == pending.len();
        let is_cut_short = str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        let may_go_on = is_last && is_cut_short;
        if !invalid.is_empty() && !may_go_on {
            out.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    pending.drain(..taken);
}

/// Appends the text of `tokens[read..]`, unless it ends inside a character and `is_last` does not force it.
fn read_window(
    tokenizer: &ModelTokenizer,
    tokens: &mut Vec<TokenId>,
    read: &mut usize,
    is_last: bool,
    out: &mut String,
) {
    let before = tokenizer.decode(&tokens[..*read]);
    let after = tokenizer.decode(tokens);
    if after.ends_with(char::REPLACEMENT_CHARACTER) && !is_last {
        return;
    }
    // A decoder may rewrite the context's end (as for spaces before punctuation); what is out stays out.
    out.push_str(after.get(before.len()..).unwrap_or_default());
    tokens.drain(..tokens.len().saturating_sub(CONTEXT_TOKENS));
    *read = tokens.len();
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::text::fixtures;

    /// Text of each push, then of the end.
    fn increments(tokenizer: &Arc<ModelTokenizer>, prompt: &[u32], output: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt);
        let mut all: Vec<String> = output
            .iter()
            .map(|&token| {
                let mut text = String::new();
                detokenizer.push(token, &mut text);
                text
            })
            .collect();
        let mut rest = String::new();
        detokenizer.finish(&mut rest);
        all.push(rest);
        all
    }

    /// Read once: it takes a property a hundred times as long as what it looks at.
    fn byte_level() -> Arc<ModelTokenizer> {
        static READ: LazyLock<Arc<ModelTokenizer>> = LazyLock::new(|| {
            let file = fixtures::byte_level(fixtures::QWEN_WORDS);
            Arc::new(ModelTokenizer::from_json(&file).unwrap())
        });
        Arc::clone(&READ)
    }

    /// Ids: `<s>` 1, bytes from 3, then the pieces.
    fn sentence_piece() -> Arc<ModelTokenizer> {
        let pieces = ["▁", "a", "b", "▁hello", "中", "▁▁"];
        let mut vocab = serde_json::Map::new();
        for (id, special) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
            vocab.insert(special.to_owned(), json!(id));
        }
        for byte in 0..=u8::MAX {
            vocab.insert(format!("<0x{byte:02X}>"), json!(3 + u32::from(byte)));
        }
        for (id, piece) in (259..).zip(pieces) {
            vocab.insert(piece.to_owned(), json!(id));
        }
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        };
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": []},
        });
        Arc::new(ModelTokenizer::from_json(file.to_string().as_bytes()).unwrap())
    }

    fn word_piece() -> Arc<ModelTokenizer> {
        let vocab = json!({"[UNK]": 0, "un": 1, "##believ": 2, "##able": 3, ",": 4, "it": 5});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": null,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab},
        });
        Arc::new(ModelTokenizer::from_json(file.to_string().as_bytes()).unwrap())
    }

    /// Tokens of whole characters, as pieces or as bytes.
    fn whole_characters() -> impl Strategy<Value = Vec<u32>> {
        let piece = prop_oneof![1_u32..=2, 259_u32..265];
        let bytes = any::<char>().prop_map(|character| {
            character
                .to_string()
                .bytes()
                .map(|byte| 3 + u32::from(byte))
                .collect::<Vec<_>>()
        });
        let token = prop_oneof![piece.prop_map(|id| vec![id]), bytes];
        prop::collection::vec(token, 0..20).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn byte_level_increments_are_the_whole(
            ids in prop::collection::vec(prop_oneof![0..fixtures::VOCAB_SIZE, 0xC0_u32..0xF8, 0x80_u32..0xC0], 0..40)
        ) {
            let tokenizer = byte_level();
            let whole = tokenizer.decode(&ids);
            let mut so_far = String::new();
            for increment in increments(&tokenizer, &[], &ids) {
                so_far.push_str(&increment);
                prop_assert!(whole.starts_with(&so_far), "{:?} then {:?}", whole, so_far);
            }
            prop_assert_eq!(so_far, whole);
        }

        #[test]
        fn sentence_piece_increments_continue_the_prompt(
            prompt in whole_characters(), output in whole_characters(),
        ) {
            // Something before the output that keeps its own leading space out of the picture.
            let prompt = [vec![260], prompt].concat();
            let tokenizer = sentence_piece();
            let whole = tokenizer.decode(&[prompt.clone(), output.clone()].concat());
            let text = increments(&tokenizer, &prompt, &output).concat();
            prop_assert_eq!(tokenizer.decode(&prompt) + &text, whole);
        }

        #[test]
        fn word_piece_increments_continue_the_prompt(
            prompt in prop::collection::vec(1_u32..6, 1..8), output in prop::collection::vec(1_u32..6, 0..40),
        ) {
            let tokenizer = word_piece();
            let whole = tokenizer.decode(&[prompt.clone(), output.clone()].concat());
            let text = increments(&tokenizer, &prompt, &output).concat();
            prop_assert_eq!(tokenizer.decode(&prompt) + &text, whole);
        }
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let [e4, b8, ad] = [0xE4, 0xB8, 0xAD];
        let tokenizer = byte_level();
        assert_eq!(
            increments(&tokenizer, &[], &[97, e4, b8, ad, 98]),
            ["a", "", "", "中", "b", ""]
        );
        assert_eq!(
            increments(&tokenizer, &[], &[e4, b8, 97]),
            ["", "", "\u{FFFD}a", ""]
        );
        assert_eq!(increments(&tokenizer, &[], &[e4, b8]), ["", "", "\u{FFFD}"]);
        // A special token in between is no text and changes none.
        assert_eq!(
            increments(&tokenizer, &[], &[e4, fixtures::END, b8, ad]),
            ["", "", "", "中", ""]
        );
    }

    #[test]
    fn a_character_that_the_prompt_began_comes_out_whole() {
        let tokenizer = byte_level();
        assert_eq!(
            increments(&tokenizer, &[97, 0xE4, 0xB8], &[0xAD, 98]),
            ["中", "b", ""]
        );
    }

    #[test]
    fn a_leading_space_survives() {
        let tokenizer = sentence_piece();
        assert_eq!(
            increments(&tokenizer, &[1, 260], &[262, 262]),
            [" hello", " hello", ""]
        );
    }

    #[test]
    fn broken_byte_runs_keep_their_whole_characters() {
        let tokenizer = sentence_piece();
        let bytes = [0xE4, 0xB8, 0xAD, 0xFF, 0x41].map(|byte| 3 + byte);
        assert_eq!(
            increments(&tokenizer, &[260], &bytes).concat(),
            "中\u{FFFD}A"
        );
    }
}
