//! How blocks become quiet: what somebody outside could touch belongs to the step scheduler again only when it is
//! proven that nobody does any more.

use orchestra_core::{BlockId, step::HoldId};
use orchestra_memory::MemoryError;

use super::pool::KvPool;

/// A message that waits for blocks to be quiet: to which worker, about which transfer.
pub(super) type Answer = (String, u64);

/// Blocks that somebody outside may still touch.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) holds: Vec<HoldId>,
    pub(super) blocks: Vec<BlockId>,
    /// Whom to tell that nothing of ours touches its blocks any more.
    pub(super) answer: Option<Answer>,
}

/// All that end.
#[derive(Debug, Default)]
pub(super) struct Endings(Vec<Ending>);

impl Endings {
    pub(super) fn add(&mut self, ending: Ending) {
        self.0.push(ending);
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives new lives to what is quiet now, and returns it.
    pub(super) fn settle(&mut self, pool: &KvPool) -> Vec<Ending> {
        let is_over = |ending: &mut Ending| match pool.renew(&ending.blocks) {
            Ok(()) => true,
            Err(MemoryError::InUse) => false,
            Err(error) => {
                // Never used again is the safe answer to what cannot be.
                debug_assert!(false, "blocks of a hold are ours: {error}");
                tracing::error!(%error, "KV blocks are lost");
                false
            }
        };
        self.0.extract_if(.., is_over).collect()
    }
}
