//! Engines from a file that is watched: whoever starts and stops engines writes them there.
//!
//! TOML with one `[[engine]]` table for each, or JSON: a list, or an object with the list under `engine`. A file that
//! cannot be read, or has a mistake anywhere in it, changes nothing. An engine that is taken out of it gets no new
//! requests, and leaves once it has none; one whose settings changed leaves at once and comes back with the new ones.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use orchestra_core::config::ConfigIssue;
use serde::Deserialize;
use tokio::time::{self, MissedTickBehavior};

use super::{EngineConfig, follower::Follower};
use crate::state::RouterState;

/// How often the file is looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// The largest file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Why the engines of a file are not taken over. Nothing in the file is repeated: there may be keys in it.
#[derive(Debug, thiserror::Error)]
pub enum EnginesFileError {
    /// It is not there, or not ours to read.
    #[error("it cannot be read ({0})")]
    Io(io::ErrorKind),
    /// Above the limit.
    #[error("it has more than {FILE_BYTES_MAX} bytes")]
    TooLarge,
    /// Neither TOML nor JSON, or not of the shape that is expected.
    #[error("it is no list of engines: line {line}")]
    Malformed {
        /// Where.
        line: usize,
    },
    /// An engine's settings cannot be used.
    #[error("engine number {number}: {issue}")]
    Invalid {
        /// Counted from 1.
        number: usize,
        /// The first thing that is wrong.
        issue: ConfigIssue,
    },
    /// Two engines at one URL.
    #[error("engine number {number} has the URL of an earlier one")]
    Duplicate {
        /// Counted from 1.
        number: usize,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Engines {
    #[serde(default)]
    engine: Vec<EngineConfig>,
}

/// Reads a file whole.
///
/// # Errors
/// Anything that is wrong with it.
pub fn read(path: &Path) -> Result<Vec<EngineConfig>, EnginesFileError> {
    let failed = |error: io::Error| EnginesFileError::Io(error.kind());
    if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(EnginesFileError::TooLarge);
    }
    let engines = parse(&fs::read_to_string(path).map_err(failed)?)?;
    let mut urls = BTreeSet::new();
    for (number, engine) in (1..).zip(&engines) {
        if let Err(mut issues) = engine.validate() {
            let issue = issues.swap_remove(0);
            return Err(EnginesFileError::Invalid { number, issue });
        }
        if !urls.insert(&engine.url) {
            return Err(EnginesFileError::Duplicate { number });
        }
    }
    Ok(engines)
}

fn parse(text: &str) -> Result<Vec<EngineConfig>, EnginesFileError> {
    let in_json = |error: serde_json::Error| EnginesFileError::Malformed { line: error.line() };
    let trimmed = text.trim_start();
    // A TOML file may begin with a bracket too, but not with one that JSON would go on from.
    let is_json_list = trimmed.strip_prefix('[').is_some_and(|rest| {
        let rest = rest.trim_start();
        rest.starts_with('{') || rest.starts_with(']')
    });
    if is_json_list {
        return serde_json::from_str(text).map_err(in_json);
    }
    if trimmed.starts_with('{') {
        let engines: Engines = serde_json::from_str(text).map_err(in_json)?;
        return Ok(engines.engine);
    }
    let engines: Engines = toml::from_str(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        let before = text.get(..offset).unwrap_or(text);
        EnginesFileError::Malformed {
            line: before.matches('\n').count() + 1,
        }
    })?;
    Ok(engines.engine)
}

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// Takes the engines over, and follows the file until the router ends.
pub(crate) async fn follow(state: Arc<RouterState>, path: PathBuf, engines: Vec<EngineConfig>) {
    let shutdown = state.tasks.shutdown_token().clone();
    let following = async {
        let mut follower = Follower::default();
        let mut stamp = Stamp::of(&path);
        follower.apply(&state, engines);
        let mut ticks = time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            follower.remove_idle(&state);
            let now = Stamp::of(&path);
            if now == stamp {
                continue;
            }
            stamp = now;
            let file = path.clone();
            match state.tasks.run_blocking(move || read(&file)).await {
                Ok(Ok(engines)) => follower.apply(&state, engines),
                Ok(Err(error)) => {
                    let path = path.display();
                    tracing::warn!(%path, %error, "the file of engines changes nothing");
                }
                // The router is ending.
                Err(_) => return,
            }
        }
    };
    let _: Option<()> = shutdown.run_until_cancelled(following).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_of_a_file_say_the_same() {
        let toml = "# all of them\n[[engine]]\nurl = 'http://a:1'\nkv_tokens = 5\n\n[[engine]]\nurl = 'http://b:1'\n";
        let list = r#"[{"url": "http://a:1", "kv_tokens": 5}, {"url": "http://b:1"}]"#;
        let object = format!("{{\"engine\": {list}}}");
        let inline = "engine = [{ url = 'http://a:1', kv_tokens = 5 }, { url = 'http://b:1' }]";
        let expected = parse(toml).unwrap();
        assert_eq!((expected.len(), expected[0].kv_tokens), (2, Some(5)));
        for text in [list, &object, inline] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        for empty in ["", "[]", "{}", "engine = []"] {
            assert!(parse(empty).unwrap().is_empty(), "{empty}");
        }
    }

    #[test]
    fn mistakes_name_their_line_and_repeat_nothing() {
        for (text, line) in [
            ("[[engine]]\nurl = 'https://secret'\n", 2),
            ("[[engine]]\nurl = 'http://a'\nsecret = 1\n", 3),
            ("[{\"url\": \"http://a\",\n \"secret\": 1}]", 2),
            ("[[engine]\n", 1),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                matches!(error, EnginesFileError::Malformed { line: at } if at == line),
                "{text}: {error}"
            );
            assert!(!error.to_string().contains("secret"));
        }
    }
}
