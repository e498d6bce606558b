//! The whole of a process's registered memory: pools, peers, grants and transfers.
//!
//! There is no thread here and no clock: whoever owns the manager calls [`BufferManager::progress`] with the time
//! and a budget. Locks are taken in one order, the manager's before a pool's, and none is held while a caller is
//! told anything.

mod arrivals;
mod due;
mod grants;
mod pools;
mod transfers;

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use orchestra_core::Time;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

pub use self::arrivals::{Arrival, Event};
use crate::{
    config::ManagerConfig,
    error::MemoryError,
    lease::Grants,
    pool::{Pool, PoolId},
    registrations::{Limits, RegistrationStats, Registrations},
    slab::Slab,
    transfer::{Engine, Finished},
    transport::{PeerId, Quiet, Transport},
};

/// Events that wait to be taken; notifications stay with their transport while there are as many.
const EVENTS_MAX: usize = 1024;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// Being opened by somebody who holds no lock.
    Opening,
    Open,
    /// Being closed by somebody who holds no lock.
    Closing,
    /// Closed, and nobody knows whether late bytes may still land.
    Unproven,
}

struct Peer {
    transport: Arc<dyn Transport>,
    link: Link,
}

struct ManagerState {
    pools: FxHashMap<PoolId, Arc<Pool>>,
    next_slab: u32,
    /// Slabs that no pool has any more, with the peers that may still write to them.
    retired: Vec<(Arc<Slab>, Vec<PeerId>)>,
    peers: FxHashMap<PeerId, Peer>,
    grants: Grants,
    engine: Engine,
    events: VecDeque<Event>,
    next_transfer: u64,
}

/// Registered memory, who may touch it, and what moves.
pub struct BufferManager {
    local: PeerId,
    config: ManagerConfig,
    transports: Vec<Arc<dyn Transport>>,
    registrations: Arc<Registrations>,
    state: Mutex<ManagerState>,
}

/// Counts of a manager at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ManagerStats {
    /// Transfers that have not ended.
    pub active_transfers: usize,
    /// Transfers that were given up and that nobody has proven to be over.
    pub unproven_transfers: usize,
    /// Bytes of transfers under way.
    pub inflight_bytes: u64,
    /// Grants that peers may use, or may still be using.
    pub open_grants: usize,
    /// Blocks that wait for proof. An operator should look where this stays.
    pub quarantined_blocks: usize,
    /// Whether so many wait that grants and transfers are refused.
    pub is_quarantine_full: bool,
    /// Peers whose connection has ended without proof that they are quiet.
    pub unproven_peers: usize,
    /// Memory of others that is registered.
    pub registrations: RegistrationStats,
}

impl fmt::Debug for BufferManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.transports.iter().map(|one| one.name()).collect();
        f.debug_struct("BufferManager")
            .field("local", &self.local)
            .field("transports", &names)
            .finish_non_exhaustive()
    }
}

impl BufferManager {
    /// A manager without pools. `local` is what peers call this process.
    pub fn new(
        local: PeerId,
        config: ManagerConfig,
        transports: Vec<Arc<dyn Transport>>,
    ) -> Result<Self, MemoryError> {
        config.validate()?;
        let state = ManagerState {
            pools: FxHashMap::default(),
            next_slab: 0,
            retired: Vec::new(),
            peers: FxHashMap::default(),
            grants: Grants::default(),
            engine: Engine::new(config.inflight_bytes_max),
            events: VecDeque::new(),
            next_transfer: 0,
        };
        let limits = Limits {
            count: config.max_registrations,
            idle_bytes: config.idle_registration_bytes_max,
        };
        Ok(Self {
            local,
            config,
            registrations: Registrations::new(&transports, limits),
            transports,
            state: Mutex::new(state),
        })
    }

    /// What peers call this process.
    pub const fn local(&self) -> PeerId {
        self.local
    }

    /// The transports, in the order in which they were given.
    pub fn transports(&self) -> &[Arc<dyn Transport>] {
        &self.transports
    }

    fn transport(&self, name: &str) -> Result<Arc<dyn Transport>, MemoryError> {
        let found = self.transports.iter().find(|one| one.name() == name);
        found.map(Arc::clone).ok_or(MemoryError::InvalidField {
            field: "transport",
            expected: "one that the manager was opened with",
        })
    }

    // === peers ===

    /// What a peer needs to connect over this transport: names the slabs that exist now.
    pub fn local_metadata(&self, transport: &str) -> Result<Vec<u8>, MemoryError> {
        self.transport(transport)?.local_metadata()
    }

    /// Connects to a process over a transport.
    pub fn connect(
        &self,
        peer: PeerId,
        transport: &str,
        metadata: &[u8],
    ) -> Result<(), MemoryError> {
        let transport = self.transport(transport)?;
        {
            let mut state = self.state.lock();
            let is_known = state.peers.contains_key(&peer) || state.is_waiting_for(peer);
            if peer == self.local || is_known {
                return Err(MemoryError::DuplicatePeer);
            }
            let transport = Arc::clone(&transport);
            let link = Link::Opening;
            state.peers.insert(peer, Peer { transport, link });
        }
        let connected = transport.connect(peer, metadata);
        let mut state = self.state.lock();
        match (&connected, state.peers.get_mut(&peer)) {
            (Ok(()), Some(known)) => known.link = Link::Open,
            _ => drop(state.peers.remove(&peer)),
        }
        connected
    }

