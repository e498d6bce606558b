//! What a first reading of JSON passes over: how deep it nests, halves of characters, and who says what.

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

/// Whether valid JSON is a list of objects, one at least, each with one `role` that is a string of 1 to `bytes_max`
/// bytes. False where that takes a closer look: where a key has escapes, for one. A chat of the usual form is passed
/// over much faster so than parsed, for its long strings are not looked at byte by byte.
pub(super) fn have_roles(json: &[u8], bytes_max: usize) -> bool {
    let mut walk = Walk { json, at: 0 };
    if walk.take(b'[').is_none() {
        return false;
    }
    loop {
        if walk.object_has_role(bytes_max) != Some(true) {
            return false;
        }
        if walk.take(b',').is_none() {
            return walk.take(b']').is_some();
        }
    }
}

/// A place in valid JSON.
struct Walk<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    /// Steps behind `byte`, where that comes next.
    fn take(&mut self, byte: u8) -> Option<()> {
        let rest = self.json.get(self.at..)?;
        self.at += rest.len() - rest.trim_ascii_start().len();
        (*self.json.get(self.at)? == byte).then(|| self.at += 1)
    }

    /// Steps behind a string: what is between its quotes.
    fn string(&mut self) -> Option<&'a [u8]> {
        self.take(b'"')?;
        let begin = self.at;
        self.at = end_of_string(self.json, begin);
        self.json.get(begin..self.at - 1)
    }

    /// Steps behind an object: whether it has a role.
    fn object_has_role(&mut self, bytes_max: usize) -> Option<bool> {
        self.take(b'{')?;
        let mut num_roles = 0;
        loop {
            let key = self.string()?;
            self.take(b':')?;
            if key == b"role" {
                let role = self.string()?;
                num_roles += usize::from((1..=bytes_max).contains(&role.len()));
            } else if key.contains(&b'\\') {
                return None;
            } else {
                self.value()?;
            }
            if self.take(b',').is_none() {
                self.take(b'}')?;
                return Some(num_roles == 1);
            }
        }
    }

    /// Steps behind any value.
    fn value(&mut self) -> Option<()> {
        if self.string().is_some() {
            return Some(());
        }
        let mut depth = 0_usize;
        while let Some(&byte) = self.json.get(self.at) {
            match byte {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'[' | b'{' => depth += 1,
                b',' | b']' | b'}' if depth == 0 => return Some(()),
                b']' | b'}' => depth -= 1,
                _ => {}
            }
            self.at += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn any_value() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<i32>().prop_map(serde_json::Value::from),
            "[a-z\"\\\\\\[{,}\\]é]{0,9}".prop_map(serde_json::Value::from),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(serde_json::Value::from),
                proptest::collection::btree_map("role|b", inner, 0..2)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

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

    #[test]
    fn usual_chats_are_known_at_a_glance() {
        for usual in [
            r#"[{"role":"user","content":"hi"}]"#,
            r#" [ { "content" : "a\"}," , "role" : "user" } , {"role":"a","x":[{"role":1}],"y":{},"z":-1.5e3} ] "#,
            r#"[{"role":"\u0075"}]"#,
        ] {
            assert!(have_roles(usual.as_bytes(), 8), "{usual}");
        }
        for other in [
            "{}",
            "[]",
            "[1]",
            "[{}]",
            r#"[{"role":"user"},{}]"#,
            r#"[{"role":"user"},1]"#,
            r#"[{"role":""}]"#,
            r#"[{"role":"too long it is"}]"#,
            r#"[{"role":null}]"#,
            r#"[{"role":1}]"#,
            r#"[{"role":"a","role":"b"}]"#,
            r#"[{"x":{"role":"user"}}]"#,
            r#"[{"content":"\"role\":\"user\""}]"#,
            r#"[{"role":"user","r\u006fle":"user"}]"#,
        ] {
            assert!(!have_roles(other.as_bytes(), 8), "{other}");
        }
    }

    proptest! {
        /// Whatever is known at a glance, the parser takes as well.
        #[test]
        fn a_glance_agrees_with_the_parser(
            messages in proptest::collection::vec(
                proptest::collection::vec(("role|content|x\"|name", any_value()), 0..4),
                0..4,
            ),
        ) {
            let objects: Vec<String> = messages
                .iter()
                .map(|fields| {
                    let written: Vec<String> = fields
                        .iter()
                        .map(|(key, value)| format!("{} : {value}", serde_json::json!(key)))
                        .collect();
                    format!("{{{}}}", written.join(", "))
                })
                .collect();
            let json = format!("[{}]", objects.join(" ,"));
            let expected = !messages.is_empty() && messages.iter().all(|fields| {
                let roles: Vec<_> = fields.iter().filter(|(key, _)| key == "role").collect();
                matches!(&roles[..], [(_, serde_json::Value::String(role))] if (1..=8).contains(&(serde_json::json!(role).to_string().len() - 2)))
            });
            let has_escaped_key = messages.iter().flatten().any(|(key, _)| key == "x\"");
            let found = have_roles(json.as_bytes(), 8);
            prop_assert!(found == expected || has_escaped_key && !found, "{}", json);
        }

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
