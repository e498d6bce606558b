//! Memory for weights: whole pages, large ones where the system has them.
//!
//! A decode step reads every weight once, in order. With pages of 4 KiB a tenth of its time goes into looking them up.

#![expect(unsafe_code, reason = "maps memory")]

use std::{ffi::c_void, ptr, slice};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::LinearError;

/// So many zeros, and then what is written there.
pub(crate) struct Pages<E> {
    start: *mut E,
    len: usize,
}

// SAFETY: the memory is this value's alone, and is only written through `&mut`.
unsafe impl<E: Send> Send for Pages<E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for Pages<E> {}

impl<E: Copy> Pages<E> {
    /// `len` numbers, of which all bits are 0.
    pub(crate) fn zeroed(len: usize) -> Result<Self, LinearError> {
        let bytes = len * size_of::<E>();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a mapping of its own, at no given address.
        let mapped =
            unsafe { mmap_anonymous(ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) };
        let start = mapped.map_err(|errno| LinearError::NoMemory {
            bytes,
            code: errno.raw_os_error(),
        })?;
        // SAFETY: the mapping from above. Refused, its pages are small; that is slower and nothing else.
        let _ = unsafe { madvise(start, bytes, Advice::LinuxHugepage) };
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    pub(crate) fn as_ptr(&self) -> *const E {
        self.start
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [E] {
        // SAFETY: so many are mapped and were written by the kernel as zeros, and this is the only reference.
        unsafe { slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<E> Drop for Pages<E> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, whole, and nobody has a pointer into it any more.
        let unmapped = unsafe { munmap(self.start.cast::<c_void>(), self.len * size_of::<E>()) };
        debug_assert!(unmapped.is_ok(), "the mapping was ours");
    }
}
