//! Where a body ends, and what of the bytes on the wire is its own.

use bytes::{Buf as _, BytesMut};

use super::WireError;

/// The longest line between two chunks: a size with its extensions, or a trailer.
const LINE_BYTES_MAX: usize = 4 << 10;
/// Most trailers after the last chunk.
const TRAILERS_MAX: u32 = 64;

/// Reads one body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoder {
    /// Bytes that are left.
    Length(u64),
    Chunked(Chunked),
    /// It ends with the connection.
    UntilClosed,
    Done,
}

/// Where in a chunked body the next byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    /// In the line with a chunk's size.
    Size,
    /// In a chunk of which so much is left.
    Data(u64),
    /// In the line break behind a chunk.
    Break,
    /// In the trailers, of which so many have come.
    Trailers(u32),
}

impl Decoder {
    pub(super) const fn chunked() -> Self {
        Self::Chunked(Chunked::Size)
    }

    pub(super) const fn length(length: u64) -> Self {
        if length == 0 {
            Self::Done
        } else {
            Self::Length(length)
        }
    }

    pub(super) fn is_done(self) -> bool {
        self == Self::Done
    }

    /// The connection ended.
    pub(super) fn end(&mut self) -> Result<(), WireError> {
        if *self != Self::UntilClosed {
            return Err(WireError::Closed);
        }
        *self = Self::Done;
        Ok(())
    }

    /// Moves what `input` has of the body to `out`. What is behind the body stays in `input`.
    pub(super) fn decode(
        &mut self,
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<(), WireError> {
        while !input.is_empty() {
            match self {
                Self::Done => return Ok(()),
                Self::UntilClosed => out.unsplit(input.split()),
                Self::Length(left) => {
                    *left -= take(input, out, *left);
                    if *left == 0 {
                        *self = Self::Done;
                    }
                }
                Self::Chunked(state) => match state.step(input, out)? {
                    Step::Goes => {}
                    Step::Waits => return Ok(()),
                    Step::Ends => *self = Self::Done,
                },
            }
        }
        Ok(())
    }
}

/// Moves at most `limit` bytes; the answer is how many.
fn take(input: &mut BytesMut, out: &mut BytesMut, limit: u64) -> u64 {
    let count = input
        .len()
        .min(usize::try_from(limit).unwrap_or(usize::MAX));
    out.extend_from_slice(&input[..count]);
    input.advance(count);
    count as u64
}

enum Step {
    Goes,
    /// For more bytes.
    Waits,
    Ends,
}

impl Chunked {
    fn step(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<Step, WireError> {
        if let Self::Data(left) = self {
            *left -= take(input, out, *left);
            if *left == 0 {
                *self = Self::Break;
            }
            return Ok(Step::Goes);
        }
        let Some(end) = input
            .iter()
            .take(LINE_BYTES_MAX)
            .position(|&byte| byte == b'\n')
        else {
            return if input.len() < LINE_BYTES_MAX {
                Ok(Step::Waits)
            } else {
                Err(WireError::Malformed(
                    "a line between its chunks is too long",
                ))
            };
        };
        let line = input[..end].strip_suffix(b"\r").unwrap_or(&input[..end]);
        let next = match *self {
            Self::Size => Some(match size(line)? {
                0 => Self::Trailers(0),
                size => Self::Data(size),
            }),
            Self::Break | Self::Data(_) if line.is_empty() => Some(Self::Size),
            Self::Break | Self::Data(_) => {
                return Err(WireError::Malformed("a chunk does not end where it should"));
            }
            Self::Trailers(_) if line.is_empty() => None,
            Self::Trailers(TRAILERS_MAX) => {
                return Err(WireError::Malformed("it has too many trailers"));
            }
            Self::Trailers(count) => Some(Self::Trailers(count + 1)),
        };
        input.advance(end + 1);
        match next {
            Some(state) => {
                *self = state;
                Ok(Step::Goes)
            }
            None => Ok(Step::Ends),
        }
    }
}

/// A chunk's size: hexadecimal digits, then perhaps extensions.
fn size(line: &[u8]) -> Result<u64, WireError> {
    let digits = line
        .split(|&byte| byte == b';')
        .next()
        .unwrap_or_default()
        .trim_ascii();
    let is_plain =
        !digits.is_empty() && digits.len() <= 15 && digits.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(digits).ok().filter(|_| is_plain);
    text.and_then(|text| u64::from_str_radix(text, 16).ok())
        .ok_or(WireError::Malformed("a chunk's size cannot be read"))
}
