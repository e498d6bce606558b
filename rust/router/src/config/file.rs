//! The settings file: TOML, each key a long flag with underscores for hyphens.

use std::{fs, io, path::Path};

use orchestra_core::config::ConfigIssue;
use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeTable, DeValue, ValueDeserializer},
};

/// Larger files are not settings.
const BYTES_MAX: u64 = 1 << 20;

/// One setting as the file has it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    /// Where, counted from 1.
    pub(super) line: usize,
    /// One text, or those of a list.
    pub(super) values: Vec<String>,
    pub(super) is_list: bool,
}

/// The file's text.
pub(super) fn read(path: &Path) -> Result<String, ConfigIssue> {
    let text = fs::metadata(path).and_then(|metadata| {
        if metadata.len() > BYTES_MAX {
            let message = format!("larger than the limit of {BYTES_MAX} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        fs::read_to_string(path)
    });
    text.map_err(|error| ConfigIssue::new("config", format!("{}: {error}", path.display())))
}

/// A file that was read.
pub(super) struct Document<'a> {
    text: &'a str,
    path: &'a str,
    table: DeTable<'a>,
}

impl<'a> Document<'a> {
    /// Reads TOML. Where it is none there is an issue for each place, and the rest is read.
    pub(super) fn parse(text: &'a str, path: &'a str, issues: &mut Vec<ConfigIssue>) -> Self {
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            issues.push(ConfigIssue::new(format!("{path}:{line}"), error.message()));
        }
        Self {
            text,
            path,
            table: table.into_inner(),
        }
    }

    /// Takes out the tables `[[key]]`. What cannot be read is an issue at its place.
    pub(super) fn take_list<T: DeserializeOwned>(
        &mut self,
        key: &str,
        issues: &mut Vec<ConfigIssue>,
    ) -> Vec<T> {
        let Some(value) = self.table.remove(key) else {
            return Vec::new();
        };
        let place = |offset: usize| format!("{}:{}", self.path, line_of(self.text, offset));
        let begin = value.span().start;
        let DeValue::Array(items) = value.into_inner() else {
            let message = format!("must be tables, each begun by [[{key}]] ({})", place(begin));
            issues.push(ConfigIssue::new(key, message));
            return Vec::new();
        };
        let mut list = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let begin = item.span().start;
            match serde_path_to_error::deserialize(ValueDeserializer::from(item)) {
                Ok(item) => list.push(item),
                Err(error) => {
                    let key = match error.path().to_string().as_str() {
                        "." => format!("{key}[{index}]"),
                        path => format!("{key}[{index}].{path}"),
                    };
                    let error = error.into_inner();
                    let place = place(error.span().map_or(begin, |span| span.start));
                    issues.push(ConfigIssue::new(
                        key,
                        format!("{} ({place})", error.message()),
                    ));
                }
            }
        }
        list
    }

    /// The settings at the top. A value of the wrong shape is an issue.
    pub(super) fn entries(&self, issues: &mut Vec<ConfigIssue>) -> Vec<Entry> {
        let Self { text, path, table } = self;
        let mut entries = Vec::with_capacity(table.len());
        for (key, value) in table {
            let line = line_of(text, key.span().start);
            let key = key.get_ref().to_string();
            match texts(value) {
                Some((values, is_list)) => entries.push(Entry {
                    key,
                    line,
                    values,
                    is_list,
                }),
                None => issues.push(ConfigIssue::new(
                    key,
                    format!(
                        "must be a text, a number, true, false, or a list of these ({path}:{line})"
                    ),
                )),
            }
        }
        // A table of TOML has no order of its own.
        entries.sort_unstable_by_key(|entry| entry.line);
        entries
    }
}

fn texts(value: &Spanned<DeValue<'_>>) -> Option<(Vec<String>, bool)> {
    match value.get_ref() {
        DeValue::Array(items) => {
            let texts: Option<_> = items.iter().map(|item| text(item.get_ref())).collect();
            Some((texts?, true))
        }
        value => Some((vec![text(value)?], false)),
    }
}

fn text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(fact) => Some(fact.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().iter().take(offset);
    1 + before.filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_come_with_their_lines_and_every_fault_is_named() {
        let text = "# limits\nmax_replays = 2\nlog = 'debug'\napi_key = [\n  'a', 'b',\n]\n\n[http]\nx = 1\n";
        let mut issues = Vec::new();
        let entries = Document::parse(text, "r.toml", &mut issues).entries(&mut issues);
        let seen: Vec<_> = entries
            .iter()
            .map(|entry| (entry.key.as_str(), entry.line, entry.values.join(",")))
            .collect();
        let expected = [
            ("max_replays", 2, "2".to_owned()),
            ("log", 3, "debug".to_owned()),
            ("api_key", 4, "a,b".to_owned()),
        ];
        assert_eq!(seen, expected);
        assert_eq!(issues[0].key, "http");
        assert!(issues[0].message.contains("r.toml:8"), "{}", issues[0]);

        let mut issues = Vec::new();
        Document::parse("a = \nb = 1\nc = ]\n", "r.toml", &mut issues);
        let keys: Vec<_> = issues.iter().map(|issue| issue.key.as_str()).collect();
        assert!(
            keys.contains(&"r.toml:1") && keys.contains(&"r.toml:3"),
            "{issues:?}"
        );
    }
}
