//! A peer's slab, mapped into this process.
//!
//! The peer and others may write to it at any time, so there is never a Rust reference to its bytes: they are
//! copied between raw pointers, and what was copied is whatever was there. What makes a copy mean something is the
//! block table above: only sealed blocks are read, and only granted ones written.

#![expect(
    unsafe_code,
    reason = "maps a peer's memory and copies in and out of it"
)]

use std::{
    marker::PhantomData,
    os::fd::OwnedFd,
    ptr::{self, NonNull},
};

use rustix::{
    fs::{SealFlags, fcntl_get_seals, fstat},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::{
    error::MemoryError,
    slab::Slab,
    transport::{Direction, ledger::fits},
};

/// The mapping of a peer's slab; unmapped when dropped.
pub(super) struct RemoteSlab {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped and has no tie to a thread; its bytes are reached
// through raw pointers only.
unsafe impl Send for RemoteSlab {}

impl RemoteSlab {
    /// Maps `len` bytes of a descriptor that a peer sent. The peer must not be able to shrink the file, or else
    /// touching it could end this process.
    pub(super) fn map(file: &OwnedFd, len: u64) -> Result<Self, MemoryError> {
        let seals =
            fcntl_get_seals(file).map_err(|errno| MemoryError::os("read a slab's seals", errno))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(MemoryError::BadMetadata("a slab whose size is not sealed"));
        }
        let size = fstat(file)
            .map_err(|errno| MemoryError::os("read a slab's size", errno))?
            .st_size;
        if u64::try_from(size) != Ok(len) {
            return Err(MemoryError::BadMetadata(
                "a slab of another size than was told",
            ));
        }
        let len = usize::try_from(len)
            .map_err(|_| MemoryError::BadMetadata("a slab larger than memory"))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Its owner has touched every page already, so filling in our page tables here keeps faults out of copies.
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of anybody.
        let base = unsafe { mmap(ptr::null_mut(), len, protection, flags, file, 0) }
            .map_err(|errno| MemoryError::os("map a peer's slab", errno))?;
        let base =
            NonNull::new(base.cast()).ok_or(MemoryError::BadMetadata("a slab at address zero"))?;
        Ok(Self { base, len })
    }

    /// This slab beside one of ours, to copy between them.
    pub(super) fn beside<'a>(&'a self, local: &'a Slab) -> Copier<'a> {
        Copier {
            theirs: self,
            ours: local.as_ptr(),
            // What the processor cannot reach has no bytes to copy.
            our_len: if local.tier().is_host() {
                local.len()
            } else {
                0
            },
            local: PhantomData,
        }
    }
}

/// A peer's slab and one of ours.
pub(super) struct Copier<'a> {
    theirs: &'a RemoteSlab,
    ours: *mut u8,
    our_len: u64,
    /// Lives as long as `ours` is used.
    local: PhantomData<&'a Slab>,
}

impl Copier<'_> {
    /// Copies `len` bytes between an offset of theirs and one of ours.
    #[inline]
    pub(super) fn copy(&self, direction: Direction, theirs: u64, ours: u64, len: u64) {
        let inside = fits(theirs, len, self.theirs.len as u64) && fits(ours, len, self.our_len);
        debug_assert!(inside, "segments are checked when they are posted");
        if !inside {
            return;
        }
        // SAFETY: both ranges were just found to lie inside mappings, which live as long as `self`. They do not overlap:
        // two mappings have different addresses, even where a process maps its own slab. Other processes may write the
        // same bytes meanwhile; nothing here depends on their values.
        unsafe {
            let theirs = self.theirs.base.as_ptr().add(theirs as usize);
            let ours = self.ours.add(ours as usize);
            let (from, to) = match direction {
                Direction::Put => (ours, theirs),
                Direction::Get => (theirs, ours),
            };
            ptr::copy_nonoverlapping(from, to, len as usize);
        }
    }
}

impl Drop for RemoteSlab {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and copies borrow `self`, so none of them runs.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn file(flags: MemfdFlags) -> OwnedFd {
        let file = memfd_create("test", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, 8192).unwrap();
        file
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let refused = RemoteSlab::map(&file(MemfdFlags::ALLOW_SEALING), 8192).map(drop);
        let shrinks = MemoryError::BadMetadata("a slab whose size is not sealed");
        assert_eq!(refused, Err(shrinks));
    }

    #[test]
    fn a_file_of_another_size_than_was_told_is_refused() {
        let file = file(MemfdFlags::ALLOW_SEALING);
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let refused = RemoteSlab::map(&file, 8193).map(drop);
        let other = MemoryError::BadMetadata("a slab of another size than was told");
        assert_eq!(refused, Err(other));
        assert!(RemoteSlab::map(&file, 8192).is_ok());
    }
}
