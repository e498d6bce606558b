//! What the manager's owner has to know to sleep: whether there is work, and when the next comes by itself.

use orchestra_core::Time;

use super::BufferManager;
use crate::transport::PeerId;

impl BufferManager {
    /// When [`Self::progress`] has something to do even if nobody calls: the next deadline of a transfer or end of a
    /// grant.
    pub fn next_due(&self) -> Option<Time> {
        let state = self.state.lock();
        let deadline = state.engine.next_deadline();
        let end = state.grants.next_end(self.config.lease_grace);
        deadline.into_iter().chain(end).min()
    }

    /// Whether a transfer has not ended.
    pub fn is_busy(&self) -> bool {
        self.state.lock().engine.counts().0 > 0
    }

    /// Whether [`Self::take_event`] has something.
    pub fn has_events(&self) -> bool {
        !self.state.lock().events.is_empty()
    }

    /// The peers that are connected, or were and are not proven to be quiet.
    pub fn peers(&self) -> Vec<PeerId> {
        self.state.lock().peers.keys().copied().collect()
    }
}
