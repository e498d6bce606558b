//! What a process gives out so that its peers can reach its slabs, and the fields that wires are made of.
//!
//! Everything here comes from another process: every length is checked against what is left and against a limit
//! before it is believed.

use std::fmt;

use crate::{error::MemoryError, random::random_bytes, tier::Tier, transport::SlabId};

/// The most that [`Metadata::encode`] makes and [`Metadata::decode`] reads.
pub(super) const METADATA_BYTES_MAX: usize = 64 << 10;
/// The most slabs that one process can make known: at 2 GiB each, more than any host has memory.
pub(super) const SLABS_MAX: usize = 1024;

const MAGIC: [u8; 4] = *b"orcm";
const VERSION: u8 = 2;

/// A slab on the wire: name, base and length, which tier, and the number of the device.
const SLAB_BYTES: usize = 25;

/// Which life of which transport: drawn at random when it opens, so that a restart is somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity(pub(super) u64);

/// What a connection must bring: only those who were given the metadata know it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct AccessKey(pub(super) [u8; 16]);

impl AccessKey {
    /// Takes as long for a wrong key as for the right one.
    pub(super) fn matches(self, offered: &[u8]) -> bool {
        let differing = self
            .0
            .iter()
            .zip(offered)
            .fold(0, |differing, (ours, theirs)| differing | (ours ^ theirs));
        offered.len() == self.0.len() && differing == 0
    }
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Draws who this transport is and what its peers must know.
pub(super) fn draw_identity() -> Result<(Identity, AccessKey), MemoryError> {
    let bytes = random_bytes::<24>()?;
    let mut fields = Fields(&bytes);
    let drawn = fields.u64().zip(fields.array().map(AccessKey));
    drawn
        .map(|(identity, key)| (Identity(identity), key))
        .ok_or(MemoryError::BadMetadata("identity"))
}

/// A slab as its owner made it known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KnownSlab {
    pub(super) id: SlabId,
    /// Where it lies in its owner's address space; zero for transports that go by offsets.
    pub(super) base: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Where they lie, by the numbers that its owner has for devices.
    pub(super) tier: Tier,
}

impl KnownSlab {
    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.id.0.to_le_bytes());
        bytes.extend(self.base.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.push(match self.tier {
            Tier::Dram => 0,
            Tier::Pinned => 1,
            Tier::Vram { .. } => 2,
        });
        bytes.extend(self.tier.device().unwrap_or(0).to_le_bytes());
    }

    fn decode(fields: &mut Fields<'_>) -> Option<Self> {
        let id = SlabId(fields.u32()?);
        let (base, len) = (fields.u64()?, fields.u64()?);
        let tier = match (fields.u8()?, fields.u32()?) {
            (0, 0) => Tier::Dram,
            (1, 0) => Tier::Pinned,
            (2, device) => Tier::Vram { device },
            _ => return None,
        };
        Some(Self {
            id,
            base,
            len,
            tier,
        })
    }
}

/// What [`Transport::local_metadata`](super::Transport::local_metadata) holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Which transport made it; another cannot use it.
    pub(super) kind: u8,
    pub(super) identity: Identity,
    pub(super) key: AccessKey,
    /// What the transport connects to: the name of a socket, an address, or the blob of a library.
    pub(super) address: Vec<u8>,
    pub(super) slabs: Vec<KnownSlab>,
}

