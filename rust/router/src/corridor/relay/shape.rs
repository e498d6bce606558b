//! What a first reading of JSON passes over: how deep it nests, and halves of characters.

/// The deepest nesting of valid JSON.
pub(super) fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut at) = (0_usize, 0, 0);
    while let Some(&byte) = json.get(at) {
        at += 1;
        match byte {
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => at = end_of_string(json, at),
            _ => {}
        }
    }
    deepest
}

/// Behind the quote that ends the string which began before `at`.
fn end_of_string(json: &[u8], mut at: usize) -> usize {
    while let Some(found) = memchr::memchr2(b'"', b'\\', &json[at.min(json.len())..]) {
        at += found + 1;
        if json[at - 1] == b'"' {
            return at;
        }
        // What is escaped ends nothing.
        at += 1;
    }
    json.len()
}

/// Where valid JSON has a `\u` escape of half a character, which parsers read differently.
pub(super) fn lone_surrogate(json: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(found) = memchr::memchr(b'\\', json.get(at..)?) {
        at += found;
        let Some(unit) = escaped_unit(json, at) else {
            at += 2;
            continue;
        };
        at = match unit {
            0xd800..=0xdbff if matches!(escaped_unit(json, at + 6), Some(0xdc00..=0xdfff)) => {
                at + 12
            }
            0xd800..=0xdfff => return Some(at),
            _ => at + 6,
        };
    }
    None
}

/// The number of the `\u` escape that begins here.
fn escaped_unit(json: &[u8], at: usize) -> Option<u16> {
    let escape = json.get(at..at + 6)?;
    let digits = escape.strip_prefix(b"\\u")?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn brackets_in_strings_are_text() {
        for (json, expected) in [
            ("1", 0),
            ("[]", 1),
            (r#"{"a": [[1], "]]]"]}"#, 3),
            (r#"["[[[[", "\"[[[", "\\", [0]]"#, 2),
        ] {
            assert_eq!(depth(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn halves_of_characters_are_found_and_whole_ones_are_not() {
        for whole in [
            r#""\ud83d\ude00""#,
            r#""\\ud800""#,
            r#""é\n\u0041""#,
            r#""\\\\""#,
            "{}",
        ] {
            assert_eq!(lone_surrogate(whole.as_bytes()), None, "{whole}");
        }
        for (half, at) in [
            (r#""\ud83d""#, 1),
            (r#""\ude00""#, 1),
            (r#""a\ud83d\u0041""#, 2),
            (r#""\\\ud83dx""#, 3),
            (r#""\ud83d\ud83d\ude00""#, 1),
        ] {
            assert_eq!(lone_surrogate(half.as_bytes()), Some(at), "{half}");
        }
    }

    proptest! {
        /// serde refuses exactly the strings with halves of characters.
        #[test]
        fn a_full_parser_agrees(units in proptest::collection::vec(0_u16.., 0..6), plain in "[a-z\\\\]{0,4}") {
            let units = units
                .iter()
                .map(|unit| if unit % 3 == 0 { 0xd800 | (unit & 0x7ff) } else { *unit });
            let mut escapes = String::new();
            for unit in units {
                let _ = write!(escapes, "\\u{unit:04x}");
            }
            let json = format!("\"{}{escapes}\"", plain.replace('\\', "\\\\"));
            let is_read = serde_json::from_str::<String>(&json).is_ok();
            prop_assert_eq!(lone_surrogate(json.as_bytes()).is_none(), is_read, "{}", json);
        }

        #[test]
        fn any_bytes_are_scanned_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = (depth(&bytes), lone_surrogate(&bytes));
        }
    }
}
