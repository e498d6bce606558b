//! A slab: memory that is mapped once, touched once and registered once, and holds many blocks.
//!
//! In host memory it is the mapping of a memory file, see [`host`]; huge pages are used where there are some, because
//! registering costs per page. On a device it is what the driver gives, see [`crate::cuda`].

#![expect(
    unsafe_code,
    reason = "copies in and out of what other processes write"
)]

mod host;
mod numa;

use std::{fmt, num::NonZeroUsize, os::fd::BorrowedFd, ptr};

use self::host::HostMemory;
use crate::{
    cuda::{self, DeviceMemory},
    error::MemoryError,
    tier::Tier,
    transport::SlabId,
};

/// Slabs start at a multiple of this and are a multiple of it long: one huge page on x86-64 and aarch64.
pub const SLAB_ALIGN: u64 = 2 << 20;
/// The most that one registration should hold: some cards lose throughput above it.
pub const SLAB_BYTES_MAX: u64 = 4 << 30;
/// The most that a slab may hold where no card registers it.
pub const SLAB_BYTES_UNREGISTERED_MAX: u64 = 1 << 40;

/// How a slab is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabConfig {
    /// Where the memory lies. Of the settings below, a device's memory knows none.
    pub tier: Tier,
    /// Size in bytes: a positive multiple of 2 MiB, at most 1 TiB. Transports may want less.
    pub len: u64,
    /// Whether to try huge pages; small ones are the fallback, never an error.
    pub huge_pages: bool,
    /// Whether the memory is touched at once. Else each page comes when it is first used, and no reserved huge pages
    /// are tried: a network card that registers the slab touches all of it anyway.
    pub prefault: bool,
    /// Threads that touch the memory first; 1 touches it on the caller's.
    pub prefault_threads: NonZeroUsize,
    /// The NUMA node that host memory comes from; the kernel's choice where `None`.
    pub numa_node: Option<u32>,
}

impl Default for SlabConfig {
    fn default() -> Self {
        Self {
            tier: Tier::Dram,
            len: 2 << 30,
            huge_pages: true,
            prefault: true,
            prefault_threads: NonZeroUsize::MIN.saturating_add(3),
            numa_node: None,
        }
    }
}

/// What a slab's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Reserved huge pages.
    Huge,
    /// Small pages that the kernel was asked to join.
    Transparent,
    /// Small pages.
    Small,
}

enum Memory {
    Host(HostMemory),
    Device(DeviceMemory),
}

