//! What peers may do with blocks of ours, and until when.
//!
//! The owner decides: a grant names the peer, the blocks with their generations, the right and the end. None of it
//! binds the fabric, which lets a write land whenever it comes. So a block that a peer may *write* is not used
//! again before the peer has said that it is done, or its connection is known to be dead: the end of the lease
//! alone only puts it in quarantine. A late *read* can harm nobody but the reader, who checks its own clock; so
//! the end of a read lease, and a little grace for that clock, are enough.

use std::time::Duration;

use orchestra_core::Time;
use rustc_hash::FxHashMap;

use crate::{
    error::MemoryError,
    pool::{BlockHandle, HoldKind, Holds},
    transport::{PeerId, SlabId},
};

/// A grant of this process; never given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId(pub u64);

/// What a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rights {
    /// Read sealed blocks.
    Read,
    /// Fill blocks that nobody else writes.
    Write,
}

impl Rights {
    /// What a lease of this right holds a block for.
    pub(crate) const fn hold(self) -> HoldKind {
        match self {
            Self::Read => HoldKind::LeaseRead,
            Self::Write => HoldKind::LeaseWrite,
        }
    }
}

/// What is granted to whom, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Who may.
    pub peer: PeerId,
    /// What.
    pub rights: Rights,
    /// How long: above 0 and at most `max_lease`.
    pub lasts: Duration,
}

/// A block of another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteBlock {
    /// Its slab, as the owner calls it.
    pub slab: SlabId,
    /// Its first byte there.
    pub offset: u64,
    /// Which life of its slot.
    pub generation: u32,
}

/// A grant as the peer holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteGrant {
    /// The process whose blocks these are, by the name under which the holder is connected to it.
    pub owner: PeerId,
    /// The owner's name for it.
    pub id: GrantId,
    /// What is allowed.
    pub rights: Rights,
    /// Bytes of each block.
    pub block_bytes: u64,
    /// When it ends, by the clock of the one who holds it.
    pub expires: Time,
    /// The blocks, in the order in which they were granted.
    pub blocks: Vec<RemoteBlock>,
}

const MAGIC: [u8; 4] = *b"OMG1";
const HEAD_BYTES: usize = 4 + 8 + 1 + 8 + 8 + 4;
const BLOCK_BYTES: usize = 4 + 8 + 4;

impl RemoteGrant {
    /// The grant for the wire. Clocks are not shared, so what travels is how long it lasts from `now`.
    pub fn encode(&self, now: Time) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.blocks.len() * BLOCK_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.id.0.to_le_bytes());
        bytes.push(u8::from(self.rights == Rights::Write));
        bytes.extend(self.block_bytes.to_le_bytes());
        bytes.extend((self.expires.since(now).as_micros() as u64).to_le_bytes());
        bytes.extend((self.blocks.len() as u32).to_le_bytes());
        for block in &self.blocks {
            bytes.extend(block.slab.0.to_le_bytes());
            bytes.extend(block.offset.to_le_bytes());
            bytes.extend(block.generation.to_le_bytes());
        }
        bytes
    }

    /// Reads a grant that `owner` gave. `asked` is when it was asked for: the owner's lease began later, so it ends
    /// later too.
    pub fn decode(
        bytes: &[u8],
        owner: PeerId,
        asked: Time,
        max_blocks: usize,
    ) -> Result<Self, MemoryError> {
        let bad = MemoryError::BadMetadata("a grant is cut short or too long");
        let mut reader = Reader(bytes);
        if reader.take::<4>() != Some(MAGIC) {
            return Err(MemoryError::BadMetadata("this is not a grant"));
        }
        let mut head = || {
            let id = GrantId(reader.u64()?);
            let rights = match reader.take::<1>()? {
                [0] => Rights::Read,
                [1] => Rights::Write,
                _ => return None,
            };
            let block_bytes = reader.u64().filter(|bytes| *bytes > 0)?;
            let lasts = Duration::from_micros(reader.u64()?);
            let num_blocks = reader.u32()? as usize;
            Some((id, rights, block_bytes, lasts, num_blocks))
        };
        let (id, rights, block_bytes, lasts, num_blocks) = head().ok_or(bad.clone())?;
        if num_blocks > max_blocks || reader.0.len() != num_blocks * BLOCK_BYTES {
            return Err(bad);
        }
        let mut block = || {
            Some(RemoteBlock {
                slab: SlabId(reader.u32()?),
                offset: reader.u64()?,
                generation: reader.u32()?,
            })
        };
        let blocks = (0..num_blocks).map(|_| block()).collect::<Option<_>>();
        Ok(Self {
            owner,
            id,
            rights,
            block_bytes,
            expires: asked + lasts,
            blocks: blocks.ok_or(bad)?,
        })
    }
}

