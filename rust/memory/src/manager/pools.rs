//! Pools: memory that is made and registered before peers connect, and grown where it has to be.

use std::sync::Arc;

use super::BufferManager;
use crate::{
    config::{MemlockPolicy, PoolConfig},
    error::MemoryError,
    memlock,
    pool::{BlockSet, Pool, PoolId},
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
        // The limit is on host memory alone.
        if self.config.memlock == MemlockPolicy::Require && config.tier.is_host() {
            let state = self.state.lock();
            let pools = state.pools.values().map(|pool| pool.config());
            let pools = pools.filter(|config| config.tier.is_host());
            let bytes: u64 = pools.map(PoolConfig::max_bytes).sum();
            memlock::check(bytes + config.max_bytes())?;
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

    /// Makes a slab, registers it everywhere, and only then lets blocks be taken from it.
    fn add_slab(&self, pool: &Pool) -> Result<(), MemoryError> {
        let id = {
            let mut state = self.state.lock();
            let id = SlabId(state.next_slab);
            state.next_slab += 1;
            id
        };
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
