//! Reads `MessagePack` in place, as much of it as KV events need.
//!
//! By hand and not by `serde`: fields are found by name or by position depending on the engine's version, their types
//! vary with it too, and nothing may be allocated in a size that the bytes do not bear out.

/// Longest list: tokens of one step are far fewer.
const LIST_MAX: usize = 1 << 20;

/// The bytes are not what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the MessagePack that was expected")]
pub(super) struct Unreadable;

/// The head of a value; of an array or a map, how many values or pairs follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Head<'a> {
    Nil,
    /// Any integer; a negative one as its two's complement.
    Integer(u64),
    /// A string, whether or not it is UTF-8, or bytes.
    Bytes(&'a [u8]),
    Array(u32),
    Map(u32),
    /// A boolean, a float or an extension: nothing here is made of them.
    Other,
}

/// A place in the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not read yet: no value takes less than one.
    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Unreadable> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Unreadable)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A big-endian number of so many bytes, at most 8.
    fn number(&mut self, len: usize) -> Result<u64, Unreadable> {
        let bytes = self.take(len)?;
        Ok(bytes
            .iter()
            .fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    }

    fn signed(&mut self, len: usize) -> Result<u64, Unreadable> {
        let shift = 64 - 8 * len as u32;
        let value = self.number(len)? << shift;
        Ok((value.cast_signed() >> shift).cast_unsigned())
    }

    fn bytes(&mut self, len: u64) -> Result<Head<'a>, Unreadable> {
        let len = usize::try_from(len).map_err(|_| Unreadable)?;
        Ok(Head::Bytes(self.take(len)?))
    }

    /// Passes over the payload of something that is not needed.
    fn other(&mut self, len: u64) -> Result<Head<'a>, Unreadable> {
        self.bytes(len)?;
        Ok(Head::Other)
    }

    /// The next value's head; a scalar is read whole.
    pub(super) fn head(&mut self) -> Result<Head<'a>, Unreadable> {
        let tag = self.take(1)?[0];
        match tag {
            0x00..=0x7f => Ok(Head::Integer(tag.into())),
            0x80..=0x8f => Ok(Head::Map((tag & 0x0f).into())),
            0x90..=0x9f => Ok(Head::Array((tag & 0x0f).into())),
            0xa0..=0xbf => self.bytes((tag & 0x1f).into()),
            0xc0 => Ok(Head::Nil),
            0xc1 => Err(Unreadable),
            0xc2 | 0xc3 => Ok(Head::Other),
            0xc4..=0xc6 => {
                let len = self.number(1 << (tag - 0xc4))?;
                self.bytes(len)
            }
            0xc7..=0xc9 => {
                let len = self.number(1 << (tag - 0xc7))?;
                self.other(len + 1)
            }
            0xca => self.other(4),
            0xcb => self.other(8),
            0xcc..=0xcf => Ok(Head::Integer(self.number(1 << (tag - 0xcc))?)),
            0xd0..=0xd3 => Ok(Head::Integer(self.signed(1 << (tag - 0xd0))?)),
            0xd4..=0xd8 => self.other((1 << (tag - 0xd4)) + 1),
            0xd9..=0xdb => {
                let len = self.number(1 << (tag - 0xd9))?;
                self.bytes(len)
            }
            0xdc | 0xdd => Ok(Head::Array(self.number(2 << (tag - 0xdc))? as u32)),
            0xde | 0xdf => Ok(Head::Map(self.number(2 << (tag - 0xde))? as u32)),
            0xe0..=0xff => Ok(Head::Integer(i64::from(tag.cast_signed()).cast_unsigned())),
        }
    }

    /// Passes over one value, however deep. Returns its bytes.
    pub(super) fn skip(&mut self) -> Result<&'a [u8], Unreadable> {
        let before = self.rest;
        // Each value takes a byte at least, so this ends with the bytes.
        let mut left = 1_u64;
        while left > 0 {
            left -= 1;
            match self.head()? {
                Head::Array(len) => left += u64::from(len),
                Head::Map(len) => left += 2 * u64::from(len),
                _ => {}
            }
        }
        Ok(&before[..before.len() - self.rest.len()])
    }

    pub(super) fn array(&mut self) -> Result<u32, Unreadable> {
        match self.head()? {
            Head::Array(len) => Ok(len),
            _ => Err(Unreadable),
        }
    }

    pub(super) fn integer(&mut self) -> Result<u64, Unreadable> {
        match self.head()? {
            Head::Integer(value) => Ok(value),
            _ => Err(Unreadable),
        }
    }

    pub(super) fn text(&mut self) -> Result<&'a str, Unreadable> {
        match self.head()? {
            Head::Bytes(bytes) => std::str::from_utf8(bytes).map_err(|_| Unreadable),
            _ => Err(Unreadable),
        }
    }

    /// A value that may be nil.
    pub(super) fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Unreadable>,
    ) -> Result<Option<T>, Unreadable> {
        if self.rest.first() == Some(&0xc0) {
            self.rest = &self.rest[1..];
            return Ok(None);
        }
        read(self).map(Some)
    }

    /// An array of at most [`LIST_MAX`] values that are all read alike.
    pub(super) fn list<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, Unreadable>,
    ) -> Result<Vec<T>, Unreadable> {
        let len = self.array()? as usize;
        if len > LIST_MAX {
            return Err(Unreadable);
        }
        let mut values = Vec::with_capacity(len.min(self.len()));
        for _ in 0..len {
            values.push(read(self)?);
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn every_form_of_a_value_is_read() {
        let cases: [(&[u8], Head<'_>); 16] = [
            (&[0x7f], Head::Integer(127)),
            (&[0xff], Head::Integer(u64::MAX)),
            (&[0xcc, 200], Head::Integer(200)),
            (&[0xcd, 1, 0], Head::Integer(256)),
            (&[0xce, 0, 1, 0, 0], Head::Integer(65_536)),
            (&[0xcf, 1, 0, 0, 0, 0, 0, 0, 0], Head::Integer(1 << 56)),
            (&[0xd0, 0x80], Head::Integer((-128_i64).cast_unsigned())),
            (&[0xd1, 0xff, 0xfe], Head::Integer((-2_i64).cast_unsigned())),
            (&[0xc0], Head::Nil),
            (&[0xc3], Head::Other),
            (&[0xcb, 0, 0, 0, 0, 0, 0, 0, 0], Head::Other),
            (&[0xd5, 1, 2, 3], Head::Other),
            (&[0xa2, b'h', b'i'], Head::Bytes(b"hi")),
            (&[0xc4, 1, 9], Head::Bytes(&[9])),
            (&[0xdc, 0, 0], Head::Array(0)),
            (&[0x82, 1, 2, 3, 4], Head::Map(2)),
        ];
        for (bytes, head) in cases {
            assert_eq!(Reader::new(bytes).head(), Ok(head));
            let mut reader = Reader::new(bytes);
            assert_eq!(reader.skip(), Ok(bytes));
            assert_eq!(reader.len(), 0);
            let cut = &bytes[..bytes.len() - 1];
            assert_eq!(Reader::new(cut).skip(), Err(Unreadable), "{bytes:?}");
        }
    }

    #[test]
    fn a_length_that_the_bytes_do_not_bear_out_is_refused() {
        let claims: [&[u8]; 3] = [
            &[0xdd, 0xff, 0xff, 0xff, 0xff],
            &[0xdf, 0xff, 0xff, 0xff, 0xff],
            &[0xdb, 0xff, 0xff, 0xff, 0xff],
        ];
        for claim in claims {
            assert_eq!(Reader::new(claim).skip(), Err(Unreadable));
            assert_eq!(Reader::new(claim).list(Reader::integer), Err(Unreadable));
        }
    }

    proptest! {
        #[test]
        fn what_another_writer_wrote_is_passed_over_whole(
            numbers in prop::collection::vec(any::<i64>(), 0..20),
            text in ".{0,40}",
            depth in 0_usize..40,
        ) {
            let mut value = json!({"numbers": numbers, "text": text, "nothing": null, "float": 0.5});
            for _ in 0..depth {
                value = Value::Array(vec![value, json!(true)]);
            }
            let bytes = super::super::testing::to_msgpack(&value);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.skip().map(<[u8]>::len), Ok(bytes.len()));
        }
    }
}
