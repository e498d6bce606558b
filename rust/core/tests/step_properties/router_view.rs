//! What a router that listens to the events believes of a replica's caches.

use orchestra_core::{
    BlockHash,
    step::{KvEvent, StepScheduler},
};
use rustc_hash::FxHashSet;

/// Blocks on the device, and in host memory.
#[derive(Debug, Default)]
pub(crate) struct RouterView {
    device: FxHashSet<BlockHash>,
    host: FxHashSet<BlockHash>,
}

impl RouterView {
    /// Takes in what has changed, and compares with what there is.
    pub(crate) fn follow(&mut self, scheduler: &mut StepScheduler) {
        for event in scheduler.take_kv_events() {
            self.apply(event);
        }
        for (hashes, view) in [
            (scheduler.cached_block_hashes(), &self.device),
            (scheduler.kept_block_hashes(), &self.host),
        ] {
            assert_eq!(hashes.len(), view.len(), "events tell the whole story");
            assert!(hashes.iter().all(|hash| view.contains(hash)));
        }
    }

    fn apply(&mut self, event: KvEvent) {
        match event {
            KvEvent::Stored(hashes) => {
                self.host.retain(|hash| !hashes.contains(hash));
                self.device.extend(hashes);
            }
            KvEvent::Kept(hashes) => {
                self.device.retain(|hash| !hashes.contains(hash));
                self.host.extend(hashes);
            }
            KvEvent::Removed(hashes) => {
                for hash in &hashes {
                    let was_there = self.device.remove(hash) | self.host.remove(hash);
                    assert!(was_there, "removed what was not stored");
                }
            }
            KvEvent::Cleared => {
                self.device.clear();
                self.host.clear();
            }
        }
    }
}
