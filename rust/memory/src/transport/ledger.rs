//! The books that every transport keeps: which slabs are known on both sides, who the peers are, which transfers
//! run, and which notifications wait. Plain data without IO; each transport holds one behind its lock.

use std::{collections::VecDeque, sync::Arc};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    metadata::{Identity, KnownSlab, SLABS_MAX},
    spans::{Span, Spans},
};
use crate::{
    error::{MemoryError, TransferError},
    slab::Slab,
    transport::{Notification, PeerId, Progress, Segment, SlabId, TransferId},
};

/// The most peers that a transport is connected to, and the most that are connected to it.
pub(super) const PEERS_MAX: usize = 1024;
/// The most transfers that were posted and not released.
pub(super) const TRANSFERS_MAX: usize = 4096;
/// The most segments of one transfer.
pub(super) const SEGMENTS_MAX: usize = 16 << 10;
/// The longest notification, in bytes.
pub(super) const NOTIFICATION_BYTES_MAX: usize = 8 << 10;
/// Notifications that wait to be taken; senders wait when there are more.
const READY_MAX: usize = 1024;
/// Notifications kept of a process that connected to us before we connected to it.
const HELD_MAX: usize = 64;
/// Peers that were sent away and may not come back on old metadata; the oldest are forgotten.
const REVOKED_MAX: usize = 4096;

/// The slabs of this process.
#[derive(Default)]
pub(super) struct LocalSlabs(FxHashMap<SlabId, Arc<Slab>>);

impl LocalSlabs {
    pub(super) fn insert(&mut self, slab: &Arc<Slab>) -> Result<(), MemoryError> {
        if self.0.len() >= SLABS_MAX {
            return Err(MemoryError::LimitReached {
                what: "slabs",
                limit: SLABS_MAX,
            });
        }
        if self.0.contains_key(&slab.id()) {
            return Err(MemoryError::InvalidField {
                field: "slab",
                expected: "registered once only",
            });
        }
        self.0.insert(slab.id(), Arc::clone(slab));
        Ok(())
    }

    pub(super) fn remove(&mut self, slab: SlabId) -> Result<Arc<Slab>, MemoryError> {
        self.0.remove(&slab).ok_or(MemoryError::UnknownSlab(slab.0))
    }

    /// A slab for a peer, who gets none that somebody else has made.
    pub(super) fn shown(&self, slab: SlabId) -> Option<&Arc<Slab>> {
        self.0.get(&slab).filter(|slab| !slab.is_foreign())
    }

    /// For the metadata, in the order of their names.
    pub(super) fn known(&self, base: impl Fn(&Slab) -> u64) -> Vec<KnownSlab> {
        let mut known: Vec<_> = self
            .0
            .values()
            .filter(|slab| !slab.is_foreign())
            .map(|slab| KnownSlab {
                id: slab.id(),
                base: base(slab),
                len: slab.len(),
                tier: slab.tier(),
            })
            .collect();
        known.sort_unstable_by_key(|slab| slab.id);
        known
    }

    /// Looks all segments up, or refuses them all.
    pub(super) fn resolve(
        &self,
        segments: &[Segment],
        remote: &RemoteSlabs,
    ) -> Result<Spans, TransferError> {
        if segments.len() > SEGMENTS_MAX {
            return Err(refused(format!(
                "{} segments, at most {SEGMENTS_MAX} in one transfer",
                segments.len()
            )));
        }
        let mut spans = Spans::with_capacity(segments.len());
        let names = |segment: &Segment| (segment.local_slab, segment.remote_slab);
        for same in segments.chunk_by(|one, next| names(one) == names(next)) {
            let (local, known) = names(&same[0]);
            let local = self.0.get(&local).ok_or(TransferError::OutOfBounds)?;
            let known = remote.0.get(&known).ok_or(TransferError::OutOfBounds)?;
            let (local_len, remote_len) = (local.len(), known.len);
            let is_inside = |segment: &Segment| {
                fits(segment.local_offset, segment.len, local_len)
                    && fits(segment.remote_offset, segment.len, remote_len)
            };
            if !same.iter().all(is_inside) {
                return Err(TransferError::OutOfBounds);
            }
            let span = |segment: &Segment| Span {
                local_offset: segment.local_offset,
                remote_offset: segment.remote_offset,
                len: segment.len,
            };
            spans.push(local, known, same.iter().map(span));
        }
        Ok(spans)
    }
}

