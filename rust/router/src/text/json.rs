//! JSON as Python writes it, for chat templates: models were trained on prompts that `json.dumps` wrote.

use std::fmt::Write as _;

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

/// Deeper values than a request can bring; a template that builds one is stopped.
const DEPTH_MAX: usize = 160;

/// The `tojson` filter with the arguments that Hugging Face's templates know.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
pub(super) fn to_json(
    value: &Value,
    ensure_ascii: Option<bool>,
    args: Kwargs,
) -> Result<Value, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => return Err(invalid("separators must be a pair of strings")),
        None if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        None => [", ".to_owned(), ": ".to_owned()],
    };
    let mut writer = Writer {
        out: String::new(),
        indent,
        item_separator: item,
        key_separator: key,
        ensure_ascii: match args.get::<Option<bool>>("ensure_ascii")? {
            Some(given) => given,
            None => ensure_ascii.unwrap_or(false),
        },
        sort_keys: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

struct Writer {
    out: String,
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(invalid("the value is nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', ']', &items, depth, |writer, item| {
                    writer.value(item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.items('{', '}', &keys, depth, |writer, key| {
                    // JSON keys are strings; `to_string` spells the others.
                    writer.string(&key.to_string());
                    let separator = writer.key_separator.clone();
                    writer.out.push_str(&separator);
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            _ => return Err(invalid("the value has no JSON form")),
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out
                .extend(std::iter::repeat_n(' ', indent.min(16) * depth));
        }
    }

    fn number(&mut self, value: &Value) {
        let float = f64::try_from(value.clone())
            .ok()
            .filter(|_| !value.is_integer());
        match float {
            Some(float) => self.out.push_str(&python_float(float)),
            None => self.out.push_str(&value.to_string()),
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                character if character < ' ' || (self.ensure_ascii && !character.is_ascii()) => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                character => self.out.push(character),
            }
        }
        self.out.push('"');
    }
}

/// The shortest digits that read back as `float`, as Python's `repr` arranges them: `1e-5` is `1e-05`.
fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 {
            "Infinity".to_owned()
        } else {
            "-Infinity".to_owned()
        };
    }
    let shortest = format!("{float:?}");
    match shortest.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent
                .strip_prefix('-')
                .map_or(('+', exponent), |e| ('-', e));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => shortest,
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context, value::Serde};

    use super::*;

    fn render(expression: &str, value: serde_json::Value) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", to_json);
        let source = format!("{{{{ value | {expression} }}}}");
        environment
            .render_str(&source, context! { value => Value::from(Serde(value)) })
            .unwrap()
    }

    /// The expected strings are what Python's `json.dumps` prints.
    #[test]
    fn writes_what_python_writes() {
        let value = serde_json::json!({"b": [1, 2.0, 1e-4, 1.5e-5, 1e16, true, null], "a": "é\"\n\u{1}<&'"});
        assert_eq!(
            render("tojson", value.clone()),
            r#"{"b": [1, 2.0, 0.0001, 1.5e-05, 1e+16, true, null], "a": "é\"\n\u0001<&'"}"#
        );
        assert_eq!(
            render(
                "tojson(ensure_ascii=true, sort_keys=true)",
                serde_json::json!({"b": "😀", "a": {}})
            ),
            r#"{"a": {}, "b": "\ud83d\ude00"}"#
        );
        assert_eq!(
            render("tojson(indent=2)", serde_json::json!({"a": [1, {"b": []}]})),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ]\n}"
        );
        assert_eq!(
            render(
                "tojson(separators=(',', ':'))",
                serde_json::json!([1, {"a": 2}])
            ),
            r#"[1,{"a":2}]"#
        );
    }
}
