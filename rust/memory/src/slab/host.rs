//! Host memory of a slab: the mapping of a memory file, so that a peer on the same host can be handed the descriptor.
//! The file's size is sealed: a peer cannot shrink it under us.

#![expect(unsafe_code, reason = "maps memory")]

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

use super::{PageKind, SLAB_ALIGN, SlabConfig, numa};
use crate::{
    cuda::{self, Registration},
    error::MemoryError,
    tier::Tier,
};

/// What a prefaulting thread touches at a time.
const PREFAULT_CHUNK: usize = 64 << 20;
/// The smallest page that is touched where the kernel does not populate for us.
const SMALL_PAGE: usize = 4096;

/// A memory file and its mapping.
pub(super) struct HostMemory {
    base: NonNull<u8>,
    len: usize,
    pages: PageKind,
    file: OwnedFd,
    /// Of pinned memory.
    registration: Option<Registration>,
}

// SAFETY: the mapping belongs to this value until it is dropped and has no tie to a thread. Nothing here reads or
// writes its bytes after they were touched for the first time.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps and touches memory, and registers it with the driver where the tier is pinned.
    pub(super) fn create(config: &SlabConfig) -> Result<Self, MemoryError> {
        // Before anything is mapped: touching takes seconds.
        let context = match config.tier {
            Tier::Pinned => Some(cuda::open(config.tier)?),
            Tier::Dram | Tier::Vram { .. } => None,
        };
        let mut memory = Self::map(config)?;
        if let Some(context) = context {
            // SAFETY: the mapping is as long as is said, and `drop` unmaps it only after the driver has let go of it.
            let made = unsafe { Registration::make(context, memory.base, memory.len as u64) };
            memory.registration = Some(made?);
        }
        Ok(memory)
    }

    fn map(config: &SlabConfig) -> Result<Self, MemoryError> {
        let len = config.len as usize;
        if config.huge_pages
            && config.prefault
            && let Ok(file) = memory_file(len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
            && let Ok(base) = map(&file, len, ptr::null_mut(), MapFlags::empty())
        {
            let memory = Self::over(base, len, PageKind::Huge, file);
            memory.bind(config.numa_node)?;
            // A mapping of huge pages that were never reserved faults with a signal: only `Populate` is safe here.
            if memory.populate(config.prefault_threads).is_ok() {
                return Ok(memory);
            }
        }
        let file = memory_file(len, MemfdFlags::empty())?;
        let base = map_aligned(&file, len)?;
        let mut memory = Self::over(base, len, PageKind::Small, file);
        memory.bind(config.numa_node)?;
        if config.huge_pages && memory.advise(0, len, Advice::LinuxHugepage).is_ok() {
            memory.pages = PageKind::Transparent;
        }
        let populated = if config.prefault {
            memory.populate(config.prefault_threads)
        } else {
            Ok(())
        };
        match populated {
            Ok(()) => {}
            // Kernels before 5.14 cannot populate on request.
            Err(rustix::io::Errno::INVAL) => memory.touch(),
            Err(errno) => return Err(MemoryError::os("touch a slab's memory", errno)),
        }
        Ok(memory)
    }

    const fn over(base: NonNull<u8>, len: usize, pages: PageKind, file: OwnedFd) -> Self {
        Self {
            base,
            len,
            pages,
            file,
            registration: None,
        }
    }

    pub(super) const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(super) const fn pages(&self) -> PageKind {
        self.pages
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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
            // SAFETY: `offset` lies inside the mapping, and nobody else knows of it yet.
            unsafe { self.base.as_ptr().add(offset).write_volatile(0) };
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let registration = self.registration.take();
        if registration.is_some_and(|made| !made.take_back()) {
            // A device may still reach it: the addresses are given up rather than unmapped.
            return;
        }
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
