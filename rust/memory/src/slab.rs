//! A slab: memory that is mapped once, touched once and registered once, and holds many blocks.
//!
//! It is the mapping of a memory file, so that a peer on the same host can be handed the descriptor. The file's
//! size is sealed: a peer cannot shrink it under us. Huge pages are used where there are some, because
//! registering costs per page.

#![expect(
    unsafe_code,
    reason = "maps memory and copies in and out of what other processes write"
)]

mod numa;

use std::{
    ffi::c_void,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    thread,
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
};

use crate::{error::MemoryError, transport::SlabId};

/// Slabs start at a multiple of this and are a multiple of it long: one huge page on x86-64 and aarch64.
pub const SLAB_ALIGN: u64 = 2 << 20;
/// The most that one registration should hold: some cards lose throughput above it.
pub const SLAB_BYTES_MAX: u64 = 4 << 30;
/// The most that a slab may hold where no card registers it.
pub const SLAB_BYTES_UNREGISTERED_MAX: u64 = 1 << 40;
/// What a prefaulting thread touches at a time.
const PREFAULT_CHUNK: usize = 64 << 20;
/// The smallest page that is touched where the kernel does not populate for us.
const SMALL_PAGE: usize = 4096;

/// How a slab is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabConfig {
    /// Size in bytes: a positive multiple of 2 MiB, at most 1 TiB. Transports may want less.
    pub len: u64,
    /// Whether to try huge pages; small ones are the fallback, never an error.
    pub huge_pages: bool,
    /// Whether the memory is touched at once. Else each page comes when it is first used, and no reserved huge pages
    /// are tried: a network card that registers the slab touches all of it anyway.
    pub prefault: bool,
    /// Threads that touch the memory first; 1 touches it on the caller's.
    pub prefault_threads: NonZeroUsize,
    /// The NUMA node that the memory comes from; the kernel's choice where `None`.
    pub numa_node: Option<u32>,
}

