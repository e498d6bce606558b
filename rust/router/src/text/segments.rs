//! Text that was tokenised before need not be again: chats repeat their beginnings.
//!
//! A tokeniser takes its special tokens out of the text before anything else looks at it, and what is between two of them
//! is normalised, split and encoded by itself. So text may be cut before a special token, and the tokens of the pieces
//! are the tokens of the whole. The pieces of a chat (a role and its message, the mark of its end) are remembered each by
//! its text, up to so many bytes, the least recently used forgotten first.
//!
//! A special token is a place to cut if it is taken out of the text as it is (before normalisation), takes no space or
//! word with it, and shares no letters with any other such token: then every place where it is written is one where the
//! tokeniser finds it. Where a model has none, or tokenises at random (BPE dropout), nothing is remembered.

use std::hash::Hasher;

use aho_corasick::AhoCorasick;
use orchestra_core::TokenId;
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHasher};
use tokenizers::{AddedToken, ModelWrapper, Tokenizer};

/// Text and tokens that are remembered for a model, with what it takes to find them.
const BYTES_MAX: usize = 16 << 20;
/// A longer piece is not remembered.
const PIECE_BYTES_MAX: usize = BYTES_MAX / 16;
/// Of an entry beside its text and tokens: itself, its place in the map, two allocations.
const ENTRY_BYTES: usize = size_of::<Entry>() + 24 + 32;
/// Models with more added tokens than this (one for each time step, say) are not searched for places to cut.
const ADDED_TOKENS_MAX: usize = 2048;
const NIL: u32 = u32::MAX;

/// The pieces of one model's prompts.
#[derive(Debug)]
pub(super) struct Segments {
    cuts: AhoCorasick,
    pieces: Mutex<Pieces>,
}

impl Segments {
    /// `None` where the tokeniser's text cannot be cut.
    pub(super) fn new(tokenizer: &Tokenizer) -> Option<Self> {
        Self::with_limit(tokenizer, BYTES_MAX)
    }

    fn with_limit(tokenizer: &Tokenizer, bytes_max: usize) -> Option<Self> {
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && model.dropout.is_some()
        {
            return None;
        }
        let added = tokenizer.get_added_tokens_decoder();
        let raw = added.values().filter(|token| !token.normalized);
        let raw: Vec<&AddedToken> = raw.collect();
        if raw.len() > ADDED_TOKENS_MAX {
            return None;
        }
        let cuts = raw.iter().filter(|token| is_cut(token, &raw));
        let cuts: Vec<&str> = cuts.map(|token| &token.content[..]).collect();
        if cuts.is_empty() {
            return None;
        }
        Some(Self {
            cuts: AhoCorasick::new(cuts).ok()?,
            pieces: Mutex::new(Pieces::new(bytes_max)),
        })
    }

    /// Token ids of a text, put together from those of its pieces. `encode` gives those of a piece.
    pub(super) fn encode<E>(
        &self,
        text: &str,
        encode: impl Fn(&str) -> Result<Vec<TokenId>, E>,
    ) -> Result<Vec<TokenId>, E> {
        let mut token_ids = Vec::with_capacity(text.len() / 4);
        let cuts = self.cuts.find_iter(text).map(|found| found.start());
        let mut start = 0;
        for end in cuts.chain([text.len()]) {
            let piece = &text[start..end];
            start = end;
            if piece.is_empty() || self.pieces.lock().find(piece, &mut token_ids) {
                continue;
            }
            let of_piece = encode(piece)?;
            token_ids.extend_from_slice(&of_piece);
            self.pieces.lock().insert(piece, of_piece);
        }
        Ok(token_ids)
    }
}

/// Whether text may be cut before this token; `raw` are all that are looked for in the text as it is.
fn is_cut(token: &AddedToken, raw: &[&AddedToken]) -> bool {
    let content = &token.content[..];
    let is_edge = |edge: Option<char>| {
        edge.is_some_and(|edge| !(edge.is_whitespace() || edge.is_alphanumeric() || edge == '_'))
    };
    let is_plain = !(token.single_word || token.lstrip || token.rstrip);
    is_plain
        && is_edge(content.chars().next())
        && is_edge(content.chars().next_back())
        && raw.iter().all(|other| {
            let is_itself = other.content == content;
            (is_itself || !(other.content.contains(content) || content.contains(&other.content)))
                && !overlaps(&other.content, content)
                && !overlaps(content, &other.content)
        })
}

/// Whether `first` ends with what `second` begins with, neither whole.
fn overlaps(first: &str, second: &str) -> bool {
    let longest = first.len().min(second.len());
    (1..longest).any(|len| first.as_bytes()[first.len() - len..] == second.as_bytes()[..len])
}

/// One piece. `older` and `newer` are its neighbours by use; of an empty one, `older` is the next empty one.
#[derive(Debug)]
struct Entry {
    text: Box<str>,
    token_ids: Box<[TokenId]>,
    older: u32,
    newer: u32,
}

