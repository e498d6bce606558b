//! A pool: blocks of one size in a few slabs, who owns each, and who holds it.
//!
//! Words of slots change by compare-and-swap, so pinning, unpinning and sealing take no lock. What has to agree
//! with the index of free runs or with the lists of owners (allocating, freeing, moving) happens under the
//! pool's one lock, which is never held while bytes are copied. Generations change under it alone.

mod block_set;
mod epochs;
mod holds;
mod moves;
mod pick;
mod renew;
mod report;
mod sets;
mod view;

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};

pub(crate) use self::pick::Cursor;
pub use self::{
    block_set::BlockSet,
    epochs::{Moved, ParticipantId},
    holds::{HoldKind, Holds, PinGuard},
    moves::Move,
    report::PoolStats,
    view::BlockView,
};
use self::{epochs::Epochs, sets::Sets};
use crate::{
    config::PoolConfig,
    error::MemoryError,
    fragmentation::Asks,
    runs::{Extent, FreeRuns},
    slab::Slab,
    table::{AfterHold, BlockState, Retired, Slot, SlotWord},
};

/// A pool of this process. No two pools of a process share an id, so a handle fits one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool {}", self.0)
    }
}

static NEXT_POOL: AtomicU32 = AtomicU32::new(0);

/// One life of one block. Goes stale when the block is freed, moved or taken into quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHandle {
    /// Its pool.
    pub pool: PoolId,
    /// Its slot there.
    pub slot: u32,
    /// Which life of the slot.
    pub generation: u32,
}

/// Blocks of one size.
pub struct Pool {
    id: PoolId,
    config: PoolConfig,
    /// The words of each slab's slots; set when the slab is added.
    words: Vec<OnceLock<Box<[Slot]>>>,
    /// `None` once a slab has been drained and taken out.
    slabs: RwLock<Vec<Option<Arc<Slab>>>>,
    /// Blocks held by transfers and grants that nobody has proven to be over.
    num_quarantined: AtomicUsize,
    state: Mutex<PoolState>,
}

/// What changes under the pool's lock.
struct PoolState {
    runs: FreeRuns,
    sets: Sets,
    epochs: Epochs,
    asks: Asks,
    /// Slabs whose free slots are not handed out any more.
    draining: Vec<bool>,
    extents: Vec<Extent>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("id", &self.id)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// An empty pool; [`Self::add_slab`] gives it memory.
    pub fn new(config: PoolConfig) -> Result<Arc<Self>, MemoryError> {
        config.validate()?;
        let slots_per_slab = config.slots_per_slab();
        Ok(Arc::new(Self {
            id: PoolId(NEXT_POOL.fetch_add(1, Ordering::Relaxed)),
            config,
            words: (0..config.max_slabs).map(|_| OnceLock::new()).collect(),
            slabs: RwLock::default(),
            num_quarantined: AtomicUsize::new(0),
            state: Mutex::new(PoolState {
                runs: FreeRuns::new(slots_per_slab),
                sets: Sets::default(),
                epochs: Epochs::default(),
                asks: Asks::default(),
                draining: Vec::new(),
                extents: Vec::new(),
            }),
        }))
    }

