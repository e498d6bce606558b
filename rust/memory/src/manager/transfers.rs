//! What this process asks of peers: transfers between what they have granted and memory here.

use std::{ops::Range, sync::Arc};

use orchestra_core::Time;

use super::{BufferManager, Link, arrivals};
use crate::{
    error::{MemoryError, TransferError},
    lease::{RemoteBlock, RemoteGrant, Rights},
    pool::{BlockHandle, HoldKind, Holds, Pool},
    registrations::RegistrationGuard,
    transfer::{LocalHold, NewTransfer, Shared, Side, Transfer, TransferOptions, plan},
    transport::{Direction, Segment},
};

/// The side of a transfer that is in this process.
enum Local<'a> {
    Blocks(&'a Arc<Pool>, &'a [BlockHandle]),
    /// Blocks of somebody else's memory, by their numbers.
    Foreign(&'a RegistrationGuard, Range<usize>),
}

impl Local<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Blocks(_, handles) => handles.len(),
            Self::Foreign(_, blocks) => blocks.len(),
        }
    }

    /// Keeps the memory as it is, for a transfer in this direction.
    fn hold(&self, direction: Direction) -> Result<LocalHold, MemoryError> {
        let kind = match direction {
            Direction::Put => HoldKind::Read,
            Direction::Get => HoldKind::Write,
        };
        Ok(match self {
            Self::Blocks(pool, handles) => LocalHold::Blocks(Holds::take(pool, kind, handles)?),
            Self::Foreign(guard, blocks) => LocalHold::Foreign(guard.hold(blocks.len())?),
        })
    }

    /// Where its blocks lie.
    fn sides(&self, block_bytes: u64) -> Result<Vec<Side>, MemoryError> {
        match self {
            Self::Blocks(pool, handles) => {
                let side = |handle: &BlockHandle| {
                    let (slab, offset) = pool.place(handle.slot).ok_or(MemoryError::StaleHandle)?;
                    let slab = slab.id();
                    Ok(Side { slab, offset })
                };
                handles.iter().map(side).collect()
            }
            Self::Foreign(guard, blocks) => {
                let (slab, first) = guard.place();
                let side = |at: usize| Side {
                    slab,
                    offset: first + at as u64 * block_bytes,
                };
                Ok(blocks.clone().map(side).collect())
            }
        }
    }
}

impl BufferManager {
    /// Writes sealed blocks into blocks that a peer has granted.
    pub fn put(
        &self,
        pool: &Arc<Pool>,
        from: &[BlockHandle],
        to: &RemoteGrant,
        options: &TransferOptions,
        now: Time,
    ) -> Result<Transfer, MemoryError> {
        let from = Local::Blocks(pool, from);
        self.start(&from, to, options, (Direction::Put, now))
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
        let into = Local::Blocks(pool, into);
        self.start(&into, from, options, (Direction::Get, now))
    }

    /// Writes blocks of somebody else's memory, by their numbers, into blocks that a peer has granted.
    pub fn put_from(
        &self,
        from: &RegistrationGuard,
        blocks: Range<usize>,
        to: &RemoteGrant,
        options: &TransferOptions,
        now: Time,
    ) -> Result<Transfer, MemoryError> {
        self.check_foreign(from, &blocks, to)?;
        let from = Local::Foreign(from, blocks);
        self.start(&from, to, options, (Direction::Put, now))
    }

    /// Reads blocks that a peer has granted into somebody else's memory, which nobody keeps others from reading or
    /// writing meanwhile. Whether its bytes are those of the peer is known when the transfer has succeeded.
    pub fn get_into(
        &self,
        from: &RemoteGrant,
        into: &RegistrationGuard,
        blocks: Range<usize>,
        options: &TransferOptions,
        now: Time,
    ) -> Result<Transfer, MemoryError> {
        self.check_foreign(into, &blocks, from)?;
        if !into.is_writable() {
            let (field, expected) = ("memory", "writable, to read a peer's bytes into");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let into = Local::Foreign(into, blocks);
        self.start(&into, from, options, (Direction::Get, now))
    }

    fn check_foreign(
        &self,
        guard: &RegistrationGuard,
        blocks: &Range<usize>,
        grant: &RemoteGrant,
    ) -> Result<(), MemoryError> {
        if !guard.is_of(&self.registrations) {
            return Err(MemoryError::ForeignHandle);
        }
        let (len, block_bytes) = (guard.region().len, grant.block_bytes.max(1));
        if !len.is_multiple_of(block_bytes) {
            let (field, expected) = ("memory", "whole blocks of the grant, one after the other");
            return Err(MemoryError::InvalidField { field, expected });
        }
        let limit = len / block_bytes;
        if blocks.start > blocks.end || blocks.end as u64 > limit {
            return Err(MemoryError::OutOfBounds {
                offset: blocks.start as u64,
                len: blocks.end.saturating_sub(blocks.start) as u64,
                limit,
            });
        }
        Ok(())
    }

    fn start(
        &self,
        local: &Local<'_>,
        grant: &RemoteGrant,
        options: &TransferOptions,
        (direction, now): (Direction, Time),
    ) -> Result<Transfer, MemoryError> {
        self.check_options(local, grant, options)?;
        let rights = match direction {
            Direction::Put => Rights::Write,
            Direction::Get => Rights::Read,
        };
        if grant.rights != rights || now >= grant.expires {
            return Err(MemoryError::GrantEnded);
        }
        let end = options.first.checked_add(local.len());
        let blocks = end.and_then(|end| grant.blocks.get(options.first..end));
        let blocks =
            blocks
                .filter(|blocks| !blocks.is_empty())
                .ok_or(MemoryError::OutOfBounds {
                    offset: options.first as u64,
                    len: local.len() as u64,
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
        let holds = local.hold(direction)?;
        let segments = segments(local, grant.block_bytes, blocks, options)?;
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
        local: &Local<'_>,
        grant: &RemoteGrant,
        options: &TransferOptions,
    ) -> Result<(), MemoryError> {
        let refuse = |field, expected| Err(MemoryError::InvalidField { field, expected });
        let block_bytes = grant.block_bytes;
        if let Local::Blocks(pool, _) = local
            && pool.config().block_bytes != block_bytes
        {
            return refuse("block_bytes", "the same at both ends");
        }
        let is_inside = |part: &Range<u64>| part.start < part.end && part.end <= block_bytes;
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
    local: &Local<'_>,
    block_bytes: u64,
    blocks: &[RemoteBlock],
    options: &TransferOptions,
) -> Result<Vec<Segment>, MemoryError> {
    let whole = 0..block_bytes;
    let part = options.part.as_ref().unwrap_or(&whole);
    let local = local.sides(block_bytes)?;
    let remote = blocks.iter().map(|block| Side {
        slab: block.slab,
        offset: block.offset,
    });
    plan(local.into_iter().zip(remote), part).map_err(|refused| match refused {
        TransferError::OutOfBounds => MemoryError::BadMetadata("a block lies outside all memory"),
        _ => MemoryError::StaleHandle,
    })
}
