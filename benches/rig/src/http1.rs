//! As much HTTP/1.1 as a mock engine and a load generator need, by hand: the engine has to send broken framing too, and
//! neither may cost more than what it measures.

use std::{io, time::Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// The largest head that is read.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// The largest body that is read: above every limit that a router under test has.
pub const BODY_BYTES_MAX: usize = 256 << 20;
/// Room made before each read.
const READ_BYTES: usize = 16 << 10;

/// What a head says about its body and its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the head with its blank line.
    pub len: usize,
    /// Where the first line ends.
    pub first_line: usize,
    /// How long the body is.
    pub body: BodyLength,
    /// Whether the peer asked to close after this message.
    pub closes: bool,
}

/// How a message's end is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    /// `Content-Length`.
    Bytes(usize),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// Neither was given.
    Unsaid,
}

impl Head {
    /// The head at the beginning of `input`, once it is whole.
    pub fn parse(input: &[u8]) -> io::Result<Option<Self>> {
        let Some(len) = input.windows(4).position(|four| four == b"\r\n\r\n") else {
            let is_long = input.len() > HEAD_BYTES_MAX;
            return if is_long {
                Err(invalid("a head without end"))
            } else {
                Ok(None)
            };
        };
        let mut lines = input[..len].split(|byte| *byte == b'\n');
        let first_line = lines.next().map_or(0, |line| line.trim_ascii_end().len());
        let mut head = Self {
            len: len + 4,
            first_line,
            body: BodyLength::Unsaid,
            closes: false,
        };
        for line in lines {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else {
                return Err(invalid("a header without a colon"));
            };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if name.eq_ignore_ascii_case(b"content-length") {
                let length = str::from_utf8(value)
                    .ok()
                    .and_then(|text| text.parse().ok());
                head.body =
                    BodyLength::Bytes(length.ok_or_else(|| invalid("a bad Content-Length"))?);
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                head.body = BodyLength::Chunked;
            } else if name.eq_ignore_ascii_case(b"connection") {
                head.closes = value.eq_ignore_ascii_case(b"close");
            }
        }
        Ok(Some(head))
    }
}

/// Takes the frames off a chunked body, however it was cut into reads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chunked {
    state: ChunkState,
}

#[derive(Clone, Copy, Debug, Default)]
enum ChunkState {
    /// In the line with the size; what was read of it, and whether a digit was.
    #[default]
    Start,
    Size(usize),
    Data(usize),
    /// In the line end after the data.
    DataEnd,
    /// In the trailer after the last chunk; whether its line is empty so far.
    Trailer(bool),
}

impl Chunked {
    /// Appends the data in `input` to `out`. Returns the bytes taken, and whether the body is over.
    pub fn decode(&mut self, input: &[u8], out: &mut Vec<u8>) -> io::Result<(usize, bool)> {
        let mut at = 0;
        while at < input.len() {
            if let ChunkState::Data(left) = self.state {
                let take = left.min(input.len() - at);
                out.extend_from_slice(&input[at..at + take]);
                at += take;
                self.state = if take == left {
                    ChunkState::DataEnd
                } else {
                    ChunkState::Data(left - take)
                };
                continue;
            }
            let byte = input[at];
            at += 1;
            if self.line(byte)? {
                return Ok((at, true));
            }
        }
        Ok((at, false))
    }

    /// Takes one byte outside the data; whether it was the body's last.
    fn line(&mut self, byte: u8) -> io::Result<bool> {
        use ChunkState::{Data, DataEnd, Size, Start, Trailer};
        self.state = match (self.state, byte) {
            (DataEnd | Size(_) | Trailer(_), b'\r') => return Ok(false),
            (DataEnd, b'\n') => Start,
            (Trailer(is_empty), b'\n') => {
                self.state = Trailer(true);
                return Ok(is_empty);
            }
            (Trailer(_), _) => Trailer(false),
            (Size(0), b'\n') => Trailer(true),
            (Size(size), b'\n') => Data(size),
            (Start, digit) => Size(hex(digit)?),
            (Size(size), digit) if size < BODY_BYTES_MAX => Size(size << 4 | hex(digit)?),
            _ => return Err(invalid("broken chunk framing")),
        };
        Ok(false)
    }
}

fn hex(digit: u8) -> io::Result<usize> {
    let value = char::from(digit).to_digit(16);
    value
        .map(|value| value as usize)
        .ok_or_else(|| invalid("broken chunk framing"))
}

/// Where in a body its reader is.
#[derive(Clone, Copy, Debug)]
pub enum BodyReader {
    /// This many bytes are left.
    Bytes(usize),
    /// Inside chunks.
    Chunked(Chunked),
    /// Until the peer closes.
    ToEnd,
}

