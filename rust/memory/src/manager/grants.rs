//! What peers may do here, and what this process asks of peers.

use std::sync::Arc;

use orchestra_core::Time;

use super::{BufferManager, Link, arrivals};
use crate::{
    error::{MemoryError, TransferError},
    lease::{GrantId, Lease, RemoteBlock, RemoteGrant, Rights},
    pool::{BlockHandle, HoldKind, Holds, Pool},
    transfer::{NewTransfer, Shared, Side, Transfer, TransferOptions, plan},
    transport::{Direction, PeerId, Segment},
};

impl BufferManager {
    /// Lets a peer read sealed blocks, or fill blocks, for a while.
    pub fn grant(
        &self,
        pool: &Arc<Pool>,
        handles: &[BlockHandle],
        lease: Lease,
        now: Time,
    ) -> Result<RemoteGrant, MemoryError> {
        let refuse = |what, limit| Err(MemoryError::LimitReached { what, limit });
        if handles.is_empty() || handles.len() > self.config.max_blocks_per_grant {
            return refuse("blocks in a grant", self.config.max_blocks_per_grant);
        }
        let Lease {
            peer,
            rights,
            lasts,
        } = lease;
        if lasts.is_zero() || lasts > self.config.max_lease {
            let (field, expected) = ("lasts", "above 0 and at most max_lease");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let mut state = self.state.lock();
        let is_open = state
            .peers
            .get(&peer)
            .is_some_and(|peer| peer.link == Link::Open);
        if !is_open {
            return Err(MemoryError::UnknownPeer);
        }
        if state.grants.len() >= self.config.max_grants {
            return refuse("open grants", self.config.max_grants);
        }
        self.check_quarantine(&state)?;
        let holds = Holds::take(pool, rights.hold(), handles)?;
        // Leased blocks do not move: where they lie now is where the peer will find them.
        let blocks = handles.iter().map(|handle| {
            let (slab, offset) = pool.place(handle.slot)?;
            Some(RemoteBlock {
                slab: slab.id(),
                offset,
                generation: handle.generation,
            })
        });
        let blocks: Option<Vec<RemoteBlock>> = blocks.collect();
        let blocks = blocks.ok_or(MemoryError::StaleHandle)?;
        let expires = now + lasts;
        let id = state.grants.insert(lease, expires, holds, handles.to_vec());
        Ok(RemoteGrant {
            owner: self.local,
            id,
            rights,
            block_bytes: pool.config().block_bytes,
            expires,
            blocks,
        })
    }

    /// Ends a grant before its time. What the peer may have under way is not stopped by it: the blocks wait for proof.
    pub fn revoke(&self, grant: GrantId) -> Result<(), MemoryError> {
        let revoked = self.state.lock().grants.revoke(grant);
        revoked.then_some(()).ok_or(MemoryError::GrantEnded)
    }

    /// The peer says, by whatever way, that nothing of this grant is under way on its side and nothing will be.
    pub fn settle(&self, grant: GrantId, peer: PeerId) -> Result<(), MemoryError> {
        let settled = self.state.lock().grants.settle(grant, peer);
        settled.then_some(()).ok_or(MemoryError::GrantEnded)
    }

    /// Writes sealed blocks into blocks that a peer has granted.
    pub fn put(
        &self,
        pool: &Arc<Pool>,
        from: &[BlockHandle],
        to: &RemoteGrant,
        options: &TransferOptions,
        now: Time,
    ) -> Result<Transfer, MemoryError> {
        self.start(pool, from, to, options, (Direction::Put, now))
    }

    /// Reads blocks that a peer has granted into blocks that are being filled.
    pub fn get(
        &self,
        from: &RemoteGrant,
        pool: &Arc<Pool>,
        into: &[BlockHandle],
        options: &TransferOptions,
        now: Time,
    ) -> Result<Transfer, MemoryError> {
        self.start(pool, into, from, options, (Direction::Get, now))
    }

    fn start(
        &self,
        pool: &Arc<Pool>,
        handles: &[BlockHandle],
        grant: &RemoteGrant,
        options: &TransferOptions,
        (direction, now): (Direction, Time),
    ) -> Result<Transfer, MemoryError> {
        self.check_options(pool, grant, options)?;
        let (rights, hold) = match direction {
            Direction::Put => (Rights::Write, HoldKind::Read),
            Direction::Get => (Rights::Read, HoldKind::Write),
        };
        if grant.rights != rights || now >= grant.expires {
            return Err(MemoryError::GrantEnded);
        }
        let end = options.first.checked_add(handles.len());
        let blocks = end.and_then(|end| grant.blocks.get(options.first..end));
        let blocks =
            blocks
                .filter(|blocks| !blocks.is_empty())
                .ok_or(MemoryError::OutOfBounds {
                    offset: options.first as u64,
                    len: handles.len() as u64,
                    limit: grant.blocks.len() as u64,
                })?;
        let mut state = self.state.lock();
        let peer = state
            .peers
            .get(&grant.owner)
            .filter(|peer| peer.link == Link::Open);
        let transport = Arc::clone(&peer.ok_or(MemoryError::UnknownPeer)?.transport);
        if state.engine.counts().0 >= self.config.max_transfers {
            let (what, limit) = ("transfers", self.config.max_transfers);
            return Err(MemoryError::LimitReached { what, limit });
        }
        self.check_quarantine(&state)?;
        let holds = Holds::take(pool, hold, handles)?;
        let segments = segments(pool, handles, blocks, options)?;
        let id = state.next_transfer;
        state.next_transfer += 1;
        let shared = Arc::new(Shared::default());
        state.engine.start(NewTransfer {
            transport,
            peer: grant.owner,
            direction,
            segments,
            notification: arrivals::encode(grant.id, id, blocks, options),
            holds,
            started: now,
            deadline: (now + options.timeout).min(grant.expires),
            shared: Arc::clone(&shared),
        });
        Ok(Transfer { shared })
    }

    fn check_options(
        &self,
        pool: &Pool,
        grant: &RemoteGrant,
        options: &TransferOptions,
    ) -> Result<(), MemoryError> {
        let refuse = |field, expected| Err(MemoryError::InvalidField { field, expected });
        let block_bytes = pool.config().block_bytes;
        if grant.block_bytes != block_bytes {
            return refuse("block_bytes", "the same at both ends");
        }
        let is_inside =
            |part: &std::ops::Range<u64>| part.start < part.end && part.end <= block_bytes;
        if options.part.as_ref().is_some_and(|part| !is_inside(part)) {
            return refuse("part", "a range of at least one byte inside a block");
        }
        if options.payload.len() > self.config.max_payload_bytes {
            return refuse("payload", "at most max_payload_bytes long");
        }
        if options.timeout.is_zero() {
            return refuse("timeout", "above 0");
        }
        Ok(())
    }
}

fn segments(
    pool: &Pool,
    handles: &[BlockHandle],
    blocks: &[RemoteBlock],
    options: &TransferOptions,
) -> Result<Vec<Segment>, MemoryError> {
    let whole = 0..pool.config().block_bytes;
    let part = options.part.as_ref().unwrap_or(&whole);
    let mut local = Vec::with_capacity(handles.len());
    for handle in handles {
        let (slab, offset) = pool.place(handle.slot).ok_or(MemoryError::StaleHandle)?;
        local.push(Side {
            slab: slab.id(),
            offset,
        });
    }
    let remote = blocks.iter().map(|block| Side {
        slab: block.slab,
        offset: block.offset,
    });
    plan(local.into_iter().zip(remote), part).map_err(|refused| match refused {
        TransferError::OutOfBounds => MemoryError::BadMetadata("a block lies outside all memory"),
        _ => MemoryError::StaleHandle,
    })
}
