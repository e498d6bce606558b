//! A block whose bytes somebody looks at, or writes, where they lie.

use std::sync::Arc;

use super::{BlockHandle, HoldKind, Holds, Pool};
use crate::{error::MemoryError, slab::Slab, tier::Tier};

/// A block that stays where it is, and is used for nothing else, while this lives. One that is being filled is held
/// alone: no transfer or peer writes it meanwhile. A sealed one may have many views, and none of them may write.
#[derive(Debug)]
pub struct BlockView {
    holds: Holds,
    slab: Arc<Slab>,
    offset: u64,
    is_writable: bool,
}

impl Pool {
    /// Holds a block for access to its bytes.
    pub fn view(self: &Arc<Self>, handle: BlockHandle) -> Result<BlockView, MemoryError> {
        let held = match Holds::take(self, HoldKind::Write, &[handle]) {
            Err(MemoryError::WrongState { .. }) => {
                Holds::take(self, HoldKind::Read, &[handle]).map(|holds| (holds, false))
            }
            held => held.map(|holds| (holds, true)),
        };
        let (holds, is_writable) = held?;
        let (slab, offset) = self.place(handle.slot).ok_or(MemoryError::StaleHandle)?;
        Ok(BlockView {
            holds,
            slab,
            offset,
            is_writable,
        })
    }
}

impl BlockView {
    /// First byte, which is followed by [`Self::len`] mapped ones. They may be written only through a view that
    /// [`Self::is_writable`], and not after it is gone. Of a [`tier`](Self::tier) that is a device's it is the address
    /// there, and nothing that the processor could follow.
    pub fn as_ptr(&self) -> *mut u8 {
        // `Pool::place` keeps a block inside its slab, so this does not wrap.
        self.slab.as_ptr().wrapping_add(self.offset as usize)
    }

    /// Where the bytes lie.
    pub fn tier(&self) -> Tier {
        self.slab.tier()
    }

    /// Refuses bytes that the processor cannot reach.
    pub fn check_host(&self) -> Result<(), MemoryError> {
        match self.tier().device() {
            None => Ok(()),
            Some(device) => Err(MemoryError::NotInHostMemory { device }),
        }
    }

    /// Bytes of the block.
    pub fn len(&self) -> usize {
        self.holds.pool().config().block_bytes as usize
    }

    /// Whether the block has no bytes; never true.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the block is being filled, by the holder of this view alone.
    pub const fn is_writable(&self) -> bool {
        self.is_writable
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PoolConfig, SlabId, table::BlockState};

    fn pool() -> Arc<Pool> {
        let config = PoolConfig {
            block_bytes: 4096,
            slab_bytes: 2 << 20,
            huge_pages: false,
            ..PoolConfig::default()
        };
        let pool = Pool::new(config).unwrap();
        let slab = Slab::create(SlabId(0), &config.slab()).unwrap();
        pool.add_slab(Arc::new(slab)).unwrap();
        pool
    }

    #[test]
    fn a_block_that_is_filled_has_one_view_and_is_not_sealed_under_it() {
        let pool = pool();
        let set = pool.allocate(2).unwrap();
        let handle = set.handle(1).unwrap();
        let view = pool.view(handle).unwrap();
        assert!(view.is_writable());
        assert_eq!(view.as_ptr().addr() % 4096, 0);
        assert_eq!(pool.view(handle).map(drop), Err(MemoryError::InUse));
        assert_eq!(set.seal(), Err(MemoryError::InUse));
        drop(view);
        set.write(1, 4091, b"bytes").unwrap();
        pool.seal(&[handle]).unwrap();
        let views = [pool.view(handle).unwrap(), pool.view(handle).unwrap()];
        assert!(views.iter().all(|view| !view.is_writable()));
    }

    #[test]
    fn a_freed_block_is_not_used_again_before_its_view_is_gone() {
        let pool = pool();
        let set = pool.allocate(1).unwrap();
        let handle = set.handle(0).unwrap();
        set.seal().unwrap();
        let view = pool.view(handle).unwrap();
        assert!(pool.begin_move(&[handle]).is_none(), "it stays where it is");
        drop(set);
        assert_eq!(pool.stats().in_state(BlockState::Limbo), 1);
        assert_eq!(pool.view(handle).map(drop), Err(MemoryError::StaleHandle));
        drop(view);
        assert_eq!(pool.stats().allocatable, pool.stats().num_blocks);
        pool.check_integrity();
    }
}
