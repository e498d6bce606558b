//! A pool beside a list of what each of its blocks should be.

use std::{collections::BTreeMap, sync::Arc};

use orchestra_memory::{
    BlockHandle, BlockSet, BlockState, MemoryError, PinGuard, Pool, PoolConfig, Slab, SlabId,
    pool::{HoldKind, Holds, ParticipantId},
};
use proptest::sample::Index;

use crate::Op;

/// A block as its owner knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) handle: BlockHandle,
    pub(crate) is_sealed: bool,
    pub(crate) tag: u64,
}

pub(crate) struct Set {
    pub(crate) blocks: BlockSet,
    pub(crate) model: Vec<Option<Block>>,
}

pub(crate) struct Hold {
    pub(crate) holds: Holds,
    pub(crate) kind: HoldKind,
    pub(crate) slots: Vec<u32>,
    pub(crate) is_quarantined: bool,
}

/// How often a rare path was taken.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) exhausted: usize,
    pub(crate) scattered: usize,
    pub(crate) moved: usize,
    pub(crate) moves_lost_to_pins: usize,
    pub(crate) frees_while_held: usize,
    pub(crate) lost_to_quarantine: usize,
    pub(crate) stale: usize,
    pub(crate) waited_for_participants: usize,
}

impl Seen {
    pub(crate) fn add(&mut self, more: Self) {
        self.exhausted += more.exhausted;
        self.scattered += more.scattered;
        self.moved += more.moved;
        self.moves_lost_to_pins += more.moves_lost_to_pins;
        self.frees_while_held += more.frees_while_held;
        self.lost_to_quarantine += more.lost_to_quarantine;
        self.stale += more.stale;
        self.waited_for_participants += more.waited_for_participants;
    }
}

pub(crate) struct Model {
    pub(crate) pool: Arc<Pool>,
    pub(crate) num_blocks: usize,
    pub(crate) sets: Vec<Set>,
    pub(crate) guards: Vec<(PinGuard, u64)>,
    pub(crate) holds: Vec<Hold>,
    pub(crate) stale: Vec<BlockHandle>,
    /// Retired slots that somebody holds, and whether they are quarantined.
    pub(crate) retired: BTreeMap<u32, bool>,
    /// Old places of moved blocks with their epochs, and what each participant has passed.
    pub(crate) waiting: Vec<(u64, u32)>,
    pub(crate) participants: Vec<(ParticipantId, u64)>,
    pub(crate) epoch: u64,
    pub(crate) seen: Seen,
}

pub(crate) fn pick<T>(items: &[T], index: Index) -> Option<usize> {
    (!items.is_empty()).then(|| index.index(items.len()))
}

impl Model {
    pub(crate) fn new(block_bytes: u64, slabs: u32) -> Self {
        let config = PoolConfig {
            block_bytes,
            slab_bytes: 2 << 20,
            initial_slabs: slabs,
            max_slabs: slabs,
            ..PoolConfig::default()
        };
        let pool = Pool::new(config).unwrap();
        for id in 0..slabs {
            let slab = Slab::create(SlabId(id), &config.slab()).unwrap();
            pool.add_slab(Arc::new(slab)).unwrap();
        }
        assert!(!pool.may_grow());
        Self {
            num_blocks: (config.slots_per_slab() * slabs) as usize,
            pool,
            sets: Vec::new(),
            guards: Vec::new(),
            holds: Vec::new(),
            stale: Vec::new(),
            retired: BTreeMap::new(),
            waiting: Vec::new(),
            participants: Vec::new(),
            epoch: 0,
            seen: Seen::default(),
        }
    }

    /// Whether a slot is pinned or leased by anybody.
    pub(crate) fn is_held(&self, slot: u32) -> bool {
        self.guards
            .iter()
            .any(|(guard, _)| guard.handle().slot == slot)
            || self.holds.iter().any(|hold| hold.slots.contains(&slot))
            || self.waiting.iter().any(|(_, waiting)| *waiting == slot)
    }

