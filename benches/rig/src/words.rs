//! The words of a mock answer, and where a prompt that ends in some of them goes on.
//!
//! Word `i` of an answer is `w{i:04}-{tag:02x} `: nine bytes with its space, ten from index 10,000 on. The tag is a hash
//! of the answer's key and the index, the key a hash of the conversation, the seed and the choice. Whoever knows those
//! can therefore check every word and its place; [`tag`] and [`key`] are short enough to be written again elsewhere.
//!
//! Token ids are a tokeniser that can be undone: a word is one id, any other text is three bytes to an id.

use std::fmt::Write as _;

/// Ids from here on are words; below it are pieces of text.
pub const FIRST_WORD_ID: u32 = 1 << 26;
/// One past the largest id.
pub const VOCAB_SIZE: u32 = FIRST_WORD_ID + (MAX_WORDS << 8);
/// Words in the longest answer.
pub const MAX_WORDS: u32 = 1 << 16;
/// Bytes of text in one id.
const BYTES_PER_ID: usize = 3;

/// 2^64 divided by the golden ratio: one multiplication moves a low bit into all those above (Knuth, TAOCP 6.4).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Folds bytes into a state, eight at a time as a little-endian number, the last ones filled up with zeros.
#[must_use]
pub fn hash(state: u64, bytes: &[u8]) -> u64 {
    let fold = |state: u64, number: u64| {
        let product = (state ^ number).wrapping_mul(GOLDEN);
        product ^ product >> 32
    };
    let (numbers, rest) = bytes.as_chunks::<8>();
    let numbers = numbers.iter().map(|number| u64::from_le_bytes(*number));
    let state = numbers.fold(state, fold);
    if rest.is_empty() {
        return state;
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    fold(state, u64::from_le_bytes(last))
}

/// What an answer's tags hang from: the text before the answer, the request's seed (0 without one) and which of its
/// `n` choices this is.
#[must_use]
pub fn key(conversation: &[u8], seed: u64, choice: u32) -> u64 {
    let state = hash(0, conversation);
    let ends = [conversation.len() as u64, seed, u64::from(choice)];
    ends.iter()
        .fold(state, |state, end| hash(state, &end.to_le_bytes()))
}

/// The tag of word `index`.
#[must_use]
pub fn tag(key: u64, index: u32) -> u8 {
    // The top byte has seen every bit.
    (hash(key, &u64::from(index).to_le_bytes()) >> 56) as u8
}

/// Word `index` with its space.
#[must_use]
pub fn word(key: u64, index: u32) -> String {
    format!("w{index:04}-{:02x} ", tag(key, index))
}

/// The id of word `index`.
#[must_use]
pub fn word_id(key: u64, index: u32) -> u32 {
    FIRST_WORD_ID + (index << 8) + u32::from(tag(key, index))
}

/// The ids of a text: its words are one each, whatever stands between them in threes of bytes.
#[must_use]
pub fn ids_of_text(text: &[u8]) -> Vec<u32> {
    let mut ids = Vec::with_capacity(text.len() / BYTES_PER_ID + 1);
    let mut rest = text;
    while !rest.is_empty() {
        let (id, len) = word_at(rest).unwrap_or_else(|| {
            let longest = rest.len().min(BYTES_PER_ID);
            let before_word = (1..longest).find(|&len| word_at(&rest[len..]).is_some());
            piece_at(rest, before_word.unwrap_or(longest))
        });
        ids.push(id);
        rest = &rest[len..];
    }
    ids
}

/// The id of `len` bytes of text that is no word.
fn piece_at(text: &[u8], len: usize) -> (u32, usize) {
    let bytes = &text[..len];
    let value = bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte));
    // The length keeps "a" and "\0a" apart: 1, 2 or 3 above the 24 bits.
    (value | (len as u32 - 1) << 24, len)
}

/// The id and the length of the word that a text begins with.
fn word_at(text: &[u8]) -> Option<(u32, usize)> {
    if text.first() != Some(&b'w') {
        return None;
    }
    let len = text.iter().take(10).position(|byte| *byte == b' ')? + 1;
    let said = str::from_utf8(&text[1..len - 1]).ok()?;
    let (index, tag) = said.split_once('-')?;
    let (index, tag) = (
        index.parse::<u32>().ok()?,
        u8::from_str_radix(tag, 16).ok()?,
    );
    // Only as we write it ourselves, so that the id gives the same text.
    let is_ours = index < MAX_WORDS && format!("{index:04}-{tag:02x}") == said;
    is_ours.then_some((FIRST_WORD_ID + (index << 8) + u32::from(tag), len))
}

/// How many ids [`ids_of_text`] gives for this many bytes without a word.
#[must_use]
pub fn count_ids(bytes: usize) -> usize {
    bytes.div_ceil(BYTES_PER_ID)
}

/// The text of `ids`, or the place of one that means nothing.
pub fn text_of_ids(ids: &[u32]) -> Result<Vec<u8>, usize> {
    let mut text = Vec::with_capacity(ids.len() * BYTES_PER_ID);
    for (place, &id) in ids.iter().enumerate() {
        if id >= VOCAB_SIZE {
            return Err(place);
        } else if id >= FIRST_WORD_ID {
            let (index, tag) = ((id - FIRST_WORD_ID) >> 8, id & 0xff);
            let mut word = String::with_capacity(9);
            let _ = write!(word, "w{index:04}-{tag:02x} ");
            text.extend_from_slice(word.as_bytes());
        } else {
            let bytes = id.to_be_bytes();
            let len = usize::from(bytes[0]) + 1;
            if len > BYTES_PER_ID {
                return Err(place);
            }
            text.extend_from_slice(&bytes[4 - len..]);
        }
    }
    Ok(text)
}

