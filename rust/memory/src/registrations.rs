//! Buffers that somebody else has made, registered for transfers of ours: a cache, because registering costs per page
//! and the same buffers come again and again.
//!
//! A registration keeps its memory alive, so an address never means other bytes than those that were registered. One that
//! nobody holds is kept for the next time, within limits; the least recently used goes first. Peers are never told of such
//! memory: it is the local side of transfers alone.
//!
//! Reading order: this module is what callers and transports see, [`state`] what changes under the lock.

#![expect(
    unsafe_code,
    reason = "the trait by which owners promise that memory stays"
)]

mod state;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use self::state::State;
use crate::{
    error::MemoryError,
    slab::Slab,
    tier::Tier,
    transport::{SlabId, Transport},
};

/// Bytes of one kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// Where they lie; an address of the device where the tier is a device's.
    pub tier: Tier,
    /// First byte.
    pub address: u64,
    /// Bytes; at least one.
    pub len: u64,
}

impl Region {
    /// The byte behind the last; as far as addresses go where it would lie beyond.
    const fn end(&self) -> u64 {
        self.address.saturating_add(self.len)
    }

    const fn overlaps(&self, other: &Self) -> bool {
        self.address < other.end() && other.address < self.end()
    }

    const fn covers(&self, other: &Self) -> bool {
        self.address <= other.address && other.end() <= self.end()
    }
}

/// Memory that somebody else has made.
///
/// # Safety
/// `region` always gives the same answer. Its bytes stay mapped, or allocated on their device, until the value is
/// dropped, and may be read, and written where `is_writable` says so, by anybody at any time until then. Dropping the
/// value waits for nobody.
pub unsafe trait ForeignMemory: Send + Sync {
    /// Where the bytes lie.
    fn region(&self) -> Region;

    /// Whether they may be written.
    fn is_writable(&self) -> bool;
}

/// What the cache keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Registrations, held ones included.
    pub(crate) count: usize,
    /// Bytes of those that nobody holds.
    pub(crate) idle_bytes: u64,
}

/// Counts of the cache since the start, and what it has now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegistrationStats {
    /// Requests that found their memory registered.
    pub hits: u64,
    /// Requests that had it registered.
    pub misses: u64,
    /// Registrations that were given up to make room, or because a larger one took their place.
    pub evictions: u64,
    /// How often something was invalidated.
    pub epoch: u64,
    /// Registrations now.
    pub count: usize,
    /// Those of them that somebody holds.
    pub held: usize,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Blocks of transfers that nobody has proven to be over.
    pub quarantined_blocks: usize,
}

/// The registrations of one manager.
pub(crate) struct Registrations {
    transports: Vec<Arc<dyn Transport>>,
    limits: Limits,
    state: Mutex<State>,
    quarantined: AtomicUsize,
}

impl Registrations {
    pub(crate) fn new(transports: &[Arc<dyn Transport>], limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            transports: transports.to_vec(),
            limits,
            state: Mutex::default(),
            quarantined: AtomicUsize::new(0),
        })
    }

    /// Holds the registration that covers a region, where there is one.
    pub(crate) fn find(
        self: &Arc<Self>,
        region: Region,
        is_writable: bool,
    ) -> Option<RegistrationGuard> {
        let mut state = self.state.lock();
        let id = state.covering(region)?;
        state.stats.hits += 1;
        self.hold(&mut state, id, region, is_writable)
    }

    /// Registers a slab over somebody's memory with every transport and holds it. Locks nothing meanwhile: where somebody
    /// else was faster with the same region, this one is given up again.
    pub(crate) fn register(
        self: &Arc<Self>,
        slab: Arc<Slab>,
        region: Region,
        is_writable: bool,
    ) -> Result<RegistrationGuard, MemoryError> {
        let evicted = self.state.lock().make_room(region, self.limits)?;
        self.deregister(evicted);
        let mut transports = self.transports.iter();
        let registered = transports.try_for_each(|one| one.register(&slab));
        if let Err(refused) = registered {
            self.deregister(vec![slab]);
            return Err(refused);
        }
        let mut state = self.state.lock();
        state.stats.misses += 1;
        let id = state.covering(region).unwrap_or_else(|| {
            state.insert(Arc::clone(&slab), region);
            slab.id()
        });
        let guard = self.hold(&mut state, id, region, is_writable);
        drop(state);
        if id != slab.id() {
            self.deregister(vec![slab]);
        }
        guard.ok_or(MemoryError::StaleHandle)
    }

    fn hold(
        self: &Arc<Self>,
        state: &mut State,
        id: SlabId,
        region: Region,
        is_writable: bool,
    ) -> Option<RegistrationGuard> {
        let entry = state.entries.get_mut(&id)?;
        entry.holders += 1;
        if entry.holders == 1 {
            state.idle_bytes -= entry.region.len;
            state.stats.held += 1;
        }
        Some(RegistrationGuard {
            cache: Arc::clone(self),
            slab: Arc::clone(&entry.slab),
            offset: region.address - entry.region.address,
            region,
            is_writable,
        })
    }

    fn release(&self, id: SlabId) {
        let mut state = self.state.lock();
        state.ticks += 1;
        let now = state.ticks;
        let Some(entry) = state.entries.get_mut(&id) else {
            return;
        };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        entry.used = now;
        let (is_stale, len) = (entry.is_stale, entry.region.len);
        state.stats.held -= 1;
        state.idle_bytes += len;
        let gone = if is_stale {
            state.remove(id).into_iter().collect()
        } else {
            state.evict_until(|state| state.idle_bytes <= self.limits.idle_bytes)
        };
        drop(state);
        self.deregister(gone);
    }

    /// Forgets what overlaps a region: those that somebody holds are of no use from now on, and go with their last holder.
    /// How many there were.
    pub(crate) fn invalidate(&self, region: Region) -> usize {
        let mut state = self.state.lock();
        state.stats.epoch += 1;
        let ids = state.overlapping(region);
        let gone: Vec<_> = ids.iter().filter_map(|id| state.invalidate(*id)).collect();
        drop(state);
        self.deregister(gone);
        ids.len()
    }

    pub(crate) fn stats(&self) -> RegistrationStats {
        RegistrationStats {
            quarantined_blocks: self.num_quarantined(),
            ..self.state.lock().stats
        }
    }

    /// Blocks of transfers that nobody has proven to be over.
    pub(crate) fn num_quarantined(&self) -> usize {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// Takes slabs back from the transports, without a lock: they may be slow, and owners of memory may run code.
    fn deregister(&self, slabs: Vec<Arc<Slab>>) {
        for slab in slabs {
            for transport in &self.transports {
                // One that never had it says so, and one in which it is still under way keeps it alive.
                drop(transport.deregister(slab.id()));
            }
        }
    }
}