    /// Adds a slab of the configured size, whose blocks are all free.
    pub fn add_slab(&self, slab: Arc<Slab>) -> Result<(), MemoryError> {
        if slab.len() != self.config.slab_bytes {
            let (field, expected) = ("slab", "of the pool's slab_bytes");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let mut state = self.state.lock();
        let mut slabs = self.slabs.write();
        let limit = self.config.max_slabs as usize;
        let what = "slabs";
        let Some(words) = self.words.get(slabs.len()) else {
            return Err(MemoryError::LimitReached { what, limit });
        };
        words.get_or_init(|| {
            let slots = self.config.slots_per_slab();
            (0..slots).map(|_| Slot::default()).collect()
        });
        slabs.push(Some(slab));
        state.runs.add_slab();
        state.sets.add_slots(self.config.slots_per_slab());
        state.draining.push(false);
        Ok(())
    }

    /// The pool's name.
    pub const fn id(&self) -> PoolId {
        self.id
    }

    /// How it was made.
    pub const fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// The slabs that it has, those taken out left out.
    pub fn slabs(&self) -> Vec<Arc<Slab>> {
        self.slabs.read().iter().flatten().map(Arc::clone).collect()
    }

    /// Whether [`Self::add_slab`] may be called.
    pub fn may_grow(&self) -> bool {
        self.slabs.read().len() < self.config.max_slabs as usize
    }

    // === allocating and freeing ===

    /// Takes `n` blocks, together where that is possible. They come back when the set is dropped.
    pub fn allocate(self: &Arc<Self>, n: u32) -> Result<BlockSet, MemoryError> {
        let mut state = self.state.lock();
        let slots = self.take(&mut state, n, None)?;
        let set = state.sets.insert(slots);
        Ok(BlockSet::new(Arc::clone(self), set))
    }

    /// Takes `n` slots out of the free runs and makes them the owner's to write.
    fn take(
        &self,
        state: &mut PoolState,
        n: u32,
        after: Option<u32>,
    ) -> Result<Vec<u32>, MemoryError> {
        if n == 0 {
            let (field, expected) = ("n", "at least 1");
            return Err(MemoryError::InvalidField { field, expected });
        }
        state.asks.note(n);
        let mut extents = std::mem::take(&mut state.extents);
        extents.clear();
        let taken = state.runs.take(n, after, &mut extents);
        let slots = extents
            .iter()
            .flat_map(|extent| extent.start..extent.start + extent.len)
            .inspect(|&slot| {
                if let Some(word) = self.word(slot) {
                    word.take();
                }
            })
            .collect();
        state.extents = extents;
        if taken {
            return Ok(slots);
        }
        Err(MemoryError::Exhausted {
            requested: n as usize,
            free: state.runs.num_free(),
            largest_run: state.runs.largest() as usize,
            quarantined: self.num_quarantined(),
        })
    }

    /// Takes blocks from their owners: all, or with an error none. A block that somebody still holds is not used
    /// again before the last hold ends.
    pub fn free(&self, handles: &[BlockHandle]) -> Result<(), MemoryError> {
        let mut state = self.state.lock();
        for handle in handles {
            let word = self.named(*handle)?.load();
            if word.generation() != handle.generation || !word.state().is_live() {
                return Err(MemoryError::StaleHandle);
            }
        }
        let mut slots: Vec<u32> = handles.iter().map(|handle| handle.slot).collect();
        slots.sort_unstable();
        if slots.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(MemoryError::StaleHandle);
        }
        for &slot in &slots {
            state.sets.remove_block(slot);
        }
        self.retire_all(&mut state, slots);
        Ok(())
    }

    /// Retires slots that their owners have given up, and puts those that nobody holds into the index.
    fn retire_all(&self, state: &mut PoolState, slots: impl IntoIterator<Item = u32>) {
        let mut run: Option<Extent> = None;
        for slot in slots {
            let Some(word) = self.word(slot) else {
                continue;
            };
            // Owned blocks are live, and the lock is held: the generation is the current one.
            if word.retire(word.load().generation()) != Ok(Retired::Free) {
                continue;
            }
            match &mut run {
                Some(run) if self.follows(*run, slot) => run.len += 1,
                _ => {
                    let done = run.replace(Extent {
                        start: slot,
                        len: 1,
                    });
                    if let Some(done) = done {
                        self.put_back(state, done);
                    }
                }
            }
        }
        if let Some(run) = run {
            self.put_back(state, run);
        }
    }

    /// Gives back a retired slot whose last hold has ended.
    fn give_back(&self, state: &mut PoolState, slot: u32) {
        if let Some(word) = self.word(slot) {
            word.give_back();
            self.put_back(
                state,
                Extent {
                    start: slot,
                    len: 1,
                },
            );
        }
    }

    fn put_back(&self, state: &mut PoolState, extent: Extent) {
        let slab = extent.start / self.config.slots_per_slab();
        if !state.draining[slab as usize] {
            state.runs.give_back(extent);
        }
    }

