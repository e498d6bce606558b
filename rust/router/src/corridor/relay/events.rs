//! Server-sent events as an engine writes them: found in a stream of bytes, read as far as the router has to.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use memchr::memchr;
use serde::{Deserialize, de::IgnoredAny};

/// The largest event.
const EVENT_BYTES_MAX: usize = 8 << 20;

/// Events that have come, and the beginning of the next.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) buffer: BytesMut,
    /// Up to here there is no end of an event.
    searched: usize,
    /// Where the next event begins, behind those that were looked at.
    next: usize,
}

impl Events {
    /// The bytes of the next whole event, its end included.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        let mut at = self.searched.max(self.next);
        let end = loop {
            let Some(found) = memchr(b'\n', &self.buffer[at..]) else {
                // A line break may come before the rest of its pair.
                self.searched = self.buffer.len();
                return None;
            };
            let line_end = at + found;
            match &self.buffer[line_end + 1..] {
                [b'\n', ..] => break line_end + 2,
                [b'\r', b'\n', ..] => break line_end + 3,
                [] | [b'\r'] => {
                    self.searched = line_end;
                    return None;
                }
                _ => at = line_end + 1,
            }
        };
        let begin = std::mem::replace(&mut self.next, end);
        self.searched = end;
        Some(&self.buffer[begin..end])
    }

    /// Takes the events out that were looked at, but for the last `except` bytes of them, which are dropped.
    pub(super) fn take(&mut self, except: usize) -> Bytes {
        let mut events = self.buffer.split_to(self.next);
        events.truncate(self.next - except);
        self.searched -= self.next;
        self.next = 0;
        events.freeze()
    }

    /// Whether the next event is larger than any may be.
    pub(super) fn is_too_large(&self) -> bool {
        self.buffer.len() - self.next > EVENT_BYTES_MAX
    }
}

/// An event's data, or `None` where it has none: a comment.
pub(super) fn data(event: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut lines = event.split(|&byte| byte == b'\n').filter_map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let data = line.strip_prefix(b"data:")?;
        Some(data.strip_prefix(b" ").unwrap_or(data))
    });
    let first = lines.next()?;
    let mut data = Cow::Borrowed(first);
    for line in lines {
        let joined = data.to_mut();
        joined.push(b'\n');
        joined.extend_from_slice(line);
    }
    Some(data)
}

/// The data that ends a stream.
pub(super) const DONE: &[u8] = b"[DONE]";

/// Text that is borrowed where it was written without escapes.
#[derive(Debug, Deserialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

/// One piece of an answer, as far as continuing it elsewhere needs it.
#[derive(Debug, Deserialize)]
pub(super) struct Piece<'a> {
    #[serde(borrow, default)]
    pub(super) id: Option<Text<'a>>,
    #[serde(default)]
    pub(super) created: Option<u64>,
    #[serde(borrow, default)]
    pub(super) model: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) choices: Option<Vec<PieceChoice<'a>>>,
    #[serde(default)]
    pub(super) usage: Option<Usage>,
    #[serde(default)]
    pub(super) error: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
pub(super) struct PieceChoice<'a> {
    #[serde(default)]
    pub(super) index: u32,
    #[serde(borrow, default)]
    pub(super) delta: Option<Delta<'a>>,
    #[serde(borrow, default)]
    pub(super) text: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) finish_reason: Option<Text<'a>>,
    #[serde(default)]
    pub(super) logprobs: Option<Logprobs>,
    #[serde(default)]
    pub(super) token_ids: Option<Vec<u32>>,
}

/// One entry for each token: of a chat under `content`, of completions under `tokens`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Logprobs {
    #[serde(default)]
    content: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    tokens: Option<Vec<IgnoredAny>>,
}

impl Logprobs {
    /// Tokens that they are of, where it is said.
    pub(super) fn num_tokens(&self) -> Option<u32> {
        let entries = self.content.as_ref().or(self.tokens.as_ref())?;
        u32::try_from(entries.len()).ok()
    }
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Delta<'a> {
    #[serde(borrow, default)]
    pub(super) content: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) reasoning_content: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) reasoning: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) refusal: Option<Text<'a>>,
    #[serde(default)]
    pub(super) tool_calls: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    pub(super) function_call: Option<IgnoredAny>,
}

/// Tokens that a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Usage {
    #[serde(default)]
    pub(super) prompt_tokens: u32,
    #[serde(default)]
    pub(super) completion_tokens: u32,
    #[serde(default)]
    pub(super) prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct PromptDetails {
    #[serde(default)]
    pub(super) cached_tokens: Option<u32>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(events: &mut Events) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| events.next().map(<[u8]>::to_vec)).collect()
    }

    #[test]
    fn data_is_what_the_lines_say() {
        let read = |event: &'static str| {
            data(event.as_bytes()).map(|data| String::from_utf8(data.into_owned()).unwrap())
        };
        assert_eq!(read("data: a\n\n").as_deref(), Some("a"));
        assert_eq!(read("event: x\r\ndata:a\r\n\r\n").as_deref(), Some("a"));
        assert_eq!(read("data: a\ndata: b\n\n").as_deref(), Some("a\nb"));
        assert_eq!(read(": ping\n\n"), None);
    }

    #[test]
    fn the_end_of_an_event_may_be_cut_in_two() {
        for text in [
            "data: a\r\n\r\ndata: b\n\nrest",
            "data: a\n\ndata: b\r\n\r\nrest",
        ] {
            for cut in 0..text.len() {
                let mut events = Events::default();
                events.buffer.extend_from_slice(&text.as_bytes()[..cut]);
                let mut found = all(&mut events);
                events.buffer.extend_from_slice(&text.as_bytes()[cut..]);
                found.extend(all(&mut events));
                let read: Vec<_> = found
                    .iter()
                    .map(|event| data(event).unwrap().into_owned())
                    .collect();
                assert_eq!(read, [b"a", b"b"], "{cut}");
                assert_eq!(&events.take(0)[..], &text.as_bytes()[..text.len() - 4]);
                assert_eq!(&events.buffer[..], b"rest");
            }
        }
    }

    proptest! {
        /// However a stream is cut, its events are the same, and taking them out as they come loses nothing.
        #[test]
        fn cuts_do_not_matter(
            bodies in proptest::collection::vec("[a-z]{0,8}", 0..12),
            cuts in proptest::collection::vec(1_usize..12, 1..20),
            crlf in any::<bool>(),
        ) {
            let line = if crlf { "\r\n" } else { "\n" };
            let events: Vec<String> = bodies.iter().map(|body| format!("data: {body}{line}{line}")).collect();
            let text = events.concat();
            let (mut reader, mut found, mut taken) = (Events::default(), Vec::new(), Vec::new());
            let (mut rest, mut cuts) = (text.as_bytes(), cuts.iter().cycle());
            while !rest.is_empty() {
                let cut = (*cuts.next().unwrap()).min(rest.len());
                reader.buffer.extend_from_slice(&rest[..cut]);
                rest = &rest[cut..];
                found.extend(all(&mut reader));
                taken.extend_from_slice(&reader.take(0));
            }
            let found: Vec<_> = found.into_iter().map(|event| String::from_utf8(event).unwrap()).collect();
            prop_assert_eq!(found, events);
            prop_assert_eq!(taken, text.into_bytes());
        }
    }
}
