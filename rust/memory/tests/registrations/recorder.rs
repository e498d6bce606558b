//! A mock of a transport: it notes what is registered, and its transfers never end.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orchestra_memory::{
    Direction, MemoryError, Notification, PeerId, Progress, Quiet, Region, Segment, Slab, SlabId,
    TransferError, TransferId, Transport,
};
use parking_lot::Mutex;

#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) registered: Mutex<BTreeMap<SlabId, Region>>,
    /// Whether the next registration fails.
    pub(crate) is_broken: Mutex<bool>,
}

impl Recorder {
    pub(crate) fn regions(&self) -> Vec<Region> {
        let mut regions: Vec<_> = self.registered.lock().values().copied().collect();
        regions.sort_unstable();
        regions
    }
}

impl Transport for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn is_one_sided(&self) -> bool {
        true
    }

    fn register(&self, slab: &Arc<Slab>) -> Result<(), MemoryError> {
        if *self.is_broken.lock() {
            return Err(MemoryError::UnknownSlab(slab.id().0));
        }
        let region = Region {
            tier: slab.tier(),
            address: slab.as_ptr().addr() as u64,
            len: slab.len(),
        };
        assert!(self.registered.lock().insert(slab.id(), region).is_none());
        Ok(())
    }

    fn deregister(&self, slab: SlabId) -> Result<(), MemoryError> {
        let removed = self.registered.lock().remove(&slab);
        removed.map(drop).ok_or(MemoryError::UnknownSlab(slab.0))
    }

    fn local_metadata(&self) -> Result<Vec<u8>, MemoryError> {
        Ok(Vec::new())
    }

    fn connect(&self, _peer: PeerId, _metadata: &[u8]) -> Result<(), MemoryError> {
        Ok(())
    }

    fn disconnect(&self, _peer: PeerId) -> Result<Quiet, MemoryError> {
        Ok(Quiet::Unproven)
    }

    fn post(
        &self,
        _direction: Direction,
        _peer: PeerId,
        _segments: &[Segment],
        _notification: Option<&[u8]>,
    ) -> Result<TransferId, TransferError> {
        Ok(TransferId(0))
    }

    fn poll(&self, _transfer: TransferId) -> Progress {
        Progress::Pending
    }

    fn release(&self, _transfer: TransferId) -> Quiet {
        Quiet::Unproven
    }

    fn progress(&self, _budget: Duration) -> usize {
        0
    }

    fn take_notification(&self) -> Option<Notification> {
        None
    }
}
