//! What keeps blocks where they are: pins of readers here, of transfers, and leases of peers.

use std::sync::{Arc, atomic::Ordering};

use super::{BlockHandle, Pool};
use crate::{error::MemoryError, slab::Slab, table::Slot};

/// A sealed block that is neither moved nor used again while this lives.
#[derive(Debug)]
pub struct PinGuard {
    pool: Arc<Pool>,
    handle: BlockHandle,
}

impl PinGuard {
    pub(super) const fn new(pool: Arc<Pool>, handle: BlockHandle) -> Self {
        Self { pool, handle }
    }

    /// The block.
    pub const fn handle(&self) -> BlockHandle {
        self.handle
    }

    /// Its slab and the offset of its first byte there.
    pub fn place(&self) -> Option<(Arc<Slab>, u64)> {
        self.pool.place(self.handle.slot)
    }

    /// Copies bytes out of the block.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let at = self.pool.inside(offset, bytes.len() as u64)?;
        let (slab, start) = self.place().ok_or(MemoryError::StaleHandle)?;
        slab.read(start + at, bytes)
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.pool.end_pin(self.handle.slot);
    }
}

/// What a hold is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldKind {
    /// A transfer of ours reads the blocks.
    Read,
    /// A transfer of ours fills the blocks.
    Write,
    /// A peer reads the blocks.
    LeaseRead,
    /// A peer fills the blocks.
    LeaseWrite,
}

/// Holds on many blocks of one pool, ended together.
#[derive(Debug)]
pub struct Holds {
    pool: Arc<Pool>,
    kind: HoldKind,
    slots: Vec<u32>,
    is_quarantined: bool,
}

impl Holds {
    /// Holds all of the blocks, or with an error none.
    pub fn take(
        pool: &Arc<Pool>,
        kind: HoldKind,
        handles: &[BlockHandle],
    ) -> Result<Self, MemoryError> {
        let mut holds = Self {
            pool: Arc::clone(pool),
            kind,
            slots: Vec::with_capacity(handles.len()),
            is_quarantined: false,
        };
        let hold = match kind {
            HoldKind::Read => Slot::pin,
            HoldKind::Write => Slot::pin_for_write,
            HoldKind::LeaseRead => Slot::lease,
            HoldKind::LeaseWrite => Slot::lease_for_write,
        };
        for handle in handles {
            hold(pool.named(*handle)?, handle.generation)?;
            holds.slots.push(handle.slot);
        }
        Ok(holds)
    }

    /// The pool of the blocks.
    pub(super) const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// How many blocks.
    pub const fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether no block is held.
    pub const fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Notes that nobody knows when these holds end. Blocks that were being filled are taken from their owner,
    /// because late bytes may still change them. Returns how many blocks are in quarantine by it.
    pub fn quarantine(&mut self) -> usize {
        if !std::mem::replace(&mut self.is_quarantined, true) {
            let n = self.slots.len();
            self.pool.num_quarantined.fetch_add(n, Ordering::Relaxed);
        }
        let takes_blocks = matches!(self.kind, HoldKind::Write | HoldKind::LeaseWrite);
        let mut state = self.pool.state.lock();
        for &slot in &self.slots {
            let Some(word) = self.pool.word(slot) else {
                continue;
            };
            let now = word.load();
            // Held alone and for writing: the block that lives there is still the one that was held.
            if takes_blocks && now.state().is_live() {
                state.sets.remove_block(slot);
                let retired = word.retire(now.generation());
                debug_assert!(retired.is_ok(), "generations change under the lock alone");
            }
            word.quarantine();
        }
        self.slots.len()
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        for &slot in &self.slots {
            match self.kind {
                HoldKind::Read | HoldKind::Write => self.pool.end_pin(slot),
                HoldKind::LeaseRead | HoldKind::LeaseWrite => self.pool.end_lease(slot),
            }
        }
        if self.is_quarantined {
            let n = self.slots.len();
            self.pool.num_quarantined.fetch_sub(n, Ordering::Relaxed);
        }
    }
}
