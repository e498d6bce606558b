//! Stop strings in a stream of text.
//!
//! The output ends at the first byte where any stop string is complete, and what came before that string's first
//! byte is the answer. Text that may yet turn into a stop string is held back. Both depend on the text alone,
//! never on how tokens cut it up.

/// Finds stop strings in text that comes in pieces.
///
/// One Knuth-Morris-Pratt automaton per stop string: each byte costs one amortised step per string, and the
/// longest unfinished match is exactly what has to be held back.
#[derive(Clone, Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    /// Text that begins a stop string; never longer than the longest of them.
    held: String,
}

/// A stop string that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Its index in the list that the client gave.
    pub index: usize,
}

impl StopStrings {
    /// Watches for `stop`. Empty strings match nothing.
    pub fn new(stop: &[String]) -> Self {
        Self {
            patterns: stop.iter().map(|text| Pattern::new(text)).collect(),
            held: String::new(),
        }
    }

    /// Takes the next piece and appends to `out` what can no longer be part of a stop string. After a match the
    /// rest of `text` is dropped, and there is nothing more to push.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<StopMatch> {
        if self.patterns.is_empty() {
            out.push_str(text);
            return None;
        }
        let held = self.held.len();
        self.held.push_str(text);
        for end in held..self.held.len() {
            let byte = self.held.as_bytes()[end];
            if let Some((index, length)) = self.advance(byte) {
                out.push_str(&self.held[..end + 1 - length]);
                self.held.clear();
                return Some(StopMatch { index });
            }
        }
        let unfinished = self
            .patterns
            .iter()
            .map(|pattern| pattern.matched)
            .max()
            .unwrap_or(0);
        out.extend(self.held.drain(..self.held.len() - unfinished));
        None
    }

    /// The end of the stream: what was held back is text after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Steps every automaton; of the strings that are complete now, the longest (it began first).
    fn advance(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut found: Option<(usize, usize)> = None;
        for (index, pattern) in self.patterns.iter_mut().enumerate() {
            let length = pattern.bytes.len();
            if pattern.advance(byte) && found.is_none_or(|(_, longest)| length > longest) {
                found = Some((index, length));
            }
        }
        found
    }
}

#[derive(Clone, Debug)]
struct Pattern {
    bytes: Box<[u8]>,
    /// `fallback[i]`: length of the longest proper prefix of the pattern that ends its first `i + 1` bytes.
    fallback: Box<[usize]>,
    /// Bytes of the pattern that the text ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes: Box<[u8]> = text.as_bytes().into();
        let mut fallback = vec![0; bytes.len()];
        let mut length = 0;
        for index in 1..bytes.len() {
            while length > 0 && bytes[index] != bytes[length] {
                length = fallback[length - 1];
            }
            length += usize::from(bytes[index] == bytes[length]);
            fallback[index] = length;
        }
        Self {
            bytes,
            fallback: fallback.into(),
            matched: 0,
        }
    }

    /// Whether the pattern is complete with this byte.
    fn advance(&mut self, byte: u8) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The rule, word for word, over the whole text.
    fn naive(text: &str, stop: &[String]) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let complete = (0..stop.len())
                .filter(|&i| {
                    !stop[i].is_empty() && text.as_bytes()[..end].ends_with(stop[i].as_bytes())
                })
                .max_by_key(|&i| (stop[i].len(), std::cmp::Reverse(i)));
            if let Some(index) = complete {
                return (text[..end - stop[index].len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    fn streamed(pieces: &[String], stop: &[String]) -> (String, Option<usize>) {
        let mut matcher = StopStrings::new(stop);
        let mut out = String::new();
        for piece in pieces {
            if let Some(found) = matcher.push(piece, &mut out) {
                return (out, Some(found.index));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn streaming_equals_the_rule_over_the_whole(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stop in prop::collection::vec("[abé]{0,4}", 0..4),
        ) {
            prop_assert_eq!(streamed(&pieces, &stop), naive(&pieces.concat(), &stop));
        }

        #[test]
        fn nothing_is_held_that_could_not_become_a_stop_string(
            pieces in prop::collection::vec("[ab]{0,4}", 1..12),
            stop in prop::collection::vec("[ab]{1,5}", 1..4),
        ) {
            let mut matcher = StopStrings::new(&stop);
            let (mut out, mut text) = (String::new(), String::new());
            for piece in &pieces {
                text.push_str(piece);
                if matcher.push(piece, &mut out).is_some() {
                    break;
                }
                let held = &text[out.len()..];
                prop_assert!(held.is_empty() || stop.iter().any(|s| s.starts_with(held) && s != held));
            }
        }
    }

    #[test]
    fn held_text_comes_out_when_the_stop_string_does_not() {
        let mut matcher = StopStrings::new(&["</end>".to_owned()]);
        let mut out = String::new();
        assert_eq!(matcher.push("a </e", &mut out), None);
        assert_eq!(out, "a ");
        assert_eq!(matcher.push("m> b", &mut out), None);
        assert_eq!(out, "a </em> b");
        assert_eq!(matcher.push(" </", &mut out), None);
        matcher.finish(&mut out);
        assert_eq!(out, "a </em> b </");
    }

    #[test]
    fn the_earliest_match_wins_also_within_one_piece() {
        let stop = ["world".to_owned(), "lo".to_owned()];
        let mut out = String::new();
        let found = StopStrings::new(&stop).push("hello world", &mut out);
        assert_eq!((out.as_str(), found), ("hel", Some(StopMatch { index: 1 })));
    }
}
