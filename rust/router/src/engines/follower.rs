//! Keeps a router's engines as a source wants them that says all of them each time: a file, a store.
//!
//! An engine that is not wanted any more gets no new requests, and leaves once it has none; one whose settings changed
//! leaves at once and comes back with the new ones.

use std::{collections::BTreeMap, sync::Arc};

use super::{EngineConfig, EngineUrl};
use crate::state::RouterState;

type ByUrl = BTreeMap<EngineUrl, EngineConfig>;

/// What was taken over from one source.
#[derive(Default)]
pub(super) struct Follower {
    present: ByUrl,
    /// Not wanted any more, and not yet gone.
    leaving: Vec<EngineUrl>,
}

impl Follower {
    /// From now on these are the source's engines.
    pub(super) fn apply(&mut self, state: &Arc<RouterState>, engines: Vec<EngineConfig>) {
        let wanted: ByUrl = engines
            .into_iter()
            .map(|engine| (engine.url.clone(), engine))
            .collect();
        let is_gone = |url: &&EngineUrl| !wanted.contains_key(*url);
        for url in self.present.keys().filter(is_gone) {
            // It may have been removed by other means.
            let _ = state.drain_engine(url, true);
            self.leaving.push(url.clone());
        }
        self.leaving.retain(|url| {
            let comes_back = wanted.contains_key(url);
            if comes_back {
                let _ = state.remove_engine(url);
            }
            !comes_back
        });
        for (url, engine) in &wanted {
            match self.present.get(url) {
                Some(known) if known == engine => continue,
                Some(_) => drop(state.remove_engine(url)),
                None => {}
            }
            if let Err(error) = state.add_engine(engine.clone()) {
                tracing::warn!(%url, %error, "engine not added");
            }
        }
        self.present = wanted;
    }

    /// Lets engines go that are not wanted any more and have no request left.
    pub(super) fn remove_idle(&mut self, state: &Arc<RouterState>) {
        if self.leaving.is_empty() {
            return;
        }
        let engines = state.list_engines();
        self.leaving.retain(|url| {
            let running = engines.iter().find(|engine| engine.config.url == *url);
            let is_busy = running.is_some_and(|engine| engine.num_running > 0);
            if !is_busy {
                let _ = state.remove_engine(url);
            }
            is_busy
        });
    }
}