impl Default for SlabConfig {
    fn default() -> Self {
        Self {
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

/// Memory that transports register, unmapped when the last of its holders drops it.
///
/// Its bytes are shared with other processes, so nobody gets a Rust reference to them: they are copied in and out.
#[derive(Debug)]
pub struct Slab {
    id: SlabId,
    base: NonNull<u8>,
    len: usize,
    pages: PageKind,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to the `Slab` until it is dropped and has no tie to a thread. Bytes are reached
// through raw pointers only; who may write which block, and when, is decided by the block table.
unsafe impl Send for Slab {}
// SAFETY: as above; all methods that copy take the same care from any thread.
unsafe impl Sync for Slab {}

impl Slab {
    /// Maps and touches a slab.
    pub fn create(id: SlabId, config: &SlabConfig) -> Result<Self, MemoryError> {
        let is_whole = config.len > 0 && config.len.is_multiple_of(SLAB_ALIGN);
        if !is_whole || config.len > SLAB_BYTES_UNREGISTERED_MAX {
            return Err(MemoryError::InvalidField {
                field: "slab_bytes",
                expected: "a positive multiple of 2 MiB, at most 1 TiB",
            });
        }
        let len = config.len as usize;
        if config.huge_pages
            && config.prefault
            && let Ok(file) = memory_file(len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
            && let Ok(base) = map(&file, len, ptr::null_mut(), MapFlags::empty())
        {
            let slab = Self::over(id, base, len, PageKind::Huge, file);
            slab.bind(config.numa_node)?;
            // A mapping of huge pages that were never reserved faults with a signal: only `Populate` is safe here.
            if slab.populate(config.prefault_threads).is_ok() {
                return Ok(slab);
            }
        }
        let file = memory_file(len, MemfdFlags::empty())?;
        let base = map_aligned(&file, len)?;
        let mut slab = Self::over(id, base, len, PageKind::Small, file);
        slab.bind(config.numa_node)?;
        if config.huge_pages && slab.advise(0, len, Advice::LinuxHugepage).is_ok() {
            slab.pages = PageKind::Transparent;
        }
        let populated = if config.prefault {
            slab.populate(config.prefault_threads)
        } else {
            Ok(())
        };
        match populated {
            Ok(()) => {}
            // Kernels before 5.14 cannot populate on request.
            Err(rustix::io::Errno::INVAL) => slab.touch(),
            Err(errno) => return Err(MemoryError::os("touch a slab's memory", errno)),
        }
        Ok(slab)
    }

    const fn over(
        id: SlabId,
        base: NonNull<u8>,
        len: usize,
        pages: PageKind,
        file: OwnedFd,
    ) -> Self {
        Self {
            id,
            base,
            len,
            pages,
            file,
        }
    }

    /// The slab's name.
    pub const fn id(&self) -> SlabId {
        self.id
    }

    /// Size in bytes.
    pub const fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether it holds no byte; never true of a slab that was created.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What its pages are.
    pub const fn pages(&self) -> PageKind {
        self.pages
    }

    /// First byte, for a transport to register. Reading or writing through it needs the care that the block table
    /// takes.
    pub const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The memory file, for a peer on the same host to map.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let at = self.at(offset, bytes.len() as u64)?;
        // SAFETY: `at` is followed by `bytes.len()` mapped bytes, and a borrowed slice of Rust's never lies in a slab.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        Ok(())
    }

    /// Copies from `offset` until `bytes` is full.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let at = self.at(offset, bytes.len() as u64)?;
        // SAFETY: `at` is followed by `bytes.len()` mapped bytes, and a borrowed slice of Rust's never lies in a slab.
        unsafe { ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies `len` bytes at `offset` to `to_offset` of `to`, which may be this slab; the ranges may overlap.
    pub fn copy_to(
        &self,
        offset: u64,
        to: &Self,
        to_offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let from = self.at(offset, len)?;
        let to = to.at(to_offset, len)?;
        // SAFETY: both pointers are followed by `len` mapped bytes; `copy` allows overlap.
        unsafe { ptr::copy(from, to, len as usize) };
        Ok(())
    }

    /// The address of `offset` where `len` bytes from there lie inside the slab.
    fn at(&self, offset: u64, len: u64) -> Result<*mut u8, MemoryError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(MemoryError::OutOfBounds {
                offset,
                len,
                limit: self.len(),
            });
        }
        // SAFETY: `offset` is at most the mapping's length, so the pointer stays inside it or one past its end.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> rustix::io::Result<()> {
        debug_assert!(offset + len <= self.len, "advice stays inside the slab");
        // SAFETY: the range lies inside the mapping, and both advices used here keep the bytes as they are.
        unsafe { madvise(self.base.as_ptr().add(offset).cast::<c_void>(), len, advice) }
    }

    fn bind(&self, node: Option<u32>) -> Result<(), MemoryError> {
        node.map_or(Ok(()), |node| numa::bind(self.as_ptr(), self.len, node))
    }

    /// Makes the kernel back every page, in parallel: first touch costs more than registering.
    fn populate(&self, threads: NonZeroUsize) -> rustix::io::Result<()> {
        let offsets: Vec<usize> = (0..self.len).step_by(PREFAULT_CHUNK).collect();
        let share = offsets.len().div_ceil(threads.get()).max(1);
        let populate = |offsets: &[usize]| {
            offsets.iter().try_for_each(|&offset| {
                let len = PREFAULT_CHUNK.min(self.len - offset);
                self.advise(offset, len, Advice::LinuxPopulateWrite)
            })
        };
        if threads.get() == 1 || offsets.len() == 1 {
            return populate(&offsets);
        }
        thread::scope(|scope| {
            let parts: Vec<_> = offsets
                .chunks(share)
                .map(|part| scope.spawn(move || populate(part)))
                .collect();
            parts
                .into_iter()
                .try_for_each(|part| part.join().unwrap_or(Err(rustix::io::Errno::NOMEM)))
        })
    }

    /// Writes a byte of every page; the slab is new and all zero.
    fn touch(&self) {
        for offset in (0..self.len).step_by(SMALL_PAGE) {
            // SAFETY: `offset` lies inside the mapping, and nobody else knows of the slab yet.
            unsafe { self.base.as_ptr().add(offset).write_volatile(0) };
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever registered it holds the slab by `Arc`: none of them is left.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}

/// A memory file of `len` bytes whose size nobody can change any more.
fn memory_file(len: usize, extra: MemfdFlags) -> Result<OwnedFd, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | extra;
    let file = memfd_create("orchestra-slab", flags)
        .map_err(|errno| MemoryError::os("create a memory file", errno))?;
    ftruncate(&file, len as u64).map_err(|errno| MemoryError::os("size a memory file", errno))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|errno| MemoryError::os("seal a memory file", errno))?;
    Ok(file)
}

/// Maps the file for reading and writing, at `start` where `flags` say so.
///
/// A file of huge pages lies at a multiple of their size wherever the kernel puts it, and often cannot be mapped at
/// all. It is never mapped over a reservation: a failed `MAP_FIXED` may leave a gap in place of what was there
/// (mmap(2)), other threads map their memory in the gap, and whoever then unmaps his reservation unmaps theirs.
fn map(
    file: &OwnedFd,
    len: usize,
    start: *mut c_void,
    flags: MapFlags,
) -> Result<NonNull<u8>, MemoryError> {
    let fail = |errno| MemoryError::os("map a slab", errno);
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice, or over a reservation that the caller made.
    let base = unsafe { mmap(start, len, protection, MapFlags::SHARED | flags, file, 0) };
    NonNull::new(base.map_err(fail)?.cast()).ok_or_else(|| fail(rustix::io::Errno::NOMEM))
}

/// Maps a file of small pages at a multiple of [`SLAB_ALIGN`].
fn map_aligned(file: &OwnedFd, len: usize) -> Result<NonNull<u8>, MemoryError> {
    let fail = |errno| MemoryError::os("map a slab", errno);
    let align = SLAB_ALIGN as usize;
    let reserved_len = len + align;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of anybody.
    let reserved = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            reserved_len,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(fail)?
    .cast::<u8>();
    let head = reserved.align_offset(align);
    let start = reserved.wrapping_add(head);
    let tail = (start.wrapping_add(len), reserved_len - head - len);
    for (from, len) in [(reserved, head), tail] {
        if len > 0 {
            // SAFETY: the part of the reservation outside the slab, unknown to anybody.
            unsafe { munmap(from.cast(), len) }.map_err(fail)?;
        }
    }
    // Where this fails, the addresses are given up rather than unmapped: they may be somebody else's by then.
    map(file, len, start.cast(), MapFlags::FIXED)
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
        rustix::io::pread(slab.file(), &mut through_file, 1).unwrap();
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
        thread::scope(|scope| {
            for id in 0..4 {
                scope.spawn(move || make_and_drop(id));
            }
        });
    }

    #[test]
    fn the_size_of_the_file_is_sealed() {
        let slab = Slab::create(SlabId(0), &small(2 << 20)).unwrap();
        assert_eq!(ftruncate(slab.file(), 0), Err(rustix::io::Errno::PERM));
    }
}
