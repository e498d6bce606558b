//! What peers may do here.

use std::sync::Arc;

use orchestra_core::Time;

use super::{BufferManager, Link};
use crate::{
    error::MemoryError,
    lease::{GrantId, Lease, RemoteBlock, RemoteGrant},
    pool::{BlockHandle, Holds, Pool},
    transport::PeerId,
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
}
