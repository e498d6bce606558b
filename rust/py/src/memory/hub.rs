//! What all objects of one manager share: the driver, and the peers by name.

use std::{sync::Arc, time::Duration};

use orchestra_core::ErrorCode;
use orchestra_memory::{
    BufferManager, Driver, ManagerConfig, ManagerStats, MemoryError, PeerId, Quiet,
};
use parking_lot::Mutex;
use pyo3::prelude::*;
use rustc_hash::FxHashMap;

use crate::errors::Failure;

/// The name that this process has for itself; its peers get the numbers above.
pub(super) const LOCAL: u64 = 0;

pub(super) struct Hub {
    pub(super) driver: Driver,
    pub(super) limits: ManagerConfig,
    peers: Mutex<Peers>,
}

/// A name may be used again once its peer is gone; the numbers below it may not.
#[derive(Default)]
struct Peers {
    by_name: FxHashMap<Arc<str>, PeerId>,
    by_id: FxHashMap<PeerId, Arc<str>>,
    last: u64,
}

impl Peers {
    fn remove(&mut self, name: &str) {
        if let Some(id) = self.by_name.remove(name) {
            self.by_id.remove(&id);
        }
    }
}

impl Hub {
    pub(super) fn new(manager: BufferManager, limits: ManagerConfig) -> Result<Self, Failure> {
        Ok(Self {
            driver: Driver::start(manager)?,
            limits,
            peers: Mutex::default(),
        })
    }

    /// The manager, where it has not been closed.
    pub(super) fn manager(&self) -> Result<&BufferManager, Failure> {
        if self.driver.is_closed() {
            let message = "the buffer manager is closed";
            return Err(Failure::new(ErrorCode::ShuttingDown, message));
        }
        Ok(self.driver.manager())
    }

    pub(super) fn peer(&self, name: &str) -> Result<PeerId, MemoryError> {
        let peers = self.peers.lock();
        let id = peers.by_name.get(name).copied();
        id.ok_or(MemoryError::UnknownPeer)
    }

    /// What a peer is called; `None` where it has gone since.
    pub(super) fn name_of(&self, peer: PeerId) -> Option<String> {
        let peers = self.peers.lock();
        peers.by_id.get(&peer).map(|name| String::from(&**name))
    }

    pub(super) fn connect(
        &self,
        name: &str,
        transport: &str,
        metadata: &[u8],
    ) -> Result<(), Failure> {
        let manager = self.manager()?;
        let id = {
            let mut peers = self.peers.lock();
            if peers.by_name.contains_key(name) {
                return Err(MemoryError::DuplicatePeer.into());
            }
            peers.last += 1;
            let (id, name) = (PeerId(LOCAL + peers.last), Arc::<str>::from(name));
            peers.by_name.insert(Arc::clone(&name), id);
            peers.by_id.insert(id, name);
            id
        };
        if let Err(refused) = manager.connect(id, transport, metadata) {
            self.peers.lock().remove(name);
            return Err(refused.into());
        }
        self.driver.ring();
        // Closed meanwhile: then nobody drives this connection, and nobody else ends it.
        self.manager().map(drop).inspect_err(|_| {
            drop(manager.disconnect(id, self.driver.now()));
        })
    }

    pub(super) fn disconnect(&self, name: &str) -> Result<Quiet, Failure> {
        let manager = self.manager()?;
        let quiet = manager.disconnect(self.peer(name)?, self.driver.now())?;
        if quiet == Quiet::Proven {
            self.peers.lock().remove(name);
        }
        self.driver.ring();
        Ok(quiet)
    }

    pub(super) fn confirm_gone(&self, name: &str) -> Result<(), Failure> {
        let manager = self.manager()?;
        manager.confirm_gone(self.peer(name)?, self.driver.now())?;
        self.peers.lock().remove(name);
        Ok(())
    }
}

/// Seconds from Python.
pub(super) fn seconds(key: &str, value: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(value).map_err(|_| {
        Failure::invalid(
            key,
            format!("{key} must be a number of seconds, at least 0"),
        )
    })
}

/// Counts of a manager as a dictionary.
#[derive(IntoPyObject)]
pub(super) struct StatsRow {
    active_transfers: usize,
    unproven_transfers: usize,
    inflight_bytes: u64,
    open_grants: usize,
    quarantined_blocks: usize,
    is_quarantine_full: bool,
    unproven_peers: usize,
    registrations: usize,
    registrations_held: usize,
    registered_bytes: u64,
    registration_hits: u64,
    registration_misses: u64,
    registration_evictions: u64,
}

impl From<ManagerStats> for StatsRow {
    fn from(stats: ManagerStats) -> Self {
        let ManagerStats {
            active_transfers,
            unproven_transfers,
            inflight_bytes,
            open_grants,
            quarantined_blocks,
            is_quarantine_full,
            unproven_peers,
            registrations,
        } = stats;
        Self {
            active_transfers,
            unproven_transfers,
            inflight_bytes,
            open_grants,
            quarantined_blocks,
            is_quarantine_full,
            unproven_peers,
            registrations: registrations.count,
            registrations_held: registrations.held,
            registered_bytes: registrations.bytes,
            registration_hits: registrations.hits,
            registration_misses: registrations.misses,
            registration_evictions: registrations.evictions,
        }
    }
}