    /// Ends a connection and its transfers. Blocks that they or the peer may still touch come back at once where the
    /// transport can prove that nothing does any more, else when it is asked again and can, or with
    /// [`Self::confirm_gone`].
    pub fn disconnect(&self, peer: PeerId, now: Time) -> Result<Quiet, MemoryError> {
        let transport = {
            let mut state = self.state.lock();
            let known = state.peers.get_mut(&peer);
            let known = known
                .filter(|peer| matches!(peer.link, Link::Open | Link::Unproven))
                .ok_or(MemoryError::UnknownPeer)?;
            known.link = Link::Closing;
            Arc::clone(&known.transport)
        };
        let closed = transport.disconnect(peer);
        let mut state = self.state.lock();
        if let Some(known) = state.peers.get_mut(&peer) {
            known.link = Link::Unproven;
        }
        // A transport that cannot even say so has proven nothing.
        let quiet = *closed.as_ref().unwrap_or(&Quiet::Unproven);
        let finished = state.peer_is_gone(peer, quiet, now);
        drop(state);
        tell(finished);
        closed
    }

    /// The caller knows that the peer's process is dead and its connection torn down: whatever it had under way
    /// touches nothing any more.
    pub fn confirm_gone(&self, peer: PeerId, now: Time) -> Result<(), MemoryError> {
        let mut state = self.state.lock();
        let known = state.peers.get(&peer).ok_or(MemoryError::UnknownPeer)?;
        if known.link != Link::Unproven {
            return Err(MemoryError::InUse);
        }
        let finished = state.peer_is_gone(peer, Quiet::Proven, now);
        drop(state);
        tell(finished);
        Ok(())
    }

    // === progress ===

    /// Moves everything along: the transports for about `budget`, then transfers, leases and notifications. Returns
    /// how many things moved; 0 says that the caller may wait a little.
    pub fn progress(&self, now: Time, budget: Duration) -> usize {
        let share = budget / (self.transports.len().max(1) as u32);
        let mut moved: usize = self.transports.iter().map(|one| one.progress(share)).sum();
        let mut state = self.state.lock();
        let finished = state.engine.progress(now);
        for id in state.grants.expire(now, self.config.lease_grace) {
            moved += 1;
            state.events.push_back(Event::WriteGrantExpired(id));
        }
        moved += finished.len() + self.take_notifications(&mut state);
        drop(state);
        tell(finished);
        moved
    }

    /// The next thing that happened to memory of this process.
    pub fn take_event(&self) -> Option<Event> {
        self.state.lock().events.pop_front()
    }

    /// Counts now.
    pub fn stats(&self) -> ManagerStats {
        let state = self.state.lock();
        let (active_transfers, unproven_transfers) = state.engine.counts();
        let quarantined_blocks = self.num_quarantined(&state);
        let unproven = state
            .peers
            .values()
            .filter(|peer| peer.link == Link::Unproven);
        ManagerStats {
            active_transfers,
            unproven_transfers,
            inflight_bytes: state.engine.inflight_bytes(),
            open_grants: state.grants.len(),
            quarantined_blocks,
            is_quarantine_full: quarantined_blocks >= self.config.max_quarantined_blocks,
            unproven_peers: unproven.count(),
            registrations: self.registrations.stats(),
        }
    }

    /// Refuses new grants and transfers while too much waits for proof.
    fn check_quarantine(&self, state: &ManagerState) -> Result<(), MemoryError> {
        let limit = self.config.max_quarantined_blocks;
        let what = "quarantined blocks";
        if self.num_quarantined(state) >= limit {
            return Err(MemoryError::LimitReached { what, limit });
        }
        Ok(())
    }

    fn num_quarantined(&self, state: &ManagerState) -> usize {
        let pools = state.pools.values().map(|pool| pool.num_quarantined());
        pools.sum::<usize>() + self.registrations.num_quarantined()
    }
}

impl ManagerState {
    fn is_waiting_for(&self, peer: PeerId) -> bool {
        self.engine.has_peer(peer) || self.grants.has_peer(peer)
    }

    fn peer_is_gone(&mut self, peer: PeerId, quiet: Quiet, now: Time) -> Vec<Finished> {
        let finished = self.engine.peer_is_gone(peer, quiet, now);
        if quiet == Quiet::Proven {
            self.grants.peer_is_quiet(peer);
            self.peers.remove(&peer);
            self.retired.retain_mut(|(_, peers)| {
                peers.retain(|one| *one != peer);
                !peers.is_empty()
            });
        }
        finished
    }
}

/// Tells callers how their transfers ended.
fn tell(finished: Vec<Finished>) {
    for one in finished {
        one.shared.end(one.result);
    }
}
