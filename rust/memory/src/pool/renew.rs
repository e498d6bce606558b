//! Blocks that keep their place for ever, such as a worker's KV cache: each slot is one number of one set, and gets a
//! new life there whenever somebody outside may have had access to the old one.

use super::{BlockHandle, BlockSet};
use crate::{error::MemoryError, table::BlockState};

impl BlockSet {
    /// The blocks of these numbers, in the given order.
    pub fn handles_at(
        &self,
        numbers: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<BlockHandle>, MemoryError> {
        let pool = self.pool();
        let state = pool.state.lock();
        let handle = |at| {
            let slot = state.sets.slot(self.id(), at)?;
            pool.handle_of(slot)
        };
        let handles = numbers.into_iter().map(handle).collect::<Option<_>>();
        handles.ok_or(MemoryError::StaleHandle)
    }

    /// Gives the blocks of these numbers a new life, to be filled anew, in the slots that bear the same numbers: also
    /// those that were lost to quarantine, once they are proven to be quiet. `InUse` where somebody may still read or
    /// write one of them; then nothing has changed.
    pub fn renew(&self, numbers: &[u32]) -> Result<(), MemoryError> {
        let pool = self.pool();
        let mut state = pool.state.lock();
        for &slot in numbers {
            let word = pool.word_now(slot).ok_or(MemoryError::ForeignHandle)?;
            let at = slot as usize;
            let is_ours = state.sets.slot(self.id(), at) == Some(slot);
            let is_lost = state.sets.is_gap(self.id(), at);
            let is_live = word.state().is_live();
            let is_held = word.is_held() || is_lost && word.state() != BlockState::Free;
            match (is_ours && is_live || is_lost, is_held) {
                (true, false) => {}
                (true, true) => return Err(MemoryError::InUse),
                (false, _) => return Err(MemoryError::StaleHandle),
            }
        }
        for &slot in numbers {
            let Some(word) = pool.word(slot) else {
                continue;
            };
            if word.load().state().is_live() {
                word.renew(word.load().generation())?;
            } else if state.runs.take_slot(slot) {
                state.sets.fill_gap(self.id(), slot as usize, slot);
                word.take();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        config::PoolConfig,
        pool::{HoldKind, Holds, Pool},
        slab::Slab,
        transport::SlabId,
    };

    /// All of a pool's blocks as one set, so that numbers are slots.
    fn cache() -> (Arc<Pool>, BlockSet) {
        let config = PoolConfig {
            block_bytes: 128 << 10,
            slab_bytes: 2 << 20,
            ..PoolConfig::default()
        };
        let pool = Pool::new(config).unwrap();
        let slab = Slab::create(SlabId(0), &config.slab()).unwrap();
        pool.add_slab(Arc::new(slab)).unwrap();
        let set = pool.allocate(16).unwrap();
        assert!(set.handles().iter().map(|it| it.slot).eq(0..16));
        (pool, set)
    }

    #[test]
    fn a_renewed_block_has_a_new_life_in_its_old_place() {
        let (pool, set) = cache();
        let old = set.handles_at([3, 5]).unwrap();
        pool.seal(&old).unwrap();
        let pin = pool.pin(old[1]).unwrap();
        assert_eq!(set.renew(&[3, 5]), Err(MemoryError::InUse));
        assert_eq!(set.handles_at([3, 5]).unwrap(), old, "all or none");
        drop(pin);
        set.renew(&[3, 5]).unwrap();
        let new = set.handles_at([3, 5]).unwrap();
        assert!(old.iter().all(|handle| pool.state_of(*handle).is_none()));
        for (old, new) in old.iter().zip(&new) {
            assert_eq!((old.slot, old.generation + 1), (new.slot, new.generation));
            assert_eq!(pool.state_of(*new), Some(BlockState::Writing));
        }
        pool.check_integrity();
    }

    #[test]
    fn what_was_lost_comes_back_when_it_is_quiet() {
        let (pool, set) = cache();
        let lost = set.handles_at([7, 8, 9]).unwrap();
        let mut holds = Holds::take(&pool, HoldKind::LeaseWrite, &lost).unwrap();
        holds.quarantine();
        assert_eq!(set.handles_at([8]), Err(MemoryError::StaleHandle));
        assert_eq!(set.renew(&[8]), Err(MemoryError::InUse));
        drop(holds);
        pool.check_integrity();
        for slot in [8, 9, 7] {
            set.renew(&[slot]).unwrap();
            pool.check_integrity();
        }
        let back = set.handles_at([7, 8, 9]).unwrap();
        assert!(back.iter().all(|it| it.generation == 1));
        assert_eq!(set.handles().len(), 16);
        pool.seal(&back).unwrap();
    }

    #[test]
    fn a_slot_of_somebody_else_is_refused() {
        let (pool, mut set) = cache();
        set.truncate(10);
        let other = pool.allocate(1).unwrap();
        let slot = other.handle(0).unwrap().slot;
        assert_eq!(set.renew(&[slot]), Err(MemoryError::StaleHandle));
        assert_eq!(set.renew(&[99]), Err(MemoryError::ForeignHandle));
        drop(other);
        // A number that was cut off is not the set's any more.
        assert_eq!(set.renew(&[1, slot]), Err(MemoryError::StaleHandle));
        assert_eq!(set.handle(1).unwrap().generation, 0, "all or none");
    }
}