impl Entry {
    fn bytes(&self) -> usize {
        ENTRY_BYTES + self.text.len() + size_of_val(&*self.token_ids)
    }
}

/// Pieces by text and by use. Of several with one hash, the last one is remembered.
#[derive(Debug)]
struct Pieces {
    bytes_max: usize,
    bytes: usize,
    by_hash: FxHashMap<u64, u32>,
    entries: Vec<Entry>,
    empty: u32,
    oldest: u32,
    newest: u32,
}

impl Pieces {
    fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            by_hash: FxHashMap::default(),
            entries: Vec::new(),
            empty: NIL,
            oldest: NIL,
            newest: NIL,
        }
    }

    /// Appends the tokens of a piece that is known; it is the last one used then.
    fn find(&mut self, text: &str, token_ids: &mut Vec<TokenId>) -> bool {
        let Some(&at) = self.by_hash.get(&hash(text)) else {
            return false;
        };
        let entry = &self.entries[at as usize];
        if *entry.text != *text {
            return false;
        }
        token_ids.extend_from_slice(&entry.token_ids);
        self.unlink(at);
        self.link_newest(at);
        true
    }

    fn insert(&mut self, text: &str, token_ids: Vec<TokenId>) {
        if text.len() > PIECE_BYTES_MAX.min(self.bytes_max / 2) {
            return;
        }
        let hash = hash(text);
        // Another one with this hash, or the same one from another request meanwhile.
        if let Some(&at) = self.by_hash.get(&hash) {
            self.remove(at);
        }
        let entry = Entry {
            text: text.into(),
            token_ids: token_ids.into(),
            older: NIL,
            newer: NIL,
        };
        self.bytes += entry.bytes();
        let at = if let Some(empty) = self.entries.get_mut(self.empty as usize) {
            let at = self.empty;
            self.empty = empty.older;
            *empty = entry;
            at
        } else {
            self.entries.push(entry);
            (self.entries.len() - 1) as u32
        };
        self.by_hash.insert(hash, at);
        self.link_newest(at);
        while self.bytes > self.bytes_max {
            self.remove(self.oldest);
        }
    }

    fn remove(&mut self, at: u32) {
        self.unlink(at);
        let entry = &mut self.entries[at as usize];
        self.bytes -= entry.bytes();
        self.by_hash.remove(&hash(&entry.text));
        *entry = Entry {
            text: Box::default(),
            token_ids: Box::default(),
            older: self.empty,
            newer: NIL,
        };
        self.empty = at;
    }

    fn unlink(&mut self, at: u32) {
        let Entry { older, newer, .. } = self.entries[at as usize];
        match older {
            NIL => self.oldest = newer,
            _ => self.entries[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            _ => self.entries[newer as usize].older = older,
        }
    }

    fn link_newest(&mut self, at: u32) {
        let entry = &mut self.entries[at as usize];
        (entry.older, entry.newer) = (self.newest, NIL);
        match self.newest {
            NIL => self.oldest = at,
            newest => self.entries[newest as usize].newer = at,
        }
        self.newest = at;
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(text.as_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::text::fixtures::{LLAMA3_WORDS, QWEN_WORDS, byte_level};

    fn read(file: &[u8]) -> Tokenizer {
        let mut tokenizer = Tokenizer::from_bytes(file).unwrap();
        tokenizer.with_truncation(None).unwrap();
        tokenizer
    }

    /// A tokeniser of `SentencePiece`'s kind: spaces are `▁`, one goes in front by this scheme.
    fn metaspace(scheme: &str) -> Vec<u8> {
        let mut vocab = vec![json!(["<unk>", 0.0])];
        let letters = "▁abcdefghijklmnopqrstuvwxyz<>|ÄÖ中\n\t.,";
        vocab.extend(letters.chars().map(|letter| json!([letter, -3.0])));
        let words = ["▁hello", "▁wo", "rld", "hel", "lo", "▁▁", "end", "▁a"];
        vocab.extend(words.map(|word| json!([word, -2.0])));
        let ids = 100_u32..;
        let added = ["<|bos|>", "<|end|>"]
            .into_iter()
            .zip(ids)
            .map(|(content, id)| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
            });
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added.collect::<Vec<_>>(), "normalizer": {"type": "NFKC"},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true},
            "post_processor": null, "decoder": null,
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false},
        });
        file.to_string().into_bytes()
    }

    fn demo() -> Vec<u8> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../examples/models/demo/tokenizer.json"
        );
        std::fs::read(path).unwrap()
    }

    fn plain(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
        let encoding = tokenizer.encode_fast(text, false).unwrap();
        encoding.get_ids().to_vec()
    }

    /// Text out of what is hard: special tokens and parts of them, spaces, letters of several bytes.
    fn text() -> impl Strategy<Value = String> {
        let parts = prop::sample::select(vec![
            "<|bos|>",
            "<|end|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<think>",
            "<|im_",
            "start|>",
            "|>",
            "<",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "hello",
            " world",
            "user\n",
            "a",
            "don't",
            "1234",
            "Ä",
            "中文",
            "😀",
            "ﬁ",
            "e\u{301}",
            "\u{a0}",
            ".",
            ",",
        ]);
        prop::collection::vec(parts, 0..30).prop_map(|parts| parts.concat())
    }

    fn tokenisers() -> [(&'static str, Tokenizer); 6] {
        [
            ("llama3", read(&byte_level(LLAMA3_WORDS))),
            ("qwen", read(&byte_level(QWEN_WORDS))),
            ("first", read(&metaspace("first"))),
            ("always", read(&metaspace("always"))),
            ("never", read(&metaspace("never"))),
            ("demo", read(&demo())),
        ]
    }

    #[test]
    fn no_token_changes() {
        let tokenisers = tokenisers().map(|(name, tokenizer)| {
            // So little memory that pieces are forgotten in between.
            let segments = Segments::with_limit(&tokenizer, 2000).unwrap();
            (name, tokenizer, segments)
        });
        proptest!(ProptestConfig { cases: 100, ..ProptestConfig::default() }, |(texts in prop::collection::vec(text(), 1..6))| {
            for (name, tokenizer, segments) in &tokenisers {
                let encode = |piece: &str| Ok::<_, ()>(plain(tokenizer, piece));
                for text in texts.iter().chain(&texts) {
                    let token_ids = segments.encode(text, encode).unwrap();
                    prop_assert_eq!(&token_ids, &plain(tokenizer, text), "{}: {:?}", name, text);
                }
                let pieces = segments.pieces.lock();
                prop_assert!(pieces.bytes <= pieces.bytes_max);
                let bytes: usize = pieces.by_hash.values().map(|&at| pieces.entries[at as usize].bytes()).sum();
                prop_assert_eq!(pieces.bytes, bytes);
            }
        });
    }

    #[test]
    fn a_repeated_beginning_is_not_tokenised_again() {
        let tokenizer = read(&demo());
        let segments = Segments::new(&tokenizer).unwrap();
        let tokenised = std::cell::RefCell::new(Vec::new());
        let encode = |piece: &str| {
            tokenised.borrow_mut().push(piece.to_owned());
            Ok::<_, ()>(plain(&tokenizer, piece))
        };
        let chat = |question: &str| {
            format!(
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            )
        };
        for question in ["who?", "why?", "who?"] {
            segments.encode(&chat(question), encode).unwrap();
        }
        let expected = [
            "<|im_start|>system\nbe brief",
            "<|im_end|>\n",
            "<|im_start|>user\nwho?",
            "<|im_start|>user\nwhy?",
        ];
        assert_eq!(*tokenised.borrow(), expected);
    }

    #[test]
    fn another_text_of_the_same_hash_is_not_found() {
        let mut pieces = Pieces::new(10_000);
        pieces.insert("one", vec![1]);
        let at = pieces.by_hash[&hash("one")];
        pieces.by_hash.insert(hash("other"), at);
        let mut token_ids = Vec::new();
        assert!(!pieces.find("other", &mut token_ids));
        assert!(pieces.find("one", &mut token_ids));
        assert_eq!(token_ids, [1]);
    }

    #[test]
    fn tokens_that_take_something_with_them_are_no_places_to_cut() {
        let token = |content: &str| AddedToken::from(content, true);
        let raw = |tokens: &[AddedToken]| {
            let raw: Vec<&AddedToken> = tokens.iter().collect();
            is_cut(&tokens[0], &raw)
        };
        assert!(raw(&[token("<|a|>"), token("<|b|>")]));
        assert!(!raw(&[token("<|a|>").rstrip(true)]));
        assert!(!raw(&[token("<|a|>").lstrip(true)]));
        assert!(!raw(&[token("<|a|>").single_word(true)]));
        for (content, other) in [
            ("<|a|>", "<|a|>b"),
            ("<|a|>", "x<|a|>"),
            ("<|a|>", "|>b"),
            ("<|a|>", "b<|"),
            ("<a<", "<c>"),
            ("ab", "c"),
            ("<a", "c"),
            (" <a>", "c"),
        ] {
            assert!(!raw(&[token(content), token(other)]), "{content} {other}");
        }
    }

    #[test]
    fn where_text_cannot_be_cut_nothing_is_remembered() {
        let without = |change: fn(&mut Value)| {
            let mut file: Value = serde_json::from_slice(&demo()).unwrap();
            change(&mut file);
            Segments::new(&read(file.to_string().as_bytes())).is_none()
        };
        assert!(!without(|_| ()));
        assert!(without(|file| file["model"]["dropout"] = json!(0.1)));
        assert!(without(|file| {
            for token in file["added_tokens"].as_array_mut().unwrap() {
                token["normalized"] = json!(true);
            }
        }));
    }
}