/// Whether `len` bytes at `offset` are at least one byte and end inside `limit`.
pub(super) fn fits(offset: u64, len: u64, limit: u64) -> bool {
    len > 0 && offset.checked_add(len).is_some_and(|end| end <= limit)
}

/// A refusal in words of ours, before anything moved.
pub(super) const fn refused(message: String) -> TransferError {
    TransferError::Transport { code: 0, message }
}

/// A notification may be empty, but not longer than the limit.
pub(super) fn check_notification(notification: Option<&[u8]>) -> Result<(), TransferError> {
    match notification {
        Some(payload) if payload.len() > NOTIFICATION_BYTES_MAX => Err(refused(format!(
            "a notification of {} bytes, at most {NOTIFICATION_BYTES_MAX}",
            payload.len()
        ))),
        _ => Ok(()),
    }
}

/// The slabs that a peer made known.
#[derive(Default)]
pub(super) struct RemoteSlabs(FxHashMap<SlabId, KnownSlab>);

impl RemoteSlabs {
    pub(super) fn new(slabs: &[KnownSlab]) -> Self {
        Self(slabs.iter().map(|slab| (slab.id, *slab)).collect())
    }

    pub(super) fn len_of(&self, slab: SlabId) -> Option<u64> {
        self.0.get(&slab).map(|known| known.len)
    }
}

/// Who is who.
#[derive(Default)]
pub(super) struct Roster {
    by_identity: FxHashMap<Identity, PeerId>,
    by_peer: FxHashMap<PeerId, Identity>,
    /// Sent away while it could still reach our memory: until it is known to be gone.
    leaving: FxHashMap<PeerId, Identity>,
    revoked: FxHashSet<Identity>,
    revoked_order: VecDeque<Identity>,
}

impl Roster {
    pub(super) fn join(&mut self, peer: PeerId, identity: Identity) -> Result<(), MemoryError> {
        if self.by_peer.contains_key(&peer) || self.leaving.contains_key(&peer) {
            return Err(MemoryError::DuplicatePeer);
        }
        if self.by_identity.contains_key(&identity) {
            return Err(MemoryError::InUse);
        }
        if self.by_peer.len() >= PEERS_MAX {
            return Err(MemoryError::LimitReached {
                what: "peers",
                limit: PEERS_MAX,
            });
        }
        if self.revoked.remove(&identity) {
            self.revoked_order.retain(|revoked| *revoked != identity);
        }
        self.by_identity.insert(identity, peer);
        self.by_peer.insert(peer, identity);
        Ok(())
    }

    /// Undoes a [`join`](Self::join) whose connection could not be made.
    pub(super) fn unjoin(&mut self, peer: PeerId) {
        if let Some(identity) = self.by_peer.remove(&peer) {
            self.by_identity.remove(&identity);
        }
    }

    /// Takes a peer out and bars its old metadata; asked again, says who it was while it is still leaving.
    pub(super) fn part(&mut self, peer: PeerId) -> Result<Identity, MemoryError> {
        if let Some(identity) = self.leaving.get(&peer) {
            return Ok(*identity);
        }
        let identity = self.by_peer.remove(&peer).ok_or(MemoryError::UnknownPeer)?;
        self.by_identity.remove(&identity);
        self.leaving.insert(peer, identity);
        if self.revoked.insert(identity) {
            self.revoked_order.push_back(identity);
        }
        if self.revoked_order.len() > REVOKED_MAX
            && let Some(oldest) = self.revoked_order.pop_front()
        {
            self.revoked.remove(&oldest);
        }
        Ok(identity)
    }

    pub(super) fn is_leaving(&self, peer: PeerId) -> bool {
        self.leaving.contains_key(&peer)
    }

    /// A leaving peer is known to be gone.
    pub(super) fn left(&mut self, peer: PeerId) {
        self.leaving.remove(&peer);
    }

    pub(super) fn peer_of(&self, identity: Identity) -> Option<PeerId> {
        self.by_identity.get(&identity).copied()
    }

    pub(super) fn is_revoked(&self, identity: Identity) -> bool {
        self.revoked.contains(&identity)
    }
}