/// Memory of somebody else that is registered while this lives. Its blocks are what [`put_from`] and [`get_into`] count:
/// as long as those of the grant, one after the other.
///
/// [`put_from`]: crate::BufferManager::put_from
/// [`get_into`]: crate::BufferManager::get_into
pub struct RegistrationGuard {
    cache: Arc<Registrations>,
    slab: Arc<Slab>,
    /// Where the region begins in the slab.
    offset: u64,
    region: Region,
    is_writable: bool,
}

impl fmt::Debug for RegistrationGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrationGuard")
            .field("region", &self.region)
            .field("is_writable", &self.is_writable)
            .finish_non_exhaustive()
    }
}

impl RegistrationGuard {
    /// The memory that was asked for.
    pub const fn region(&self) -> Region {
        self.region
    }

    /// Whether bytes of peers may be read into it.
    pub const fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Whether it was invalidated, so that no transfer may begin with it any more.
    pub fn is_stale(&self) -> bool {
        let state = self.cache.state.lock();
        let entry = state.entries.get(&self.slab.id());
        entry.is_none_or(|entry| entry.is_stale)
    }

    /// Its slab, and where the region begins in it.
    pub(crate) fn place(&self) -> (SlabId, u64) {
        (self.slab.id(), self.offset)
    }

    /// Whether it is of this cache.
    pub(crate) fn is_of(&self, cache: &Arc<Registrations>) -> bool {
        Arc::ptr_eq(&self.cache, cache)
    }

    /// Holds the memory for a transfer of so many blocks.
    pub(crate) fn hold(&self, blocks: usize) -> Result<ForeignHold, MemoryError> {
        let mut state = self.cache.state.lock();
        let entry = state.entries.get(&self.slab.id());
        if entry.is_none_or(|entry| entry.is_stale) {
            return Err(MemoryError::StaleHandle);
        }
        let id = self.slab.id();
        let held = self
            .cache
            .hold(&mut state, id, self.region, self.is_writable);
        let guard = held.ok_or(MemoryError::StaleHandle)?;
        Ok(ForeignHold {
            guard,
            blocks,
            is_quarantined: false,
        })
    }
}

impl Drop for RegistrationGuard {
    fn drop(&mut self) {
        self.cache.release(self.slab.id());
    }
}

/// Foreign memory that a transfer uses.
pub(crate) struct ForeignHold {
    guard: RegistrationGuard,
    blocks: usize,
    is_quarantined: bool,
}

impl ForeignHold {
    pub(crate) const fn len(&self) -> usize {
        self.blocks
    }

    /// Notes that nobody knows when this hold ends; how many blocks wait for it.
    pub(crate) fn quarantine(&mut self) -> usize {
        if !std::mem::replace(&mut self.is_quarantined, true) {
            let quarantined = &self.guard.cache.quarantined;
            quarantined.fetch_add(self.blocks, Ordering::Relaxed);
        }
        self.blocks
    }
}

impl Drop for ForeignHold {
    fn drop(&mut self) {
        if self.is_quarantined {
            let quarantined = &self.guard.cache.quarantined;
            quarantined.fetch_sub(self.blocks, Ordering::Relaxed);
        }
    }
}
