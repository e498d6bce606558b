//! The fields of a JSON body, read one by one, so that an error names its field and never repeats what was in it.
//!
//! serde's own messages quote the offending value. Here the body is split into raw fields first (one pass, nothing
//! copied), then each is read as the type that its name calls for, and the message is ours.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{error::Category, value::RawValue};

use crate::error::ApiError;
use orchestra_core::ErrorCode;

/// Most fields of a body. OpenAI's longest request has about forty.
const FIELDS_MAX: usize = 128;

/// The top-level fields of a body, in order. Fields that nobody asks for are ignored, as OpenAI-compatible servers
/// do: a client's newer option must not break it.
pub(crate) struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Splits a body.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let malformed = |message| ApiError::new(ErrorCode::InvalidRequest, message);
        let text = std::str::from_utf8(body).map_err(|error| {
            malformed(format!(
                "the body is not UTF-8 at byte {}",
                error.valid_up_to()
            ))
        })?;
        serde_json::from_str(text).map_err(|error| {
            let what = match error.classify() {
                Category::Syntax | Category::Io => "is not valid JSON",
                Category::Eof => "is not complete JSON",
                Category::Data => "is not a JSON object of at most 128 fields, each given once",
            };
            let (line, column) = (error.line(), error.column());
            malformed(format!("the body {what}: line {line}, column {column}"))
        })
    }

    /// The field as it was written; `null` counts as not given.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a RawValue> {
        let (_, raw) = self.0.iter().find(|(key, _)| key == name)?;
        (raw.get() != "null").then_some(*raw)
    }

    /// All fields, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &'a RawValue)> + '_ {
        self.0.iter().map(|(key, raw)| (&**key, *raw))
    }

    /// The field as `T`, which `expected` puts in words: "a number".
    pub(crate) fn read<T: Deserialize<'a>>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        self.raw(name)
            .map(|raw| read(raw, name, expected))
            .transpose()
    }

    /// A field that must be there.
    pub(crate) fn require<T: Deserialize<'a>>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<T, ApiError> {
        self.read(name, expected)?.ok_or_else(|| missing(name))
    }

    /// A switch, off where it is not given.
    pub(crate) fn switch(&self, name: &str) -> Result<bool, ApiError> {
        Ok(self.read(name, "true or false")?.unwrap_or(false))
    }
}

/// Reads one raw value; `path` is how an error names it.
pub(crate) fn read<'a, T: Deserialize<'a>>(
    raw: &'a RawValue,
    path: &str,
    expected: &str,
) -> Result<T, ApiError> {
    serde_json::from_str(raw.get()).map_err(|error| match error.classify() {
        Category::Data => wrong_type(path, expected),
        // The body as a whole was JSON: what is left are escapes of half characters, numbers beyond all range and
        // nesting beyond all sense.
        Category::Syntax | Category::Eof | Category::Io => {
            ApiError::invalid(path, format!("{path} holds a value that cannot be read"))
        }
    })
}

/// The error for a value of another type.
pub(crate) fn wrong_type(path: &str, expected: &str) -> ApiError {
    ApiError::invalid(path, format!("{path} must be {expected}"))
}

/// The error for a field that is not there.
pub(crate) fn missing(path: &str) -> ApiError {
    ApiError::invalid(path, format!("{path} is required"))
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

/// A key; borrowed unless it was written with escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::with_capacity(16);
        while let Some((Key(key), raw)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
            let is_repeated = fields.iter().any(|(earlier, _)| *earlier == key);
            if is_repeated || fields.len() == FIELDS_MAX {
                return Err(serde::de::Error::custom("repeated, or too many"));
            }
            fields.push((key, raw));
        }
        Ok(Fields(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &[u8]) -> String {
        Fields::parse(body).err().unwrap().message
    }

    #[test]
    fn a_broken_body_says_where() {
        assert_eq!(
            message(b""),
            "the body is not complete JSON: line 1, column 0"
        );
        assert_eq!(
            message(b"{\"a\":"),
            "the body is not complete JSON: line 1, column 5"
        );
        assert_eq!(
            message(b"{\n  \"a\": x\n}"),
            "the body is not valid JSON: line 2, column 8"
        );
        assert_eq!(
            message(b"{\"a\": NaN}"),
            "the body is not valid JSON: line 1, column 7"
        );
        assert_eq!(
            message(b"{} {}"),
            "the body is not valid JSON: line 1, column 4"
        );
        assert_eq!(
            message(b"{\"a\": \"\xff\"}"),
            "the body is not UTF-8 at byte 7"
        );
        let shape = "the body is not a JSON object of at most 128 fields, each given once: line 1";
        assert!(message(b"[]").starts_with(shape), "{}", message(b"[]"));
        assert!(message(b"\"secret\"").starts_with(shape));
        assert!(message(b"{\"a\":1,\"a\":2}").starts_with(shape));
        let many: Vec<_> = (0..129).map(|i| format!("\"k{i}\":0")).collect();
        assert!(message(format!("{{{}}}", many.join(",")).as_bytes()).starts_with(shape));
    }

    #[test]
    fn deep_nesting_in_a_field_is_an_error_and_no_stack_overflow() {
        let deep = format!(
            "{{\"messages\":{}{}}}",
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        let fields = Fields::parse(deep.as_bytes()).unwrap();
        let error = fields
            .read::<serde_json::Value>("messages", "a list")
            .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages"));
    }

    #[test]
    fn fields_are_read_as_their_type() {
        let body = br#"{"a": 1, "b": true, "c": null, "\u0064": "\ud800", "e": 1e999, "f": 1.5}"#;
        let fields = Fields::parse(body).unwrap();
        assert_eq!(fields.read::<u32>("a", "an integer").unwrap(), Some(1));
        assert_eq!(fields.read::<f64>("a", "a number").unwrap(), Some(1.0));
        assert!(fields.switch("b").unwrap());
        assert_eq!(fields.read::<u32>("c", "an integer").unwrap(), None);
        let error = fields.read::<u32>("b", "an integer").unwrap_err();
        assert_eq!(error.message, "b must be an integer");
        assert_eq!(error.param.as_deref(), Some("b"));
        for (field, expected) in [("a", "a string"), ("d", "a string")] {
            assert!(fields.read::<String>(field, expected).is_err());
        }
        assert!(fields.read::<f64>("e", "a number").is_err());
        assert!(fields.read::<u32>("f", "an integer").is_err());
        assert_eq!(
            fields
                .require::<u32>("g", "an integer")
                .unwrap_err()
                .message,
            "g is required"
        );
    }
}
