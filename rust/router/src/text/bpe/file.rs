//! What is read of a `tokenizer.json`. Files of another kind, and settings that are not understood, are `None`.

use aho_corasick::{AhoCorasick, MatchKind};
use fancy_regex::Regex;
use orchestra_core::TokenId;
use rustc_hash::FxHashMap;
use serde::Deserialize;
use tokenizers::AddedToken;

use super::{ByteBpe, NONE, WORD_BYTES_MAX};
use crate::text::tokenizer::byte_level_alphabet;

/// What GPT-2 cuts words with, where a file names no pattern of its own.
const GPT2_WORDS: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
#[derive(Deserialize)]
struct File {
    added_tokens: Vec<Added>,
    normalizer: Option<Named>,
    pre_tokenizer: Option<PreTokenizer>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: TokenId,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct Named {
    r#type: String,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    Sequence {
        pretokenizers: Vec<Self>,
    },
    Split {
        pattern: Pattern,
        behavior: String,
        invert: bool,
    },
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    #[serde(other)]
    Other,
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize)]
enum Pattern {
    Regex(String),
}

#[derive(Deserialize)]
struct Model {
    r#type: String,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    ignore_merges: bool,
    vocab: FxHashMap<String, TokenId>,
    merges: Vec<Merge>,
}

/// Both ways in which files write a pair.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// The tokeniser of a file.
pub(super) fn read(tokenizer_json: &[u8]) -> Option<ByteBpe> {
    let File {
        added_tokens,
        normalizer,
        pre_tokenizer,
        model,
    } = serde_json::from_slice(tokenizer_json).ok()?;
    let only_ascii = match &normalizer {
        None => false,
        Some(normalizer) if normalizer.r#type == "NFC" => true,
        Some(_) => return None,
    };
    if !added_tokens.iter().all(Added::is_plain) {
        return None;
    }
    let added = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(added_tokens.iter().map(|added| &added.token.content));
    Some(ByteBpe {
        added: added.ok()?,
        added_ids: added_tokens.iter().map(|added| added.id).collect(),
        patterns: pre_tokenizer?.patterns()?,
        only_ascii,
        ..model.read()?
    })
}

impl Added {
    /// Whether it is looked for in the text as it is, and takes nothing else with it.
    fn is_plain(&self) -> bool {
        let token = &self.token;
        let takes_more = token.single_word || token.lstrip || token.rstrip;
        !(takes_more || token.normalized || token.content.is_empty())
    }
}

impl PreTokenizer {
    /// The patterns that cut text, in their order; the last step has to be the one that goes to bytes.
    fn patterns(self) -> Option<Vec<Regex>> {
        let mut steps = match self {
            Self::Sequence { pretokenizers } => pretokenizers,
            step => vec![step],
        };
        let Some(Self::ByteLevel {
            add_prefix_space: false,
            use_regex,
        }) = steps.pop()
        else {
            return None;
        };
        let mut patterns = Vec::with_capacity(steps.len() + 1);
        for step in steps {
            let Self::Split {
                pattern: Pattern::Regex(pattern),
                behavior,
                invert: false,
            } = step
            else {
                return None;
            };
            if behavior != "Isolated" {
                return None;
            }
            patterns.push(Regex::new(&pattern).ok()?);
        }
        if use_regex {
            patterns.push(Regex::new(GPT2_WORDS).ok()?);
        }
        Some(patterns)
    }
}

impl Model {
    /// The bytes, merges and whole words; the rest is left empty.
    fn read(self) -> Option<ByteBpe> {
        let affixes = [&self.continuing_subword_prefix, &self.end_of_word_suffix];
        let has_affixes = affixes.into_iter().flatten().any(|affix| !affix.is_empty());
        if self.r#type != "BPE" || has_affixes || self.dropout.is_some_and(|share| share > 0.0) {
            return None;
        }
        let alphabet = byte_level_alphabet();
        let mut bytes = [0; 256];
        for (character, &byte) in &alphabet {
            bytes[usize::from(byte)] =
                *self.vocab.get(character.encode_utf8(&mut [0; 4]) as &str)?;
        }
        let mut merges = FxHashMap::default();
        for (rank, merge) in (0..NONE).zip(&self.merges) {
            let (left, right) = match merge {
                Merge::Pair(left, right) => (&left[..], &right[..]),
                Merge::Line(line) => line.split_once(' ')?,
            };
            let id = |token: &str| self.vocab.get(token).copied();
            let merged = id(&[left, right].concat())?;
            merges.insert((id(left)?, id(right)?), (rank, merged));
        }
        let mut bpe = ByteBpe {
            added: AhoCorasick::new([""; 0]).ok()?,
            added_ids: Vec::new(),
            patterns: Vec::new(),
            only_ascii: false,
            bytes,
            merges,
            whole: FxHashMap::default(),
        };
        let (mut tokens, mut ranks) = (Vec::new(), Vec::new());
        for (token, id) in self.vocab {
            let word: Option<Box<[u8]>> =
                token.chars().map(|c| alphabet.get(&c).copied()).collect();
            let Some(word) = word.filter(|word| word.len() <= WORD_BYTES_MAX || self.ignore_merges)
            else {
                continue;
            };
            tokens.clear();
            if !self.ignore_merges {
                bpe.merge(&word, &mut tokens, &mut ranks);
            }
            if self.ignore_merges || tokens == [id] {
                bpe.whole.insert(word, id);
            }
        }
        Some(bpe)
    }
}
