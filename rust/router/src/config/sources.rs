//! Where each setting comes from: flag over environment over file over default, per setting.
//!
//! clap reads the flags and holds the defaults. What the environment and the file say is put in the place of the
//! defaults before it does, so each setting has one reader and one default, wherever it is written.

use std::{
    env,
    error::Error as _,
    ffi::OsString,
    fmt::{self, Write as _},
};

use clap::{
    Arg, ArgAction, ArgMatches, Command, builder::Resettable, error::ContextKind,
    error::ContextValue, parser::ValueSource,
};
use orchestra_core::config::ConfigIssue;

use super::file::Entry;
use crate::engines::EngineConfig;

/// Flags about the process's start rather than settings: not in the file.
const NOT_SETTINGS: [&str; 6] = [
    "help",
    "version",
    "config",
    "print_config",
    "check",
    "print_addresses",
];

/// The file's lists of tables.
const LISTS: [&str; 2] = ["engine", "tenant"];

/// Who gave a setting its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nobody.
    Default,
    /// The file, at a line.
    File {
        /// As it was named.
        path: String,
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable.
    Env(String),
    /// The command line.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Flag => f.write_str("flag"),
        }
    }
}

/// One setting in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As the file spells it.
    pub key: String,
    /// One value, those of a list, or none; a key's is `***`.
    pub values: Vec<String>,
    /// Whether it may have several values.
    pub is_list: bool,
    /// Who gave it.
    pub source: Source,
}

/// The settings in effect as a file that could be read again, but for the keys. `engines` are those of the file.
pub fn to_toml(settings: &[Setting], engines: &[EngineConfig]) -> String {
    let mut text = String::new();
    for setting in settings {
        let values: Vec<_> = setting.values.iter().map(|value| literal(value)).collect();
        let Setting { key, source, .. } = setting;
        let _ = match (setting.is_list, values.first()) {
            (true, _) => writeln!(text, "{key} = [{}] # {source}", values.join(", ")),
            (false, Some(value)) => writeln!(text, "{key} = {value} # {source}"),
            (false, None) => writeln!(text, "# {key} is not set"),
        };
    }
    for engine in engines {
        // Texts and numbers, which TOML can say.
        let engine = toml::to_string(engine).unwrap_or_default();
        let _ = write!(text, "\n[[engine]] # file\n{engine}");
    }
    text
}

/// Numbers and truth values bare, the rest in quotes.
fn literal(value: &str) -> String {
    let is_bare = value.parse::<i64>().is_ok() || value.parse::<bool>().is_ok();
    if is_bare {
        value.to_owned()
    } else {
        toml::Value::from(value).to_string()
    }
}

/// What the environment and the file say, put under the flags.
pub(super) struct Layers {
    /// Reads the flags; its defaults are those of the layers below.
    pub(super) command: Command,
    sources: Vec<(String, Source)>,
}

impl Layers {
    /// Takes in what `given`, the flags alone, left open. `entries` come from the file at `path`.
    pub(super) fn new(
        command: &Command,
        given: &ArgMatches,
        (entries, path): (&[Entry], &str),
        issues: &mut Vec<ConfigIssue>,
    ) -> Self {
        check_names(command, entries, path, issues);
        let mut layers = Self {
            command: without_environment(command.clone()),
            sources: Vec::new(),
        };
        for arg in settings(command) {
            let key = key_of(arg);
            if given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
                layers.sources.push((key, Source::Flag));
                continue;
            }
            let entry = entries.iter().find(|entry| entry.key == key);
            if let Some((name, values)) = from_environment(arg, &key, issues) {
                layers.put(arg, key, values, Source::Env(name), issues);
            } else if let Some(entry) = entry {
                let source = Source::File {
                    path: path.to_owned(),
                    line: entry.line,
                };
                if entry.is_list && !is_list(arg) {
                    let message = format!("must be one value, not a list ({source})");
                    issues.push(ConfigIssue::new(key, message));
                } else {
                    layers.put(arg, key, entry.values.clone(), source, issues);
                }
            }
        }
        layers
    }

    fn put(
        &mut self,
        arg: &Arg,
        key: String,
        values: Vec<String>,
        source: Source,
        issues: &mut Vec<ConfigIssue>,
    ) {
        if let Err(reason) = check_values(&self.command, arg, &values) {
            issues.push(ConfigIssue::new(key, format!("{reason} ({source})")));
            return;
        }
        let command = std::mem::take(&mut self.command);
        self.command = command.mut_arg(arg.get_id(), |arg| arg.default_values(values));
        self.sources.push((key, source));
    }

    /// Who gave the setting its value.
    pub(super) fn source_of(&self, key: &str) -> Source {
        let found = self.sources.iter().find(|(named, _)| named == key);
        found.map_or(Source::Default, |(_, source)| source.clone())
    }

    /// Every setting with its value in `matches`, which [`Self::command`] read; in the order of `command`, that of the
    /// help.
    pub(super) fn settings(&self, command: &Command, matches: &ArgMatches) -> Vec<Setting> {
        let in_effect = |arg: &Arg| {
            let key = key_of(arg);
            let raw = matches.get_raw(arg.get_id().as_str());
            let values = raw.into_iter().flatten().map(|value| {
                if arg.is_hide_env_values_set() {
                    "***".to_owned()
                } else {
                    value.to_string_lossy().into_owned()
                }
            });
            Setting {
                values: values.collect(),
                is_list: is_list(arg),
                source: self.source_of(&key),
                key,
            }
        };
        settings(command).map(in_effect).collect()
    }
}

