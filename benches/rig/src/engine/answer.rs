//! One choice of an answer, word by word.

use crate::words::{MAX_WORDS, Progress, word, word_id};

/// What comes next of one choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The word's place in the answer.
    pub index: u32,
    /// The word, or what is still to be said of it.
    pub text: String,
    /// The word's id.
    pub id: u32,
    /// Why the choice ends with this piece, where it does.
    pub finish: Option<&'static str>,
}

/// A choice that is being said.
#[derive(Clone, Debug)]
pub struct Answer {
    key: u64,
    start: Progress,
    next: u32,
    /// Tokens that may still be said.
    left: u32,
    /// Where the answer ends by itself.
    natural: u32,
    stops: Vec<String>,
    /// What was said, kept only where a stop string may stand in it.
    said: String,
    is_over: bool,
}

impl Answer {
    /// Goes on after `start`. `(max_tokens, natural)`: how many tokens may come, and at which word it ends by itself.
    pub fn new(
        key: u64,
        start: Progress,
        (max_tokens, natural): (u32, u32),
        stops: Vec<String>,
    ) -> Self {
        Self {
            key,
            start,
            next: start.words,
            left: max_tokens,
            natural: natural.min(MAX_WORDS),
            stops,
            said: String::new(),
            is_over: false,
        }
    }

    /// The next piece; `None` once a piece had a finish reason.
    pub fn piece(&mut self) -> Option<Piece> {
        if self.is_over {
            return None;
        }
        let index = self.next;
        let mut piece = Piece {
            index,
            text: String::new(),
            id: word_id(self.key, index),
            finish: None,
        };
        // A continuation of an answer that had ended by itself has nothing left to say.
        if index < self.natural {
            piece.text = word(self.key, index);
            if index == self.start.words {
                piece.text.drain(..self.start.bytes);
            }
        }
        self.next += 1;
        self.left = self.left.saturating_sub(1);
        piece.finish = if self.stop_in(&mut piece.text) || self.next >= self.natural {
            Some("stop")
        } else if self.left == 0 {
            Some("length")
        } else {
            None
        };
        self.is_over = piece.finish.is_some();
        Some(piece)
    }

    /// Whether a piece had a finish reason.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Tokens said so far.
    pub fn said_tokens(&self) -> u32 {
        self.next - self.start.words
    }

    /// The ids of the words before the first piece.
    pub fn ids_before(&self) -> impl Iterator<Item = u32> {
        (0..self.start.words).map(|index| word_id(self.key, index))
    }

    /// Cuts `text` where a stop string begins. Of one that began in an earlier piece, that part has been sent.
    fn stop_in(&mut self, text: &mut String) -> bool {
        if self.stops.is_empty() {
            return false;
        }
        let before = self.said.len();
        self.said.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.said.find(stop.as_str()))
            .min();
        if let Some(at) = found {
            text.truncate(at.saturating_sub(before));
        }
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut answer: Answer) -> (String, &'static str) {
        let mut text = String::new();
        while let Some(piece) = answer.piece() {
            text += &piece.text;
            if let Some(finish) = piece.finish {
                return (text, finish);
            }
        }
        panic!("an answer without a finish reason");
    }

    fn words(key: u64, count: u32) -> String {
        (0..count).map(|index| word(key, index)).collect()
    }

    #[test]
    fn an_answer_ends_by_itself_or_at_its_limit() {
        let answer = |limits| Answer::new(5, Progress::default(), limits, Vec::new());
        assert_eq!(all(answer((8, 3))), (words(5, 3), "stop"));
        assert_eq!(all(answer((2, 3))), (words(5, 2), "length"));
    }

    #[test]
    fn a_continuation_says_exactly_the_rest() {
        for cut in 0..words(5, 4).len() {
            let start = Progress {
                words: cut as u32 / 9,
                bytes: cut % 9,
            };
            let (rest, finish) = all(Answer::new(5, start, (99, 4), Vec::new()));
            assert_eq!(words(5, 4)[..cut].to_owned() + &rest, words(5, 4));
            assert_eq!(finish, "stop");
        }
        let ended = Progress { words: 4, bytes: 0 };
        assert_eq!(
            all(Answer::new(5, ended, (99, 4), Vec::new())),
            (String::new(), "stop")
        );
    }

    #[test]
    fn a_stop_string_ends_it_before_the_stop_string() {
        let stops = vec!["w0002".to_owned(), "0003".to_owned()];
        let answer = Answer::new(5, Progress::default(), (99, 9), stops);
        assert_eq!(all(answer), (words(5, 2), "stop"));
    }
}