impl Metadata {
    pub(super) fn encode(&self) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = Vec::with_capacity(64 + self.address.len() + SLAB_BYTES * self.slabs.len());
        bytes.extend(MAGIC);
        bytes.extend([VERSION, self.kind]);
        bytes.extend(self.identity.0.to_le_bytes());
        bytes.extend(self.key.0);
        bytes.extend((self.address.len() as u32).to_le_bytes());
        bytes.extend(&self.address);
        bytes.extend((self.slabs.len() as u32).to_le_bytes());
        for slab in &self.slabs {
            slab.encode(&mut bytes);
        }
        if bytes.len() > METADATA_BYTES_MAX {
            return Err(MemoryError::LimitReached {
                what: "bytes of metadata",
                limit: METADATA_BYTES_MAX,
            });
        }
        Ok(bytes)
    }

    pub(super) fn decode(bytes: &[u8], kind: u8) -> Result<Self, MemoryError> {
        if bytes.len() > METADATA_BYTES_MAX {
            return Err(MemoryError::BadMetadata("longer than 64 KiB"));
        }
        let mut fields = Fields(bytes);
        if fields.array() != Some(MAGIC) || fields.u8() != Some(VERSION) {
            return Err(MemoryError::BadMetadata("another format or version"));
        }
        if fields.u8() != Some(kind) {
            return Err(MemoryError::BadMetadata("of another transport"));
        }
        let metadata = Self::decode_body(&mut fields, kind)
            .ok_or(MemoryError::BadMetadata("cut short, or of unknown memory"))?;
        if !fields.0.is_empty() {
            return Err(MemoryError::BadMetadata("bytes after its end"));
        }
        if metadata.slabs.iter().any(|slab| slab.len == 0) {
            return Err(MemoryError::BadMetadata("a slab without bytes"));
        }
        Ok(metadata)
    }

    fn decode_body(fields: &mut Fields<'_>, kind: u8) -> Option<Self> {
        let identity = Identity(fields.u64()?);
        let key = AccessKey(fields.array()?);
        let address_len = fields.u32()? as usize;
        let address = fields.take(address_len)?.to_vec();
        let count = fields.u32()? as usize;
        if count > SLABS_MAX {
            return None;
        }
        let slabs = (0..count).map(|_| KnownSlab::decode(fields));
        let slabs = slabs.collect::<Option<_>>()?;
        Some(Self {
            kind,
            identity,
            key,
            address,
            slabs,
        })
    }
}

/// The rest of a message, read from its front. Integers are little-endian.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example() -> Metadata {
        Metadata {
            kind: 2,
            identity: Identity(7),
            key: AccessKey([9; 16]),
            address: b"127.0.0.1:80".to_vec(),
            slabs: vec![
                KnownSlab {
                    id: SlabId(3),
                    base: 0,
                    len: 2 << 20,
                    tier: Tier::Pinned,
                },
                KnownSlab {
                    id: SlabId(4),
                    base: 7 << 40,
                    len: 2 << 20,
                    tier: Tier::Vram { device: 5 },
                },
            ],
        }
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let bytes = example().encode().unwrap();
        assert_eq!(Metadata::decode(&bytes, 2), Ok(example()));
    }

    #[test]
    fn every_cut_and_every_surplus_is_refused() {
        let bytes = example().encode().unwrap();
        for len in 0..bytes.len() {
            let refused = Metadata::decode(&bytes[..len], 2);
            assert!(matches!(refused, Err(MemoryError::BadMetadata(_))), "{len}");
        }
        let longer = [&bytes[..], &[0]].concat();
        let surplus = Err(MemoryError::BadMetadata("bytes after its end"));
        assert_eq!(Metadata::decode(&longer, 2), surplus);
    }

    #[test]
    fn a_slab_of_a_tier_that_nobody_knows_is_refused() {
        let mut bytes = example().encode().unwrap();
        let last = bytes.len() - 5;
        assert_eq!(bytes[last], 2);
        bytes[last] = 3;
        let unknown = Err(MemoryError::BadMetadata("cut short, or of unknown memory"));
        assert_eq!(Metadata::decode(&bytes, 2), unknown);
        // Host memory has no device.
        bytes[last] = 0;
        assert_eq!(Metadata::decode(&bytes, 2), unknown);
    }

    #[test]
    fn metadata_of_another_transport_is_refused() {
        let bytes = example().encode().unwrap();
        let other = Err(MemoryError::BadMetadata("of another transport"));
        assert_eq!(Metadata::decode(&bytes, 1), other);
    }

    #[test]
    fn the_access_key_never_prints() {
        assert!(!format!("{:?}", example()).contains("9, 9"));
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), known_head: bool) {
            if known_head {
                bytes.splice(0..0, [b'o', b'r', b'c', b'm', VERSION, 1]);
            }
            if let Ok(metadata) = Metadata::decode(&bytes, 1) {
                prop_assert_eq!(metadata.encode(), Ok(bytes));
            }
        }
    }
}