/// The environment is read here and not by clap, which stops at the first variable that it cannot use.
pub(super) fn without_environment(command: Command) -> Command {
    command.mut_args(|arg| arg.env(Resettable::Reset))
}

fn settings(command: &Command) -> impl Iterator<Item = &Arg> {
    let is_setting = |arg: &&Arg| !NOT_SETTINGS.contains(&key_of(arg).as_str());
    command.get_arguments().filter(is_setting)
}

fn key_of(arg: &Arg) -> String {
    arg.get_long().unwrap_or_default().replace('-', "_")
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

/// Refuses keys that are no setting's.
fn check_names(command: &Command, entries: &[Entry], path: &str, issues: &mut Vec<ConfigIssue>) {
    let known: Vec<_> = settings(command).map(key_of).collect();
    let lists = LISTS.map(str::to_owned);
    let named: Vec<_> = known.iter().chain(&lists).collect();
    for entry in entries.iter().filter(|entry| !known.contains(&entry.key)) {
        let distance = |key: &&&String| strsim::damerau_levenshtein(key, &entry.key);
        let nearest = named.iter().min_by_key(distance).map_or("", |key| key);
        let line = entry.line;
        let message = format!("there is no such setting; did you mean {nearest}? ({path}:{line})");
        issues.push(ConfigIssue::new(entry.key.clone(), message));
    }
}

fn from_environment(
    arg: &Arg,
    key: &str,
    issues: &mut Vec<ConfigIssue>,
) -> Option<(String, Vec<String>)> {
    let name = arg.get_env()?.to_str()?.to_owned();
    let Ok(value) = env::var_os(&name)?.into_string() else {
        let message = format!("is not UTF-8 (env {name})");
        issues.push(ConfigIssue::new(key, message));
        return None;
    };
    let values = match arg.get_value_delimiter() {
        Some(delimiter) => value.split(delimiter).map(str::to_owned).collect(),
        None => vec![value],
    };
    Some((name, values))
}

/// Whether clap takes these values for the setting, each tried as a flag.
fn check_values(command: &Command, arg: &Arg, values: &[String]) -> Result<(), String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        let is_fact = |value: &String| value.parse::<bool>().is_ok();
        let are_facts = values.iter().all(is_fact);
        return if are_facts {
            Ok(())
        } else {
            Err("must be true or false".to_owned())
        };
    }
    let flag = arg.get_long().unwrap_or_default();
    let try_one = |value: &String| {
        let arguments = [OsString::new(), format!("--{flag}={value}").into()];
        let tried = command.clone().try_get_matches_from(arguments);
        tried.map(drop).map_err(|error| reason(&error))
    };
    values.iter().try_for_each(try_one)
}

/// clap's words are about a flag; what is wrong with the value is in its parts.
fn reason(error: &clap::Error) -> String {
    match (error.get(ContextKind::ValidValue), error.source()) {
        (Some(ContextValue::Strings(valid)), _) if !valid.is_empty() => {
            format!("must be one of {}", valid.join(", "))
        }
        (_, Some(source)) => source.to_string(),
        _ => "cannot be used".to_owned(),
    }
}