/// A connection with what was read ahead.
pub struct Connection {
    /// The socket.
    pub stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are used up.
    used: usize,
}

impl Connection {
    /// Takes a connected socket.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::with_capacity(READ_BYTES),
            used: 0,
        })
    }

    /// What was read and not used.
    pub fn ahead(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Drops the next `count` bytes of [`Self::ahead`].
    pub fn skip(&mut self, count: usize) {
        self.used += count;
        if self.used == self.buffer.len() {
            self.buffer.clear();
            self.used = 0;
        }
    }

    /// Reads once; 0 is the end.
    pub async fn fill(&mut self) -> io::Result<usize> {
        self.buffer.reserve(READ_BYTES);
        self.stream.read_buf(&mut self.buffer).await
    }

    /// The next head, left in [`Self::ahead`]; `None` where the peer closed instead.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(head) = Head::parse(self.ahead())? {
                return Ok(Some(head));
            }
            if self.fill().await? == 0 {
                let between = self.ahead().is_empty();
                return if between { Ok(None) } else { Err(cut()) };
            }
        }
    }

    /// Appends what has arrived of a body to `out`, reading once where nothing has; whether more is to come.
    pub async fn body(&mut self, reader: &mut BodyReader, out: &mut Vec<u8>) -> io::Result<bool> {
        if matches!(reader, BodyReader::Bytes(0)) {
            return Ok(false);
        }
        if self.ahead().is_empty() && self.fill().await? == 0 {
            return if matches!(reader, BodyReader::ToEnd) {
                Ok(false)
            } else {
                Err(cut())
            };
        }
        let ahead = &self.buffer[self.used..];
        let (taken, is_over) = match reader {
            BodyReader::Bytes(left) => {
                let take = (*left).min(ahead.len());
                out.extend_from_slice(&ahead[..take]);
                *left -= take;
                (take, *left == 0)
            }
            BodyReader::Chunked(chunked) => chunked.decode(ahead, out)?,
            BodyReader::ToEnd => {
                out.extend_from_slice(ahead);
                (ahead.len(), false)
            }
        };
        self.skip(taken);
        if out.len() > BODY_BYTES_MAX {
            return Err(invalid("a body above the limit"));
        }
        Ok(!is_over)
    }

    /// Writes all of `bytes`.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Returns when the peer has closed or reset; when it noticed. What the peer sends meanwhile is kept for later, up to the
    /// size of one head: a peer that pipelines more is not watched any further.
    pub async fn closed(&mut self) -> Instant {
        while self.ahead().len() <= HEAD_BYTES_MAX {
            if !matches!(self.fill().await, Ok(1..)) {
                return Instant::now();
            }
        }
        std::future::pending().await
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the message was cut")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let head = b"POST /x HTTP/1.1\r\nContent-Length: 12\r\nConnection: Close\r\n\r\nrest";
        for cut in 0..head.len() - 4 {
            assert_eq!(Head::parse(&head[..cut]).unwrap(), None);
        }
        let parsed = Head::parse(head).unwrap().unwrap();
        assert_eq!(&head[..parsed.first_line], b"POST /x HTTP/1.1");
        assert_eq!(&head[parsed.len..], b"rest");
        assert_eq!((parsed.body, parsed.closes), (BodyLength::Bytes(12), true));
    }

    #[test]
    fn a_head_that_is_none_is_refused() {
        for bad in ["X\r\nno colon\r\n\r\n", "X\r\nContent-Length: -1\r\n\r\n"] {
            assert!(Head::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(Head::parse(&vec![b'a'; HEAD_BYTES_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn chunks_are_undone_however_they_are_cut(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
            step in 1usize..20,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend(format!("{:x}\r\n", chunk.len()).bytes());
                wire.extend(chunk);
                wire.extend(b"\r\n");
            }
            wire.extend(b"0\r\n\r\nnext");
            let (mut chunked, mut out, mut taken, mut is_over) = (Chunked::default(), Vec::new(), 0, false);
            while !is_over {
                let end = wire.len().min(taken + step);
                let (used, over) = chunked.decode(&wire[taken..end], &mut out).unwrap();
                prop_assert!(used > 0);
                taken += used;
                is_over = over;
            }
            prop_assert_eq!(out, chunks.concat());
            prop_assert_eq!(&wire[taken..], b"next");
        }
    }

    #[test]
    fn broken_framing_is_an_error() {
        for bad in ["zz\r\n", "\r\n", "3\r\nabcd\r\n", "fffffffffffffffffff\r\n"] {
            assert!(
                Chunked::default()
                    .decode(bad.as_bytes(), &mut Vec::new())
                    .is_err(),
                "{bad}"
            );
        }
    }
}
