//! Settings with a unit in them: `250ms`, `16MiB`, and keys that must not be printed.

use std::{fmt, str::FromStr, time::Duration};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error as _, IgnoredAny},
};

/// A time span as people write it: `250ms`, `30s`, `10m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Self)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// A number of bytes: `512KiB`, `16MiB`, `1GiB`, or plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

/// Largest first, so that [`fmt::Display`] picks the shortest spelling.
const UNITS: [(&str, usize); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

impl FromStr for ByteSize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
            .unwrap_or((text, 1));
        digits
            .trim()
            .parse::<usize>()
            .ok()
            .and_then(|count| count.checked_mul(unit))
            .map(Self)
            .ok_or("expected a whole number of bytes, or of KiB, MiB or GiB, such as 16MiB")
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS
            .iter()
            .find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit));
        match whole {
            Some((suffix, unit)) => write!(f, "{}{suffix}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A key that must not be seen: it does not print, and it is compared in constant time.
#[derive(Clone)]
pub struct Secret(Box<[u8]>);

impl Secret {
    /// Whether `given` is this key. How long it takes tells nothing but the length.
    pub fn matches(&self, given: &[u8]) -> bool {
        use subtle::ConstantTimeEq as _;
        self.0.ct_eq(given).into()
    }

    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it can be sent in a header.
    pub fn is_header_value(&self) -> bool {
        self.0.iter().all(u8::is_ascii_graphic)
    }

    /// The key itself, to be sent and not to be shown.
    pub(crate) fn reveal(&self) -> &[u8] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.matches(&other.0)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// A key, or whatever stands in its place: serde's own errors would repeat that.
#[derive(Deserialize)]
#[serde(untagged)]
enum KeyText {
    One(String),
    Many(Vec<String>),
    Other(IgnoredAny),
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match KeyText::deserialize(deserializer)? {
            KeyText::One(text) => Ok(text.as_str().into()),
            KeyText::Many(_) | KeyText::Other(_) => Err(D::Error::custom("must be a text")),
        }
    }
}

/// Reads keys from a text or a list of texts.
pub(crate) fn secrets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Secret>, D::Error> {
    match KeyText::deserialize(deserializer)? {
        KeyText::One(text) => Ok(vec![text.as_str().into()]),
        KeyText::Many(texts) => Ok(texts.iter().map(|text| text.as_str().into()).collect()),
        KeyText::Other(_) => Err(D::Error::custom("must be a text or a list of texts")),
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.into())
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_they_print() {
        for text in ["0", "1", "1000", "1KiB", "16MiB", "3GiB"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
        assert_eq!("64 MiB".parse(), Ok(ByteSize(64 << 20)));
        for text in ["", "MiB", "-1", "1.5MiB", "16MB", "99999999999GiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn spans_read_as_they_print() {
        for text in ["250ms", "30s", "10m"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        assert!("30".parse::<Span>().is_err());
    }

    #[test]
    fn secrets_compare_and_do_not_print() {
        let secret: Secret = "sk-1".parse().unwrap();
        assert!(secret.matches(b"sk-1"));
        assert!(!secret.matches(b"sk-2") && !secret.matches(b"sk-11") && !secret.matches(b""));
        assert_eq!(format!("{secret:?}"), "***");
    }
}
