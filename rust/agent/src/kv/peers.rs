//! Connections to other workers, made when they are first needed.
//!
//! A link belongs to one start of a worker's process, its epoch. One that broke, or whose peer was silent for too long,
//! is closed; a new one to the same process waits, a little longer each time.

use std::time::Duration;

use orchestra_core::Time;
use orchestra_memory::{MemoryError, PeerId, Quiet};
use orchestra_proto::v1;
use rustc_hash::FxHashMap;

use super::pool::KvPool;

/// Processes that this worker is connected to, or remembers not to be; the one used longest ago makes room.
const LINKS_MAX: usize = 256;
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often a peer that is leaving is asked whether it is quiet.
const ASK_EVERY: Duration = Duration::from_millis(200);

#[derive(Debug)]
struct Link {
    worker_id: String,
    /// What the manager calls it; none while there is no connection.
    peer: Option<PeerId>,
    /// Closed from this side; nobody has proven that it is quiet.
    is_leaving: bool,
    used: Time,
    /// Not dialled before this.
    until: Time,
    pause: Duration,
}

/// Why a worker cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreachable {
    #[error("the last connection to it broke a moment ago")]
    TooSoon,
    #[error("no transport reaches it")]
    NoTransport,
    #[error("too many workers are connected")]
    TooMany,
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// All links, by epoch.
#[derive(Debug, Default)]
pub(super) struct Peers {
    links: FxHashMap<u64, Link>,
    last_peer: u64,
    asked: Time,
}

impl Peers {
    /// The connection to this process, made now where there is none.
    pub(super) fn connect(
        &mut self,
        pool: &KvPool,
        to: &v1::KvPeer,
    ) -> Result<PeerId, Unreachable> {
        let now = pool.now();
        if let Some(link) = self.links.get_mut(&to.epoch) {
            link.used = now;
            match link.peer {
                Some(peer) if !link.is_leaving => {
                    // One that has held for so long is as good as new.
                    if now > link.until + PAUSE_MAX {
                        link.pause = PAUSE_MIN;
                    }
                    return Ok(peer);
                }
                None if now >= link.until => {}
                _ => return Err(Unreachable::TooSoon),
            }
        }
        self.make_room(pool, to)?;
        let transport = choose(pool, to).ok_or(Unreachable::NoTransport)?;
        self.last_peer += 1;
        let peer = PeerId(self.last_peer);
        let link = self.links.entry(to.epoch).or_insert_with(|| Link {
            worker_id: to.worker_id.clone(),
            peer: None,
            is_leaving: false,
            used: now,
            until: now,
            pause: PAUSE_MIN,
        });
        let connected = pool
            .manager()
            .connect(peer, transport, &to.metadata[transport]);
        match connected {
            Ok(()) => link.peer = Some(peer),
            Err(error) => {
                link.back_off(now);
                return Err(error.into());
            }
        }
        tracing::debug!(
            worker_id = to.worker_id,
            transport,
            "connected to a worker's KV"
        );
        Ok(peer)
    }

    /// Other starts of the same worker are over; beyond the limit, so is the link that was used longest ago.
    fn make_room(&mut self, pool: &KvPool, to: &v1::KvPeer) -> Result<(), Unreachable> {
        let is_older = |(epoch, link): &(&u64, &Link)| {
            **epoch != to.epoch && link.worker_id == to.worker_id && !link.is_leaving
        };
        let older: Vec<u64> = self
            .links
            .iter()
            .filter(is_older)
            .map(|(it, _)| *it)
            .collect();
        for epoch in older {
            self.leave(pool, epoch);
        }
        if self.links.len() < LINKS_MAX || self.links.contains_key(&to.epoch) {
            return Ok(());
        }
        let idle = self.links.iter().filter(|(_, link)| !link.is_leaving);
        let oldest = idle.min_by_key(|(_, link)| link.used).map(|(it, _)| *it);
        if let Some(epoch) = oldest {
            self.leave(pool, epoch);
            self.links.retain(|_, link| link.peer.is_some());
        }
        if self.links.len() < LINKS_MAX {
            Ok(())
        } else {
            Err(Unreachable::TooMany)
        }
    }

    /// Closes a connection that broke or that cannot be trusted to be quiet. Its transfers end, and their blocks come
    /// back when it is proven that the peer touches nothing any more.
    pub(super) fn leave(&mut self, pool: &KvPool, epoch: u64) {
        let now = pool.now();
        let Some(link) = self.links.get_mut(&epoch) else {
            return;
        };
        link.back_off(now);
        link.ask(pool);
    }

    /// Asks those that are leaving whether they are quiet.
    pub(super) fn tick(&mut self, pool: &KvPool) {
        let now = pool.now();
        if now < self.asked + ASK_EVERY {
            return;
        }
        self.asked = now;
        for link in self.links.values_mut().filter(|link| link.is_leaving) {
            link.ask(pool);
        }
    }

    pub(super) fn is_any_leaving(&self) -> bool {
        self.links.values().any(|link| link.is_leaving)
    }
}

impl Link {
    fn back_off(&mut self, now: Time) {
        self.until = now + self.pause;
        self.pause = PAUSE_MAX.min(self.pause * 2);
    }

    fn ask(&mut self, pool: &KvPool) {
        let Some(peer) = self.peer else { return };
        match pool.manager().disconnect(peer, pool.now()) {
            Ok(Quiet::Proven) | Err(MemoryError::UnknownPeer) => {
                self.peer = None;
                self.is_leaving = false;
            }
            Ok(Quiet::Unproven) | Err(_) => self.is_leaving = true,
        }
    }
}

/// Shared memory where it can work, else TCP: what both sides have.
fn choose(pool: &KvPool, to: &v1::KvPeer) -> Option<&'static str> {
    let is_here = to.host == pool.announcement().host;
    let mut transports = pool.manager().transports().iter().map(|one| one.name());
    transports.find(|name| to.metadata.contains_key(*name) && (*name != "shm" || is_here))
}
