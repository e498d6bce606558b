//! Memory files without a name, which the processes of one machine map together.
//!
//! Nothing of them is left behind, however the processes end. The others open such a file as `/proc/<pid>/fd/<n>` of the
//! process that made it, while that still has it open; so they have to be of the same user and see the same processes.
//! Its size is sealed: nobody can take the memory away from under another.

#![expect(
    unsafe_code,
    reason = "maps memory that other processes write, and unmaps it"
)]

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process,
    ptr::{self, NonNull},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::error::SharedMemoryError;

/// A mapping of such a file; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped and has no tie to a thread. What reaches its memory says
// for itself why several threads may.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` alone gives an address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes a file of zeros, and maps it. The file has to stay open until all have opened it.
    pub(crate) fn create(name: &str, len: usize) -> Result<(Self, OwnedFd), SharedMemoryError> {
        let os = |action| move |errno| SharedMemoryError::os(action, errno);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create(name, flags).map_err(os("make shared memory"))?;
        ftruncate(&file, len as u64).map_err(os("size shared memory"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(os("seal shared memory"))?;
        let mapping = Self::map(&file, len)?;
        Ok((mapping, file))
    }

    /// Maps what another process made, which has to have this length.
    pub(crate) fn open(address: &str, len: usize) -> Result<Self, SharedMemoryError> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(Path::new(address));
        let file: OwnedFd = opened
            .map(File::into)
            .map_err(|error| SharedMemoryError::Os {
                action: "open shared memory",
                code: error.raw_os_error().unwrap_or_default(),
            })?;
        let seals = fcntl_get_seals(&file)
            .map_err(|_| SharedMemoryError::Unusable("it is no memory file"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(SharedMemoryError::Unusable("its size is not sealed"));
        }
        let stat =
            fstat(&file).map_err(|errno| SharedMemoryError::os("look at shared memory", errno))?;
        if usize::try_from(stat.st_size) != Ok(len) {
            return Err(SharedMemoryError::Unusable("it has another size"));
        }
        Self::map(&file, len)
    }

    /// Where other processes find a file of this one.
    pub(crate) fn address(file: &OwnedFd) -> String {
        format!("/proc/{}/fd/{}", process::id(), file.as_raw_fd())
    }

    /// The first byte: the beginning of a page.
    pub(crate) const fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn map(file: &OwnedFd, len: usize) -> Result<Self, SharedMemoryError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of anybody.
        let base = unsafe { mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) }
            .map_err(|errno| SharedMemoryError::os("map shared memory", errno))?;
        let base =
            NonNull::new(base.cast()).ok_or(SharedMemoryError::Unusable("it is at address 0"))?;
        Ok(Self { base, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever uses it borrows `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 8192;

    #[test]
    fn memory_of_another_size_is_refused() {
        let (_mapping, file) = Mapping::create("test", BYTES).unwrap();
        let address = Mapping::address(&file);
        assert!(Mapping::open(&address, BYTES).is_ok());
        let refused = Mapping::open(&address, 2 * BYTES).map(drop);
        let reason = "it has another size";
        assert_eq!(refused, Err(SharedMemoryError::Unusable(reason)));
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("test", flags).unwrap();
        ftruncate(&file, BYTES as u64).unwrap();
        let refused = Mapping::open(&Mapping::address(&file), BYTES).map(drop);
        let reason = "its size is not sealed";
        assert_eq!(refused, Err(SharedMemoryError::Unusable(reason)));
    }

    #[test]
    fn what_is_no_memory_file_is_refused() {
        let refused = Mapping::open("/dev/null", BYTES).map(drop);
        let reason = "it is no memory file";
        assert_eq!(refused, Err(SharedMemoryError::Unusable(reason)));
    }
}