/// Memory that transports register, given back when the last of its holders drops it.
///
/// Its bytes are shared with other processes, so nobody gets a Rust reference to them: they are copied in and out.
pub struct Slab {
    id: SlabId,
    tier: Tier,
    len: u64,
    memory: Memory,
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab")
            .field("id", &self.id)
            .field("tier", &self.tier)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Slab {
    /// Maps and touches a slab, or takes it from a device. All of it is zero.
    pub fn create(id: SlabId, config: &SlabConfig) -> Result<Self, MemoryError> {
        let refuse = |field, expected| Err(MemoryError::InvalidField { field, expected });
        let is_whole = config.len > 0 && config.len.is_multiple_of(SLAB_ALIGN);
        if !is_whole || config.len > SLAB_BYTES_UNREGISTERED_MAX {
            return refuse("slab_bytes", "a positive multiple of 2 MiB, at most 1 TiB");
        }
        let (tier, len) = (config.tier, config.len);
        let memory = match tier {
            Tier::Dram | Tier::Pinned => Memory::Host(HostMemory::create(config)?),
            Tier::Vram { .. } if config.numa_node.is_some() => {
                return refuse("numa_node", "absent where the memory is a device's");
            }
            Tier::Vram { .. } => Memory::Device(cuda::allocate(cuda::open(tier)?, len)?),
        };
        Ok(Self {
            id,
            tier,
            len,
            memory,
        })
    }

    /// The slab's name.
    pub const fn id(&self) -> SlabId {
        self.id
    }

    /// Where it lies.
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// Size in bytes.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds no byte; never true of a slab that was created.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What its pages are; `None` on a device.
    pub const fn pages(&self) -> Option<PageKind> {
        match &self.memory {
            Memory::Host(memory) => Some(memory.pages()),
            Memory::Device(_) => None,
        }
    }

    /// First byte, for a transport to register. Reading or writing through it needs the care that the block table
    /// takes, and a tier that [`is_host`](Tier::is_host): on a device it is the address that the device has for it.
    pub fn as_ptr(&self) -> *mut u8 {
        match &self.memory {
            Memory::Host(memory) => memory.as_ptr(),
            Memory::Device(memory) => ptr::without_provenance_mut(memory.address() as usize),
        }
    }

    /// The memory file, for a peer on the same host to map; a device's memory has none.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.memory {
            Memory::Host(memory) => Some(memory.file()),
            Memory::Device(_) => None,
        }
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        self.check(offset, len)?;
        match &self.memory {
            // SAFETY: `len` mapped bytes follow `offset`, and a borrowed slice of Rust's never lies in a slab.
            Memory::Host(memory) => unsafe {
                let at = memory.as_ptr().add(offset as usize);
                ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
                Ok(())
            },
            // SAFETY: `len` bytes of the device follow `offset`.
            Memory::Device(memory) => unsafe { memory.write(offset, bytes.as_ptr(), len) },
        }
    }

    /// Copies from `offset` until `bytes` is full.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        self.check(offset, len)?;
        match &self.memory {
            // SAFETY: `len` mapped bytes follow `offset`, and a borrowed slice of Rust's never lies in a slab.
            Memory::Host(memory) => unsafe {
                let at = memory.as_ptr().add(offset as usize);
                ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len());
                Ok(())
            },
            // SAFETY: `len` bytes of the device follow `offset`.
            Memory::Device(memory) => unsafe { memory.read(offset, bytes.as_mut_ptr(), len) },
        }
    }

    /// Copies `len` bytes at `offset` to `to_offset` of `to`, which may be this slab and of another tier. In host
    /// memory the ranges may overlap; two slabs on devices must be on the same one.
    pub fn copy_to(
        &self,
        offset: u64,
        to: &Self,
        to_offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        self.check(offset, len)?;
        to.check(to_offset, len)?;
        match (&self.memory, &to.memory) {
            // SAFETY: `len` mapped bytes follow both offsets; `copy` allows overlap.
            (Memory::Host(from), Memory::Host(to)) => unsafe {
                let from = from.as_ptr().add(offset as usize);
                ptr::copy(from, to.as_ptr().add(to_offset as usize), len as usize);
                Ok(())
            },
            // SAFETY: `len` bytes follow both offsets, the first mapped and the second on the device.
            (Memory::Host(from), Memory::Device(to)) => unsafe {
                to.write(to_offset, from.as_ptr().add(offset as usize), len)
            },
            // SAFETY: `len` bytes follow both offsets, the first on the device and the second mapped.
            (Memory::Device(from), Memory::Host(to)) => unsafe {
                from.read(offset, to.as_ptr().add(to_offset as usize), len)
            },
            (Memory::Device(from), Memory::Device(onto)) => {
                let (start, to_start) = (from.address() + offset, onto.address() + to_offset);
                if !from.is_beside(onto) || start.abs_diff(to_start) < len {
                    return Err(MemoryError::InvalidField {
                        field: "to",
                        expected: "on the same device, and apart from what is copied",
                    });
                }
                // SAFETY: `len` bytes follow both offsets, on one device; that they are apart was just checked.
                unsafe { from.copy_to(offset, onto, to_offset, len) }
            }
        }
    }

    /// Refuses what is not `len` bytes inside the slab.
    const fn check(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(MemoryError::OutOfBounds {
                offset,
                len,
                limit: self.len,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(len: u64) -> SlabConfig {
        SlabConfig {
            len,
            ..SlabConfig::default()
        }
    }

    #[test]
    fn bytes_come_back_and_a_mapping_of_the_file_sees_them() {
        let slab = Slab::create(SlabId(3), &small(4 << 20)).unwrap();
        assert_eq!(slab.as_ptr().addr() as u64 % SLAB_ALIGN, 0);
        slab.write(slab.len() - 5, b"hello").unwrap();
        slab.copy_to(slab.len() - 5, &slab, 1, 5).unwrap();
        let mut back = [0; 5];
        slab.read(1, &mut back).unwrap();
        assert_eq!(&back, b"hello");
        let mut through_file = [0; 5];
        rustix::io::pread(slab.file().unwrap(), &mut through_file, 1).unwrap();
        assert_eq!(&through_file, b"hello");
    }

    #[test]
    fn a_range_outside_is_refused() {
        let slab = Slab::create(SlabId(0), &small(2 << 20)).unwrap();
        let limit = 2 << 20;
        for (offset, len) in [(limit, 1), (limit - 1, 2), (u64::MAX, 1)] {
            let bytes = vec![0; len as usize];
            let outside = MemoryError::OutOfBounds { offset, len, limit };
            assert_eq!(slab.write(offset, &bytes), Err(outside));
        }
        assert_eq!(slab.write(limit, &[]), Ok(()));
    }

    #[test]
    fn a_size_that_no_registration_should_have_is_refused() {
        for len in [
            0,
            1,
            (2 << 20) + 4096,
            SLAB_BYTES_UNREGISTERED_MAX + SLAB_ALIGN,
        ] {
            let refused = Slab::create(SlabId(0), &small(len));
            assert!(matches!(refused, Err(MemoryError::InvalidField { .. })));
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_refused_and_one_that_is_gives_the_pages() {
        let on = |node| SlabConfig {
            numa_node: Some(node),
            ..small(2 << 20)
        };
        for node in [900, 5000] {
            let refused = Slab::create(SlabId(0), &on(node)).map(drop);
            let field = "numa_node";
            assert!(
                matches!(refused, Err(MemoryError::InvalidField { field: named, .. }) if named == field)
            );
        }
        if std::fs::exists("/sys/devices/system/node/node0").unwrap() {
            let slab = Slab::create(SlabId(0), &on(0)).unwrap();
            let start = format!("{:x} ", slab.as_ptr().addr());
            let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
            let line = maps.lines().find(|line| line.starts_with(&start));
            assert!(line.is_none_or(|line| line.contains("bind:0")), "{line:?}");
        }
    }

    #[test]
    fn slabs_that_are_made_and_dropped_beside_each_other_keep_their_memory() {
        let make_and_drop = |id: u32| {
            for round in 0..200 {
                let slab = Slab::create(SlabId(id), &small(2 << 20)).unwrap();
                let text = [id as u8, round as u8];
                slab.write(1 << 20, &text).unwrap();
                let mut back = [0; 2];
                slab.read(1 << 20, &mut back).unwrap();
                assert_eq!(back, text);
            }
        };
        std::thread::scope(|scope| {
            for id in 0..4 {
                scope.spawn(move || make_and_drop(id));
            }
        });
    }

    #[test]
    fn the_size_of_the_file_is_sealed() {
        let slab = Slab::create(SlabId(0), &small(2 << 20)).unwrap();
        let resized = rustix::fs::ftruncate(slab.file().unwrap(), 0);
        assert_eq!(resized, Err(rustix::io::Errno::PERM));
    }
}
