//! Engines from a store: whoever starts an engine puts an [`EngineConfig`] as JSON under the store's prefix, with a lease
//! where it is to go when its owner does.
//!
//! A value that cannot be used is left out, with a warning, and does not touch the others: they have other owners. While
//! the store is away, its engines stay as they are.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use orchestra_cluster::{Entries, StoreUrl, watch};
use tokio::time::{self, MissedTickBehavior};

use super::{EngineConfig, follower::Follower};
use crate::state::RouterState;

/// The kind of keys.
const KIND: &str = "engines";
/// How often engines that leave are looked after.
const PERIOD: Duration = Duration::from_secs(1);

/// Takes the store's engines over, and follows it until the router ends.
pub(crate) async fn follow(state: Arc<RouterState>, url: StoreUrl) {
    let shutdown = state.tasks.shutdown_token().clone();
    let following = async {
        let mut follower = Follower::default();
        let mut changes = pin!(watch(&url, KIND));
        let mut ticks = time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                Some(entries) = changes.next() => follower.apply(&state, engines(&entries)),
                _ = ticks.tick() => follower.remove_idle(&state),
            }
        }
    };
    let _: Option<()> = shutdown.run_until_cancelled(following).await;
}

fn engines(entries: &Entries) -> Vec<EngineConfig> {
    let usable = entries.iter().filter_map(|(key, value)| {
        parse(value)
            .inspect_err(|problem| {
                tracing::warn!(key, problem, "an engine of the store is left out");
            })
            .ok()
    });
    usable.collect()
}

/// The message repeats nothing of the value: there may be a key in it.
fn parse(value: &[u8]) -> Result<EngineConfig, String> {
    let engine: EngineConfig = serde_json::from_slice(value)
        .map_err(|error| format!("it is not an engine: column {}", error.column()))?;
    match engine.validate() {
        Ok(()) => Ok(engine),
        Err(issues) => Err(issues.iter().map(ToString::to_string).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_value_is_left_out_alone() {
        let entries: Entries = [
            ("a", r#"{"url": "http://a:1"}"#),
            ("b", r#"{"url": "http://b:1", "kv_tokens": 0}"#),
            ("c", r#"{"url": "http://c:1", "secret": 1}"#),
            ("d", "secret"),
            ("e", r#"{"url": "http://e:1", "max_num_seqs": 4}"#),
        ]
        .map(|(key, value)| (key.to_owned(), value.as_bytes().to_vec()))
        .into();
        let urls: Vec<_> = engines(&entries)
            .iter()
            .map(|engine| engine.url.to_string())
            .collect();
        assert_eq!(urls, ["http://a:1", "http://e:1"]);
        for value in entries.values() {
            let problem = parse(value).err().unwrap_or_default();
            assert!(!problem.contains("secret"), "{problem}");
        }
    }
}