    /// Whether a slot lies right behind a run, in the same slab.
    fn follows(&self, run: Extent, slot: u32) -> bool {
        slot == run.start + run.len && !slot.is_multiple_of(self.config.slots_per_slab())
    }

    // === single blocks ===

    /// Writing → Sealed: from now on the block may be read and is never written. All, or with an error those before
    /// the one that refused.
    pub fn seal(&self, handles: &[BlockHandle]) -> Result<(), MemoryError> {
        handles
            .iter()
            .try_for_each(|handle| self.named(*handle)?.seal(handle.generation))
    }

    /// Copies bytes into a block that its owner fills.
    pub fn write(&self, handle: BlockHandle, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let at = self.inside(offset, bytes.len() as u64)?;
        self.named(handle)?.pin_for_write(handle.generation)?;
        let written = match self.place(handle.slot) {
            Some((slab, start)) => slab.write(start + at, bytes),
            None => Err(MemoryError::StaleHandle),
        };
        self.end_pin(handle.slot);
        written
    }

    /// Holds a sealed block, so that it is neither moved nor used again.
    pub fn pin(self: &Arc<Self>, handle: BlockHandle) -> Result<PinGuard, MemoryError> {
        self.named(handle)?.pin(handle.generation)?;
        Ok(PinGuard::new(Arc::clone(self), handle))
    }

    /// The state of a handle's block, or `None` where the handle is stale.
    pub fn state_of(&self, handle: BlockHandle) -> Option<BlockState> {
        let word = self.named(handle).ok()?.load();
        let is_named = word.generation() == handle.generation && word.state().is_live();
        is_named.then(|| word.state())
    }

    /// The slab of a slot and the offset of its first byte there.
    pub fn place(&self, slot: u32) -> Option<(Arc<Slab>, u64)> {
        let per_slab = self.config.slots_per_slab();
        let slabs = self.slabs.read();
        let slab = slabs.get((slot / per_slab) as usize)?.as_ref()?;
        let offset = u64::from(slot % per_slab) * self.config.block_bytes;
        debug_assert!(
            offset + self.config.block_bytes <= slab.len(),
            "I1: a block lies inside one registration"
        );
        Some((Arc::clone(slab), offset))
    }

    /// Refuses a range that leaves the block.
    fn inside(&self, offset: u64, len: u64) -> Result<u64, MemoryError> {
        let limit = self.config.block_bytes;
        match offset.checked_add(len) {
            Some(end) if end <= limit => Ok(offset),
            _ => Err(MemoryError::OutOfBounds { offset, len, limit }),
        }
    }

    fn end_pin(&self, slot: u32) {
        self.end_hold(slot, Slot::unpin);
    }

    fn end_lease(&self, slot: u32) {
        self.end_hold(slot, Slot::unlease);
    }

    fn end_hold(&self, slot: u32, end: impl Fn(&Slot) -> AfterHold) {
        if let Some(word) = self.word(slot)
            && end(word) == AfterHold::GiveBack
        {
            self.give_back(&mut self.state.lock(), slot);
        }
    }

    fn word(&self, slot: u32) -> Option<&Slot> {
        let per_slab = self.config.slots_per_slab();
        let words = self.words.get((slot / per_slab) as usize)?.get()?;
        words.get((slot % per_slab) as usize)
    }

    fn word_now(&self, slot: u32) -> Option<SlotWord> {
        self.word(slot).map(Slot::load)
    }

    /// The slot of a handle of this pool.
    fn named(&self, handle: BlockHandle) -> Result<&Slot, MemoryError> {
        match self.word(handle.slot) {
            Some(word) if handle.pool == self.id => Ok(word),
            _ => Err(MemoryError::ForeignHandle),
        }
    }

    /// Blocks held by transfers and grants that nobody has proven to be over.
    pub fn num_quarantined(&self) -> usize {
        self.num_quarantined.load(Ordering::Relaxed)
    }
}