    fn num_live(&self) -> usize {
        self.sets
            .iter()
            .map(|set| set.model.iter().flatten().count())
            .sum()
    }

    fn num_free(&self) -> usize {
        self.num_blocks - self.num_live() - self.retired.len()
    }

    pub(crate) fn retire(&mut self, handle: BlockHandle) {
        self.stale.push(handle);
        if self.is_held(handle.slot) {
            self.seen.frees_while_held += 1;
            self.retired.insert(handle.slot, false);
        }
    }

    /// Forgets retired slots that nobody holds any more.
    fn settle(&mut self) {
        let free: Vec<u32> = self
            .retired
            .keys()
            .copied()
            .filter(|slot| !self.is_held(*slot))
            .collect();
        for slot in free {
            self.retired.remove(&slot);
        }
    }

    fn new_blocks(&mut self, blocks: &BlockSet, from: usize) -> Vec<Option<Block>> {
        let handles = blocks.handles_in(from..blocks.len()).unwrap();
        if blocks.extents().len() > 1 {
            self.seen.scattered += 1;
        }
        let block = |handle| {
            Some(Block {
                handle,
                is_sealed: false,
                tag: 0,
            })
        };
        handles.into_iter().map(block).collect()
    }

    fn check_exhausted(&mut self, refused: &MemoryError, n: u32) {
        let MemoryError::Exhausted {
            requested,
            free,
            largest_run,
            ..
        } = *refused
        else {
            panic!("{refused}");
        };
        assert_eq!((requested, free), (n as usize, self.num_free()));
        assert!(largest_run <= free && free < requested);
        self.seen.exhausted += 1;
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::Allocate { n } => match self.pool.allocate(n) {
                Ok(blocks) => {
                    let model = self.new_blocks(&blocks, 0);
                    assert_eq!(model.len(), n as usize);
                    self.sets.push(Set { blocks, model });
                }
                Err(refused) => self.check_exhausted(&refused, n),
            },
            Op::Extend { set, n } => self.extend(set, n),
            Op::Truncate { set, to } => self.truncate(set, to),
            Op::DropSet { set } => self.drop_set(set),
            Op::Free { set, at, twice } => self.free(set, at, twice),
            Op::FreeStale { set, stale } => self.free_stale(set, stale),
            Op::FreeForeign { set } => self.free_foreign(set),
            Op::Write { set, at, tag } => self.write(set, at, tag),
            Op::Seal { set } => self.seal(set),
            Op::Pin { set, at } => {
                if let Some((set, at)) = self.pick_block(set, at) {
                    self.pin(set, at);
                }
            }
            Op::Unpin { guard } => {
                if let Some(at) = pick(&self.guards, guard) {
                    self.guards.swap_remove(at);
                    self.settle();
                }
            }
            Op::UseStale { stale } => self.use_stale(stale),
            Op::Hold { kind, set, from, n } => self.hold(kind, set, from, n),
            Op::Quarantine { hold } => self.quarantine(hold),
            Op::EndHold { hold } => {
                if let Some(at) = pick(&self.holds, hold) {
                    self.holds.swap_remove(at);
                    self.settle();
                }
            }
            Op::Move {
                set,
                from,
                n,
                during,
            } => self.move_blocks(set, from, n, during),
            Op::Join | Op::Pass { .. } | Op::Leave { .. } => self.catch_up(op),
        }
    }

    fn extend(&mut self, set: Index, n: u32) {
        let Some(at) = pick(&self.sets, set) else {
            return;
        };
        let mut set = self.sets.swap_remove(at);
        let from = set.blocks.len();
        let extended = set.blocks.extend(n);
        if extended.is_ok() {
            set.model.extend(self.new_blocks(&set.blocks, from));
        }
        self.sets.push(set);
        if let Err(refused) = extended {
            self.check_exhausted(&refused, n);
        }
    }

    fn truncate(&mut self, set: Index, to: Index) {
        let Some(at) = pick(&self.sets, set) else {
            return;
        };
        let len = to.index(self.sets[at].model.len() + 1);
        self.sets[at].blocks.truncate(len);
        for block in self.sets[at].model.split_off(len).into_iter().flatten() {
            self.retire(block.handle);
        }
    }

    fn drop_set(&mut self, set: Index) {
        let Some(at) = pick(&self.sets, set) else {
            return;
        };
        let set = self.sets.swap_remove(at);
        drop(set.blocks);
        for block in set.model.into_iter().flatten() {
            self.retire(block.handle);
        }
    }

    /// What participants do.
    fn catch_up(&mut self, op: &Op) {
        match *op {
            Op::Join if self.participants.len() < 3 => {
                self.participants.push((self.pool.join(), self.epoch));
            }
            Op::Pass { participant } => {
                if let Some(at) = pick(&self.participants, participant) {
                    let moved = self.pool.moved_since(self.participants[at].1);
                    let last = moved.last().map_or(self.epoch, |moved| moved.epoch);
                    self.participants[at].1 = last;
                    self.pool.pass(self.participants[at].0, last);
                    self.settle_epochs();
                }
            }
            Op::Leave { participant } => {
                if let Some(at) = pick(&self.participants, participant) {
                    let (id, _) = self.participants.swap_remove(at);
                    self.pool.leave(id);
                    self.settle_epochs();
                }
            }
            _ => {}
        }
    }

    pub(crate) fn settle_epochs(&mut self) {
        let passed = self.participants.iter().map(|(_, epoch)| *epoch).min();
        let passed = passed.unwrap_or(self.epoch);
        self.waiting.retain(|(epoch, _)| *epoch > passed);
        self.settle();
    }

    /// Everything that can be seen of the pool is what the model says.
    pub(crate) fn check(&self) {
        self.pool.check_integrity();
        let stats = self.pool.stats();
        let live = self.sets.iter().flat_map(|set| set.model.iter().flatten());
        let num_sealed = live.clone().filter(|block| block.is_sealed).count();
        let num_quarantined = self
            .retired
            .values()
            .filter(|quarantined| **quarantined)
            .count();
        assert_eq!(stats.in_state(BlockState::Free), self.num_free());
        assert_eq!(stats.in_state(BlockState::Sealed), num_sealed);
        assert_eq!(
            stats.in_state(BlockState::Writing),
            self.num_live() - num_sealed
        );
        assert_eq!(stats.in_state(BlockState::Quarantined), num_quarantined);
        assert_eq!(
            stats.in_state(BlockState::Limbo),
            self.retired.len() - num_quarantined
        );
        assert_eq!(stats.by_state.iter().sum::<usize>(), self.num_blocks, "I9");
        let unproven = self.holds.iter().filter(|hold| hold.is_quarantined);
        assert_eq!(
            stats.quarantined,
            unproven.map(|hold| hold.slots.len()).sum::<usize>()
        );
        for set in &self.sets {
            let handles: Vec<_> = set
                .model
                .iter()
                .flatten()
                .map(|block| block.handle)
                .collect();
            assert_eq!(set.blocks.handles(), handles);
        }
        for block in live.filter(|block| block.is_sealed) {
            self.check_bytes(&self.pool.pin(block.handle).unwrap(), block.tag);
        }
        for (guard, tag) in &self.guards {
            self.check_bytes(guard, *tag);
        }
    }

    fn check_bytes(&self, guard: &PinGuard, tag: u64) {
        for offset in [0, self.pool.config().block_bytes - 8] {
            let mut bytes = [0; 8];
            guard.read(offset, &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), tag, "{:?}", guard.handle());
        }
    }

    /// Lets go of everything: every block has to be free again.
    pub(crate) fn finish(mut self) -> Seen {
        self.sets.clear();
        self.guards.clear();
        self.holds.clear();
        for (participant, _) in self.participants.drain(..) {
            self.pool.leave(participant);
        }
        let stats = self.pool.stats();
        assert_eq!(stats.in_state(BlockState::Free), self.num_blocks);
        assert_eq!(stats.allocatable, self.num_blocks);
        self.pool.check_integrity();
        self.seen
    }
}