/// Takes numbers off the front of bytes.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// One number for the generations of some blocks: both ends have to mean the same lives of them.
pub(crate) fn digest(generations: impl Iterator<Item = u32>) -> u64 {
    // Fowler, Noll and Vo's hash (FNV-1a), over words instead of bytes.
    generations.fold(0xCBF2_9CE4_8422_2325, |hash, generation| {
        (hash ^ u64::from(generation)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// A grant as its owner keeps it.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) peer: PeerId,
    pub(crate) rights: Rights,
    pub(crate) expires: Time,
    pub(crate) handles: Vec<BlockHandle>,
    holds: Holds,
    is_over: bool,
}

/// The open grants of this process.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    open: FxHashMap<GrantId, Grant>,
    next: u64,
}

impl Grants {
    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    pub(crate) fn insert(
        &mut self,
        lease: Lease,
        expires: Time,
        holds: Holds,
        handles: Vec<BlockHandle>,
    ) -> GrantId {
        let Lease { peer, rights, .. } = lease;
        let id = GrantId(self.next);
        self.next += 1;
        let grant = Grant {
            peer,
            rights,
            expires,
            handles,
            holds,
            is_over: false,
        };
        self.open.insert(id, grant);
        id
    }

    pub(crate) fn get(&self, id: GrantId) -> Option<&Grant> {
        self.open.get(&id).filter(|grant| !grant.is_over)
    }

    /// The peer said that it has finished, or the caller knows it: nothing of it is under way any more.
    pub(crate) fn settle(&mut self, id: GrantId, peer: PeerId) -> bool {
        let is_theirs = self.open.get(&id).is_some_and(|grant| grant.peer == peer);
        is_theirs && self.open.remove(&id).is_some()
    }

    /// Ends a right. What the peer may have under way is not known: its blocks wait.
    pub(crate) fn revoke(&mut self, id: GrantId) -> bool {
        let Some(grant) = self.open.get_mut(&id).filter(|grant| !grant.is_over) else {
            return false;
        };
        grant.is_over = true;
        grant.holds.quarantine();
        true
    }

    /// Ends what has reached its end. Returns the write grants that now wait for proof.
    pub(crate) fn expire(&mut self, now: Time, grace: Duration) -> Vec<GrantId> {
        self.open
            .retain(|_, grant| grant.rights == Rights::Write || now < grant.expires + grace);
        let ended = |grant: &Grant| !grant.is_over && now >= grant.expires;
        let over: Vec<GrantId> = self
            .open
            .iter()
            .filter(|(_, grant)| grant.rights == Rights::Write && ended(grant))
            .map(|(id, _)| *id)
            .collect();
        for id in &over {
            self.revoke(*id);
        }
        over
    }

    /// When the next of them ends, the grace of read leases included; none where no end is left to come.
    pub(crate) fn next_end(&self, grace: Duration) -> Option<Time> {
        let end = |grant: &Grant| match grant.rights {
            Rights::Read => Some(grant.expires + grace),
            Rights::Write => (!grant.is_over).then_some(grant.expires),
        };
        self.open.values().filter_map(end).min()
    }

    /// Nothing that this peer had under way can touch memory of ours any more.
    pub(crate) fn peer_is_quiet(&mut self, peer: PeerId) {
        self.open.retain(|_, grant| grant.peer != peer);
    }

    /// Whether this peer has a grant, or had one that nobody has proven to be over.
    pub(crate) fn has_peer(&self, peer: PeerId) -> bool {
        self.open.values().any(|grant| grant.peer == peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> RemoteGrant {
        let block = |at: u32| RemoteBlock {
            slab: SlabId(at),
            offset: u64::from(at) << 33,
            generation: u32::MAX - at,
        };
        RemoteGrant {
            owner: PeerId(7 << 32),
            id: GrantId(9),
            rights: Rights::Write,
            block_bytes: 65536,
            expires: Time(5_000_000),
            blocks: (0..3).map(block).collect(),
        }
    }

    #[test]
    fn a_grant_survives_the_wire_with_the_time_that_is_left() {
        let bytes = grant().encode(Time(1_000_000));
        let decoded = RemoteGrant::decode(&bytes, grant().owner, Time(50), 3).unwrap();
        let expires = Time(4_000_050);
        assert_eq!(decoded, RemoteGrant { expires, ..grant() });
    }

    #[test]
    fn bytes_that_are_no_grant_are_refused() {
        let refused = |bytes: &[u8], max_blocks| {
            RemoteGrant::decode(bytes, PeerId(1), Time(0), max_blocks).is_err()
        };
        let bytes = grant().encode(Time(0));
        assert!((0..bytes.len()).all(|len| refused(&bytes[..len], 3)));
        assert!(refused(&[bytes.as_slice(), &[0]].concat(), 3));
        assert!(refused(&bytes, 2), "more blocks than allowed");
        let mut no_right = bytes.clone();
        no_right[12] = 2;
        assert!(refused(&no_right, 3));
        assert!(!refused(&bytes, 3));
    }
}