/// Transfers that were posted and not yet released.
#[derive(Default)]
pub(super) struct Transfers {
    posted: u64,
    live: FxHashMap<TransferId, Progress>,
}

impl Transfers {
    pub(super) fn begin(&mut self) -> Result<TransferId, TransferError> {
        if self.live.len() >= TRANSFERS_MAX {
            return Err(refused(format!(
                "{TRANSFERS_MAX} transfers were not released yet, which is the limit"
            )));
        }
        self.posted += 1;
        let id = TransferId(self.posted);
        self.live.insert(id, Progress::Pending);
        Ok(id)
    }

    /// The first outcome stays.
    pub(super) fn end(&mut self, id: TransferId, outcome: Progress) {
        if let Some(progress) = self.live.get_mut(&id)
            && *progress == Progress::Pending
        {
            *progress = outcome;
        }
    }

    pub(super) fn poll(&self, id: TransferId) -> Progress {
        self.live.get(&id).cloned().unwrap_or_else(|| {
            Progress::Failed(refused("no such transfer, or it was released".to_owned()))
        })
    }

    pub(super) fn release(&mut self, id: TransferId) -> Option<Progress> {
        self.live.remove(&id)
    }
}

/// Notifications that arrived.
#[derive(Default)]
pub(super) struct Inbox {
    ready: VecDeque<Notification>,
    /// From processes that we have not connected to, so that nobody has given them a name yet.
    held: FxHashMap<Identity, Vec<Vec<u8>>>,
}

impl Inbox {
    /// Whether one more of this sender can be kept.
    pub(super) fn has_room(&self, roster: &Roster, sender: Identity) -> bool {
        match roster.peer_of(sender) {
            Some(_) => self.ready.len() < READY_MAX,
            None => self.held.get(&sender).map_or(0, Vec::len) < HELD_MAX,
        }
    }

    /// Only after [`has_room`](Self::has_room) said so.
    pub(super) fn push(&mut self, roster: &Roster, sender: Identity, payload: Vec<u8>) {
        debug_assert!(self.has_room(roster, sender), "the caller asked for room");
        match roster.peer_of(sender) {
            Some(peer) => self.ready.push_back(Notification { peer, payload }),
            None => self.held.entry(sender).or_default().push(payload),
        }
    }

    /// Its sender has a name now.
    pub(super) fn name(&mut self, sender: Identity, peer: PeerId) {
        let held = self.held.remove(&sender).unwrap_or_default();
        let named = held
            .into_iter()
            .map(|payload| Notification { peer, payload });
        self.ready.extend(named);
    }

    /// Nothing of this sender is wanted any more.
    pub(super) fn forget(&mut self, sender: Identity, peer: Option<PeerId>) {
        self.held.remove(&sender);
        if let Some(peer) = peer {
            self.ready.retain(|notification| notification.peer != peer);
        }
    }

    pub(super) fn take(&mut self) -> Option<Notification> {
        self.ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "promises that memory stays")]

    use super::*;
    use crate::{
        registrations::{ForeignMemory, Region},
        tier::Tier,
    };

    struct Nowhere;

    // SAFETY: nobody looks at a byte of it.
    unsafe impl ForeignMemory for Nowhere {
        fn region(&self) -> Region {
            Region {
                tier: Tier::Dram,
                address: 4096,
                len: 64,
            }
        }

        fn is_writable(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_peer_is_neither_told_of_memory_of_others_nor_let_at_it() {
        let (mut slabs, id) = (LocalSlabs::default(), SlabId(7));
        slabs
            .insert(&Arc::new(Slab::over(id, Arc::new(Nowhere))))
            .unwrap();
        assert!(slabs.known(|_| 0).is_empty());
        assert!(slabs.shown(id).is_none(), "a peer may guess its name");
        let remote = KnownSlab {
            id: SlabId(1),
            base: 0,
            len: 64,
            tier: Tier::Dram,
        };
        let ours = Segment {
            local_slab: id,
            local_offset: 0,
            remote_slab: SlabId(1),
            remote_offset: 0,
            len: 64,
        };
        let spans = slabs.resolve(&[ours], &RemoteSlabs::new(&[remote]));
        assert_eq!(spans.unwrap().len(), 1, "transfers of ours may");
    }
}