/// How much of an answer stands at the end of a text: whole words, and bytes of the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Whole words.
    pub words: u32,
    /// Bytes of the word after them.
    pub bytes: usize,
}

/// Whether `text` is nothing but the beginning of the answer with this key.
#[must_use]
pub fn progress(key: u64, text: &[u8]) -> Option<Progress> {
    let mut rest = text;
    let mut words = 0;
    while !rest.is_empty() && words < MAX_WORDS {
        let next = word(key, words);
        if let Some(after) = rest.strip_prefix(next.as_bytes()) {
            rest = after;
            words += 1;
        } else {
            let bytes = rest.len();
            let is_part = next.as_bytes().starts_with(rest);
            return is_part.then_some(Progress { words, bytes });
        }
    }
    rest.is_empty().then_some(Progress { words, bytes: 0 })
}

/// Splits a text into what was asked and the beginning of our answer to it. `key_of` makes the key from what was asked.
/// A tail that is no exact beginning of the answer belongs to the question: the answer then starts at word 0, which is
/// what a reader sees when a router continued it wrongly.
pub fn split(text: &[u8], key_of: impl Fn(&[u8]) -> u64) -> (&[u8], Progress) {
    const FIRST_WORD: &[u8] = b"w0000-";
    // An answer has no other bytes than these, so that most prompts are told at their last one.
    let in_answer = |byte: &u8| matches!(byte, b'w' | b'-' | b' ' | b'0'..=b'9' | b'a'..=b'f');
    let other = text.iter().rposition(|byte| !in_answer(byte));
    let mut from = other.map_or(0, |at| at + 1);
    while let Some(found) = find(&text[from..], FIRST_WORD) {
        let at = from + found;
        let (asked, said) = text.split_at(at);
        if let Some(progress) = progress(key_of(asked), said) {
            return (asked, progress);
        }
        from = at + 1;
    }
    (text, Progress::default())
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len())
        .position(|window| window == pattern)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(key: u64, words: u32) -> String {
        (0..words).map(|index| word(key, index)).collect()
    }

    /// `tests/faults/words.py` computes the same: a change here is one there.
    #[test]
    fn words_are_those_that_other_readers_expect() {
        let key = key(b"<|user|>hi\n<|assistant|>", 7, 0);
        assert_eq!(answer(key, 3), "w0000-46 w0001-a8 w0002-82 ");
    }

    proptest! {
        #[test]
        fn an_answer_is_found_wherever_it_was_cut(
            asked in "[a-zw0-]{0,40}", seed in any::<u64>(), words in 1u32..30, cut in 0usize..9
        ) {
            let key_of = |asked: &[u8]| key(asked, seed, 0);
            let mut text = asked.clone() + &answer(key_of(asked.as_bytes()), words);
            let cut = cut.min(8);
            text.truncate(text.len() - cut);
            let (base, progress) = split(text.as_bytes(), key_of);
            let expected = if cut == 0 {
                Progress { words, bytes: 0 }
            } else {
                Progress { words: words - 1, bytes: 9 - cut }
            };
            // Of a first word that was cut before its dash nothing can be told.
            prop_assume!(words > 1 || cut < 4);
            prop_assert_eq!((base, progress), (asked.as_bytes(), expected));
        }

        #[test]
        fn a_lost_or_foreign_word_is_no_continuation(seed in any::<u64>(), words in 3u32..30, lost in 1u32..29) {
            prop_assume!(lost + 1 < words);
            let key = key(b"asked", seed, 0);
            let text: String = (0..words).filter(|index| *index != lost).map(|index| word(key, index)).collect();
            prop_assert_eq!(progress(key, text.as_bytes()), None);
        }

        #[test]
        fn ids_can_be_undone(text in proptest::collection::vec(any::<u8>(), 0..50), words in 0u32..20) {
            let key = key(&text, 1, 2);
            let mut ids = ids_of_text(&text);
            prop_assert_eq!(ids.len(), count_ids(text.len()));
            ids.extend((0..words).map(|index| word_id(key, index)));
            let whole = [&text[..], answer(key, words).as_bytes()].concat();
            prop_assert_eq!(&text_of_ids(&ids), &Ok(whole.clone()));
            // The text of words has their own ids again, behind any text.
            prop_assert_eq!(ids_of_text(&whole), ids);
        }
    }

    #[test]
    fn only_our_own_spelling_is_a_word() {
        for text in ["w0000-0f ", "w12345-ff "] {
            assert_eq!(ids_of_text(text.as_bytes()).len(), 1, "{text}");
        }
        for text in [
            "w00000-0f ",
            "w0000-0F ",
            "w0000-1ff ",
            "w000-0f ",
            "w70000-0f ",
            "w0000-0f",
        ] {
            let ids = ids_of_text(text.as_bytes());
            assert_eq!(ids.len(), count_ids(text.len()), "{text}");
            assert_eq!(text_of_ids(&ids).unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn ids_that_mean_nothing_are_named() {
        assert_eq!(text_of_ids(&[5, VOCAB_SIZE]), Err(1));
        assert_eq!(text_of_ids(&[3 << 24]), Err(0));
    }
}
