//! Byte-level BPE without the detours: the tokens of a text, and nothing else of it.
//!
//! The reference implementation keeps for every token its text, its place in the original and a share of several strings,
//! since it is also used to train; most of its time goes into allocating them. Here words are cut out of the text by the
//! same patterns and their bytes merged in the same order (Sennrich et al., 2016, byte-level as GPT-2 has it), in two
//! buffers that all words share. A word that is one token by itself is looked up.
//!
//! What is not understood is left to the reference: `None`. Each tokeniser is tried on a sample of what is hard before it
//! is used, and tests compare both on random text.

mod file;
#[cfg(test)]
mod tests;

use aho_corasick::AhoCorasick;
use fancy_regex::Regex;
use orchestra_core::TokenId;
use rustc_hash::FxHashMap;
use tokenizers::Tokenizer;

/// A longer word is left to the reference, whose time grows with n log n, while ours does with n².
const WORD_BYTES_MAX: usize = 128;
/// Each tokeniser has to agree with the reference on this.
const SAMPLE: &str = "The quick (brown) fox isn't 12,345.67 years old!\n\n\t  def f(x):\r\n    return x**2 - 1  # µ\n\
     Ünïcödé e\u{301} ǅ 中文字符 ひらがな 한국어 العربية ⅷ²\u{a0}\u{3000} 👨‍👩‍👧 <|x|> it's WE'LL http://a.b/c?d=e_f   ";

/// No merge.
const NONE: u32 = u32::MAX;

/// One tokeniser's words, merges and tokens.
#[derive(Debug)]
pub(super) struct ByteBpe {
    /// Finds the tokens that are taken out of the text before all else.
    added: AhoCorasick,
    /// Their ids.
    added_ids: Vec<TokenId>,
    /// Patterns that cut what the one before has left.
    patterns: Vec<Regex>,
    /// The text is normalised first, which changes nothing in ASCII.
    only_ascii: bool,
    bytes: [TokenId; 256],
    /// Rank and result of each pair; the lowest rank is merged first.
    merges: FxHashMap<(TokenId, TokenId), (u32, TokenId)>,
    /// Words that become one token.
    whole: FxHashMap<Box<[u8]>, TokenId>,
}

impl ByteBpe {
    /// `None` where the file is of another kind, or where the reference would give other tokens.
    pub(super) fn new(tokenizer_json: &[u8], reference: &Tokenizer) -> Option<Self> {
        let bpe = file::read(tokenizer_json)?;
        bpe.agrees(reference).then_some(bpe)
    }

    /// Token ids of a text, or `None` where the reference has to be asked.
    pub(super) fn encode(&self, text: &str) -> Option<Vec<TokenId>> {
        if self.only_ascii && !text.is_ascii() {
            return None;
        }
        let mut out = Vec::with_capacity(text.len() / 2);
        let mut ranks = Vec::new();
        let mut start = 0;
        for found in self.added.find_iter(text) {
            let before = &text[start..found.start()];
            self.cut(before, &self.patterns, &mut out, &mut ranks)?;
            out.push(self.added_ids[found.pattern()]);
            start = found.end();
        }
        self.cut(&text[start..], &self.patterns, &mut out, &mut ranks)?;
        Some(out)
    }

    /// Cuts text by the first pattern, what comes of it by the others, and appends the tokens of the words.
    fn cut(
        &self,
        text: &str,
        patterns: &[Regex],
        out: &mut Vec<TokenId>,
        ranks: &mut Vec<u32>,
    ) -> Option<()> {
        let Some((pattern, others)) = patterns.split_first() else {
            return self.word(text.as_bytes(), out, ranks);
        };
        let mut start = 0;
        for found in pattern.find_iter(text) {
            let found = found.ok()?;
            // What is between two matches is a word too.
            for word in [&text[start..found.start()], found.as_str()] {
                if !word.is_empty() {
                    self.cut(word, others, out, ranks)?;
                }
            }
            start = found.end();
        }
        if start < text.len() {
            self.cut(&text[start..], others, out, ranks)?;
        }
        Some(())
    }

    /// Appends the tokens of a word.
    fn word(&self, word: &[u8], out: &mut Vec<TokenId>, ranks: &mut Vec<u32>) -> Option<()> {
        if let Some(&token) = self.whole.get(word) {
            out.push(token);
            return Some(());
        }
        if word.len() > WORD_BYTES_MAX {
            return None;
        }
        self.merge(word, out, ranks);
        Some(())
    }

    /// Appends the bytes of a word and merges them where they are: the pair of the lowest rank first, of several the
    /// leftmost. `ranks[i]` is the rank of the pair that begins at the word's token `i`.
    fn merge(&self, word: &[u8], out: &mut Vec<TokenId>, ranks: &mut Vec<u32>) {
        let start = out.len();
        out.extend(word.iter().map(|&byte| self.bytes[usize::from(byte)]));
        ranks.clear();
        ranks.extend(
            out[start..]
                .windows(2)
                .map(|pair| self.pair(pair[0], pair[1]).0),
        );
        while let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|&(_, rank)| rank)
            && rank != NONE
        {
            let left = start + at;
            out[left] = self.pair(out[left], out[left + 1]).1;
            out.remove(left + 1);
            ranks.remove(at);
            if at < ranks.len() {
                ranks[at] = self.pair(out[left], out[left + 1]).0;
            }
            if at > 0 {
                ranks[at - 1] = self.pair(out[left - 1], out[left]).0;
            }
        }
    }

    /// Rank and result of a pair.
    fn pair(&self, left: TokenId, right: TokenId) -> (u32, TokenId) {
        self.merges
            .get(&(left, right))
            .copied()
            .unwrap_or((NONE, 0))
    }

    /// Whether the reference has the same tokens for the sample.
    fn agrees(&self, reference: &Tokenizer) -> bool {
        let ascii: String = SAMPLE.chars().filter(char::is_ascii).collect();
        [SAMPLE, &ascii].into_iter().all(|text| {
            let expected = reference.encode_fast(text, false).ok();
            match (self.encode(text), expected) {
                (Some(token_ids), Some(expected)) => token_ids == expected.get_ids(),
                (None, _) => true,
                (Some(_), None) => false,
            }
        })
    }
}
