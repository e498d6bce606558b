//! What is done to single blocks, and what the pool should answer.

use orchestra_memory::{
    BlockHandle, MemoryError, PoolId,
    pool::{HoldKind, Holds},
};
use proptest::sample::Index;

use crate::{
    During,
    model::{Block, Hold, Model, pick},
};

impl Model {
    pub(crate) fn pick_block(&self, set: Index, at: Index) -> Option<(usize, usize)> {
        let set = pick(&self.sets, set)?;
        let at = pick(&self.sets[set].model, at)?;
        self.sets[set].model[at].map(|_| (set, at))
    }

    pub(crate) fn free(&mut self, set: Index, at: Index, twice: bool) {
        let Some((set, at)) = self.pick_block(set, at) else {
            return;
        };
        let block = self.sets[set].model[at].unwrap();
        if twice {
            let both = [block.handle, block.handle];
            assert_eq!(self.pool.free(&both), Err(MemoryError::StaleHandle));
            return;
        }
        assert_eq!(self.pool.free(&[block.handle]), Ok(()));
        self.sets[set].model[at] = None;
        self.retire(block.handle);
    }

    /// One handle of an earlier life among good ones: nothing is freed.
    pub(crate) fn free_stale(&mut self, set: Index, stale: Index) {
        let (Some(set), Some(stale)) = (pick(&self.sets, set), pick(&self.stale, stale)) else {
            return;
        };
        let mut handles = self.sets[set].blocks.handles();
        handles.push(self.stale[stale]);
        assert_eq!(self.pool.free(&handles), Err(MemoryError::StaleHandle));
    }

    pub(crate) fn free_foreign(&mut self, set: Index) {
        let Some(set) = pick(&self.sets, set) else {
            return;
        };
        let mut handles = self.sets[set].blocks.handles();
        let Some(last) = handles.last().copied() else {
            return;
        };
        handles.push(BlockHandle {
            pool: PoolId(u32::MAX),
            ..last
        });
        assert_eq!(self.pool.free(&handles), Err(MemoryError::ForeignHandle));
        handles.pop();
        handles.push(BlockHandle {
            slot: self.num_blocks as u32,
            ..last
        });
        assert_eq!(self.pool.free(&handles), Err(MemoryError::ForeignHandle));
    }

    pub(crate) fn write(&mut self, set: Index, at: Index, tag: u64) {
        let Some((set, at)) = self.pick_block(set, at) else {
            return;
        };
        let block = self.sets[set].model[at].unwrap();
        let end = self.pool.config().block_bytes - 8;
        let written = self.pool.write(block.handle, 0, &tag.to_le_bytes());
        let expected = match (block.is_sealed, self.is_held(block.handle.slot)) {
            (true, _) => Err(MemoryError::WrongState {
                actual: "sealed",
                expected: "writing",
            }),
            (false, true) => Err(MemoryError::InUse),
            (false, false) => Ok(()),
        };
        assert_eq!(written, expected);
        if written.is_ok() {
            self.pool
                .write(block.handle, end, &tag.to_le_bytes())
                .unwrap();
            self.sets[set].model[at].as_mut().unwrap().tag = tag;
            let outside = self.pool.write(block.handle, end + 1, &tag.to_le_bytes());
            assert!(matches!(outside, Err(MemoryError::OutOfBounds { .. })));
        }
    }

    /// Writes a tag where there is none, so that every sealed block says whose it is, and seals what can be.
    pub(crate) fn seal(&mut self, set: Index) {
        let Some(set) = pick(&self.sets, set) else {
            return;
        };
        for at in 0..self.sets[set].model.len() {
            let Some(block) = self.sets[set].model[at] else {
                continue;
            };
            let is_held = self.is_held(block.handle.slot);
            if block.tag == 0 && !block.is_sealed && !is_held {
                let tag = (u64::from(block.handle.slot) << 32)
                    | u64::from(block.handle.generation)
                    | (1 << 63);
                let end = self.pool.config().block_bytes - 8;
                self.pool
                    .write(block.handle, 0, &tag.to_le_bytes())
                    .unwrap();
                self.pool
                    .write(block.handle, end, &tag.to_le_bytes())
                    .unwrap();
                self.sets[set].model[at].as_mut().unwrap().tag = tag;
            }
            let expected = match (block.is_sealed, is_held) {
                (true, _) => Err(MemoryError::WrongState {
                    actual: "sealed",
                    expected: "writing",
                }),
                (false, true) => Err(MemoryError::InUse),
                (false, false) => Ok(()),
            };
            assert_eq!(self.pool.seal(&[block.handle]), expected);
            self.sets[set].model[at].as_mut().unwrap().is_sealed |= expected.is_ok();
        }
    }

    pub(crate) fn pin(&mut self, set: usize, at: usize) {
        let block = self.sets[set].model[at].unwrap();
        match self.pool.pin(block.handle) {
            Ok(guard) => {
                assert!(block.is_sealed);
                self.guards.push((guard, block.tag));
            }
            Err(refused) => {
                let (actual, expected) = ("writing", "sealed");
                assert_eq!(refused, MemoryError::WrongState { actual, expected });
                assert!(!block.is_sealed);
            }
        }
    }

