//! Pools: memory that is made and registered before peers connect, and grown where it has to be. And memory of others,
//! which is registered when it comes.

use std::sync::Arc;

use super::BufferManager;
use crate::{
    config::{MemlockPolicy, PoolConfig},
    error::MemoryError,
    memlock,
    pool::{BlockSet, Pool, PoolId},
    registrations::{ForeignMemory, Region, RegistrationGuard},
    slab::Slab,
    transport::{PeerId, SlabId},
};

impl BufferManager {
    /// Makes a pool and registers its first slabs with every transport.
    pub fn create_pool(&self, config: PoolConfig) -> Result<Arc<Pool>, MemoryError> {
        config.validate()?;
        let mut limits = self.transports.iter().map(|one| one.slab_bytes_max());
        if limits.any(|limit| config.slab_bytes > limit) {
            let (field, expected) = ("slab_bytes", "at most 4 GiB where a card registers it");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let mut transports = self.transports.iter();
        transports.try_for_each(|one| one.check_tier(config.tier))?;
        if config.tier.is_host() {
            self.check_memlock(config.max_bytes())?;
        }
        let pool = Pool::new(config)?;
        for _ in 0..config.initial_slabs {
            if let Err(refused) = self.add_slab(&pool) {
                for slab in pool.slabs() {
                    self.deregister(slab.id());
                }
                return Err(refused);
            }
        }
        self.state.lock().pools.insert(pool.id(), Arc::clone(&pool));
        Ok(pool)
    }

    /// The pool of this name.
    pub fn pool(&self, id: PoolId) -> Option<Arc<Pool>> {
        self.state.lock().pools.get(&id).map(Arc::clone)
    }

    /// Takes blocks, and adds slabs where that is what it takes. Peers learn of a new slab when they connect anew.
    pub fn allocate(&self, pool: &Arc<Pool>, n: u32) -> Result<BlockSet, MemoryError> {
        loop {
            match pool.allocate(n) {
                Err(MemoryError::Exhausted { .. }) if pool.may_grow() => self.add_slab(pool)?,
                answer => return answer,
            }
        }
    }

    /// Takes blocks more for a set, as [`Self::allocate`] does.
    pub fn extend(&self, set: &mut BlockSet, n: u32) -> Result<(), MemoryError> {
        loop {
            match set.extend(n) {
                Err(MemoryError::Exhausted { .. }) if set.pool().may_grow() => {
                    self.add_slab(&Arc::clone(set.pool()))?;
                }
                answer => return answer,
            }
        }
    }

    /// Registers memory that somebody else has made, for [`put_from`](Self::put_from) and [`get_into`](Self::get_into). Where
    /// it, or more around it, is registered already, this costs a look-up.
    pub fn register_external(
        &self,
        memory: Arc<dyn ForeignMemory>,
    ) -> Result<RegistrationGuard, MemoryError> {
        let (region, is_writable) = (memory.region(), memory.is_writable());
        if let Some(guard) = self.registrations.find(region, is_writable) {
            return Ok(guard);
        }
        if region.len == 0 || region.address.checked_add(region.len).is_none() {
            let (field, expected) = ("memory", "at least one byte, and inside all memory");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let mut limits = self.transports.iter().map(|one| one.slab_bytes_max());
        if limits.any(|limit| region.len > limit) {
            let (field, expected) = ("memory", "at most 4 GiB where a card registers it");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let mut transports = self.transports.iter();
        transports.try_for_each(|one| one.check_tier(region.tier))?;
        if region.tier.is_host() {
            self.check_memlock(region.len)?;
        }
        let slab = Arc::new(Slab::over(self.next_slab(), memory));
        self.registrations.register(slab, region, is_writable)
    }

    /// Ends the registrations of what overlaps a region, before its memory is used for something else; how many there were.
    /// One that somebody holds is of no use for new transfers from now on, and goes with its last holder.
    pub fn invalidate(&self, region: Region) -> usize {
        self.registrations.invalidate(region)
    }

    /// Refuses bytes more where registering them would need to lock more than the process may.
    fn check_memlock(&self, more: u64) -> Result<(), MemoryError> {
        if self.config.memlock == MemlockPolicy::Ignore {
            return Ok(());
        }
        let state = self.state.lock();
        let pools = state.pools.values().map(|pool| pool.config());
        // The limit is on host memory alone.
        let pools = pools.filter(|config| config.tier.is_host());
        let bytes: u64 = pools.map(PoolConfig::max_bytes).sum();
        memlock::check(bytes + self.registrations.stats().bytes + more)
    }

    fn next_slab(&self) -> SlabId {
        let mut state = self.state.lock();
        let id = SlabId(state.next_slab);
        state.next_slab += 1;
        id
    }

    /// Makes a slab, registers it everywhere, and only then lets blocks be taken from it.
    fn add_slab(&self, pool: &Pool) -> Result<(), MemoryError> {
        let id = self.next_slab();
        let slab = Arc::new(Slab::create(id, &pool.config().slab())?);
        let registered = self
            .transports
            .iter()
            .try_for_each(|one| one.register(&slab));
        registered
            .and_then(|()| pool.add_slab(slab))
            .inspect_err(|_| self.deregister(id))
    }

    /// Takes a drained slab out of its pool. Its memory stays mapped until every peer that may know of it is proven
    /// to be quiet: deregistering does not stop a late write, and a write into unmapped memory would end us.
    pub fn retire_slab(&self, pool: &Pool, slab: SlabId) -> Result<(), MemoryError> {
        let memory = pool.take_out(slab)?;
        self.deregister(slab);
        let mut state = self.state.lock();
        let peers: Vec<PeerId> = state.peers.keys().copied().collect();
        if !peers.is_empty() {
            state.retired.push((memory, peers));
        }
        Ok(())
    }

    /// Takes a slab back from the transports; those that never had it say so.
    fn deregister(&self, slab: SlabId) {
        for transport in &self.transports {
            drop(transport.deregister(slab));
        }
    }
}