    pub(crate) fn use_stale(&mut self, stale: Index) {
        let Some(stale) = pick(&self.stale, stale) else {
            return;
        };
        let handle = self.stale[stale];
        assert_eq!(
            self.pool.pin(handle).map(drop),
            Err(MemoryError::StaleHandle)
        );
        assert_eq!(self.pool.seal(&[handle]), Err(MemoryError::StaleHandle));
        assert_eq!(
            self.pool.write(handle, 0, &[1]),
            Err(MemoryError::StaleHandle)
        );
        assert_eq!(self.pool.state_of(handle), None);
        assert!(self.pool.begin_move(&[handle]).is_none());
        self.seen.stale += 1;
    }

    pub(crate) fn blocks_in(&self, set: usize, from: Index, n: usize) -> Vec<(usize, Block)> {
        let model = &self.sets[set].model;
        let from = pick(model, from).unwrap_or(0);
        let numbered = model.iter().enumerate().skip(from).take(n);
        numbered
            .filter_map(|(at, block)| block.map(|block| (at, block)))
            .collect()
    }

    pub(crate) fn hold(&mut self, kind: u8, set: Index, from: Index, n: usize) {
        let Some(set) = pick(&self.sets, set) else {
            return;
        };
        let kinds = [
            HoldKind::Read,
            HoldKind::Write,
            HoldKind::LeaseRead,
            HoldKind::LeaseWrite,
        ];
        let kind = kinds[usize::from(kind)];
        let reads = matches!(kind, HoldKind::Read | HoldKind::LeaseRead);
        let blocks = self.blocks_in(set, from, n);
        let slots: Vec<u32> = blocks.iter().map(|(_, block)| block.handle.slot).collect();
        let allowed = blocks.iter().all(|(_, block)| {
            block.is_sealed == reads && (reads || !self.is_held(block.handle.slot))
        });
        let handles: Vec<BlockHandle> = blocks.iter().map(|(_, block)| block.handle).collect();
        let held = Holds::take(&self.pool, kind, &handles);
        assert_eq!(held.is_ok(), allowed, "{kind:?}: {:?}", held.as_ref().err());
        if let Ok(holds) = held {
            assert_eq!(holds.len(), slots.len());
            self.holds.push(Hold {
                holds,
                kind,
                slots,
                is_quarantined: false,
            });
        }
    }

    pub(crate) fn quarantine(&mut self, hold: Index) {
        let Some(at) = pick(&self.holds, hold) else {
            return;
        };
        let hold = &mut self.holds[at];
        hold.is_quarantined = true;
        assert_eq!(hold.holds.quarantine(), hold.slots.len());
        let takes = matches!(hold.kind, HoldKind::Write | HoldKind::LeaseWrite);
        let slots = hold.slots.clone();
        for slot in slots {
            if let Some(is_quarantined) = self.retired.get_mut(&slot) {
                *is_quarantined = true;
                continue;
            }
            let all = self.sets.iter_mut().flat_map(|set| &mut set.model);
            let owned = all.filter(|block| block.is_some_and(|block| block.handle.slot == slot));
            for block in owned.filter(|_| takes) {
                self.stale.extend(block.take().map(|block| block.handle));
                self.retired.insert(slot, true);
                self.seen.lost_to_quarantine += 1;
            }
        }
    }

    pub(crate) fn move_blocks(&mut self, set: Index, from: Index, n: usize, during: During) {
        let Some(set) = pick(&self.sets, set) else {
            return;
        };
        let blocks = self.blocks_in(set, from, n);
        let handles: Vec<BlockHandle> = blocks.iter().map(|(_, block)| block.handle).collect();
        let largest_run = self.pool.fragmentation().largest_run as usize;
        let can_move = !blocks.is_empty()
            && blocks.len() <= largest_run
            && blocks
                .iter()
                .all(|(_, block)| block.is_sealed && !self.is_held(block.handle.slot));
        let begun = self.pool.begin_move(&handles);
        assert_eq!(begun.is_some(), can_move);
        let Some(mut moving) = begun else { return };
        moving.copy().unwrap();
        let (first, block) = blocks[0];
        match during {
            During::Nothing => {}
            During::Pin => self.pin(set, first),
            During::Free => {
                self.pool.free(&[block.handle]).unwrap();
                self.sets[set].model[first] = None;
                self.retire(block.handle);
            }
            During::GiveUp => return drop(moving),
        }
        let stays = usize::from(during != During::Nothing);
        self.seen.moves_lost_to_pins += usize::from(during == During::Pin);
        assert_eq!(moving.commit(), blocks.len() - stays);
        self.epoch += 1;
        for (at, block) in &blocks[stays..] {
            let handle = self.sets[set].blocks.handle(*at).unwrap();
            assert_ne!(handle.slot, block.handle.slot);
            self.stale.push(block.handle);
            self.sets[set].model[*at].as_mut().unwrap().handle = handle;
            self.waiting.push((self.epoch, block.handle.slot));
            self.retired.insert(block.handle.slot, false);
            self.seen.moved += 1;
        }
        self.seen.waited_for_participants += usize::from(!self.participants.is_empty());
        self.settle_epochs();
    }
}
