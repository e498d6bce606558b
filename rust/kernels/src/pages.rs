//! Memory for weights, in large pages where the system has them.
//!
//! A decode step reads every weight once, in order. With pages of 4 KiB a tenth of its time goes into looking them up. Only a
//! whole and aligned large page can be one, and many weights are smaller: so they lie one behind the other in mappings that
//! hold many of them.

#![expect(unsafe_code, reason = "maps memory")]

use std::{ffi::c_void, ptr, slice, sync::Arc};

use parking_lot::Mutex;
use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap},
    param::page_size,
};

use crate::error::LinearError;

/// A large page, on every processor that has them of this size or of a divisor of it.
const LARGE_PAGE: usize = 2 << 20;
/// Bytes of a mapping that several share. What is not taken yet is address space, and counts as no memory of the process.
const MAPPING_BYTES: usize = 64 << 20;
/// Weights above it have a mapping of their own.
const SHARED_BYTES_MAX: usize = MAPPING_BYTES / 4;

/// The mapping that the next weights go to.
static OPEN: Mutex<Option<Open>> = Mutex::new(None);

/// A mapping of which a part is taken.
struct Open {
    mapping: Arc<Mapping>,
    taken: usize,
    /// Whole large pages, from its beginning on.
    usable: usize,
}

/// So many zeros, and then what is written there.
pub(crate) struct Pages<E> {
    start: *mut E,
    len: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: the memory is this value's alone, and is only written through `&mut`.
unsafe impl<E: Send> Send for Pages<E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for Pages<E> {}

impl<E: Copy> Pages<E> {
    /// `len` numbers, of which all bits are 0.
    pub(crate) fn zeroed(len: usize) -> Result<Self, LinearError> {
        let (mapping, begin) = take(whole_pages(len.saturating_mul(size_of::<E>())))?;
        Ok(Self {
            start: mapping.start.wrapping_byte_add(begin).cast(),
            len,
            mapping,
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
        if Arc::strong_count(&self.mapping) == 1 {
            // It goes as a whole.
            return;
        }
        let bytes = whole_pages(self.len * size_of::<E>());
        // SAFETY: these pages are this value's, whole, and nobody has a pointer into them any more. Refused, they are given
        // back with the others of the mapping.
        let _ = unsafe { madvise(self.start.cast(), bytes, Advice::LinuxDontNeed) };
    }
}

/// So many bytes, filled up to whole pages of the system, which can be given back one by one.
fn whole_pages(bytes: usize) -> usize {
    bytes
        .checked_next_multiple_of(page_size())
        .unwrap_or(usize::MAX)
}

/// So many bytes that nobody has had, whole pages: which mapping they are of, and where they begin in it.
fn take(bytes: usize) -> Result<(Arc<Mapping>, usize), LinearError> {
    if bytes > SHARED_BYTES_MAX {
        let mapping = Mapping::reserve(bytes)?;
        mapping.make_usable(0, bytes)?;
        return Ok((Arc::new(mapping), 0));
    }
    match &mut *OPEN.lock() {
        Some(open) if open.taken + bytes <= MAPPING_BYTES => open.take(bytes),
        slot => slot.insert(Open::new()?).take(bytes),
    }
}

impl Open {
    fn new() -> Result<Self, LinearError> {
        Ok(Self {
            mapping: Arc::new(Mapping::reserve(MAPPING_BYTES)?),
            taken: 0,
            usable: 0,
        })
    }

    /// The next bytes, of which there are so many.
    fn take(&mut self, bytes: usize) -> Result<(Arc<Mapping>, usize), LinearError> {
        let (begin, end) = (self.taken, self.taken + bytes);
        if end > self.usable {
            let usable = end.next_multiple_of(LARGE_PAGE);
            self.mapping.make_usable(self.usable, usable)?;
            self.usable = usable;
        }
        self.taken = end;
        Ok((Arc::clone(&self.mapping), begin))
    }
}

/// Memory of the process, its beginning aligned for large pages.
struct Mapping {
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: an address and a length; what lies there belongs to the `Pages`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Address space alone: nothing there can be read or written yet.
    fn reserve(bytes: usize) -> Result<Self, LinearError> {
        let whole = bytes.saturating_add(LARGE_PAGE);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a mapping of its own, at no given address.
        let mapped = unsafe { mmap_anonymous(ptr::null_mut(), whole, ProtFlags::empty(), flags) };
        let mapped = mapped.map_err(|errno| no_memory(bytes, errno))?;
        //  mapped                                   mapped + whole
        //  | before | start ...           bytes | after |
        let before = mapped.addr().next_multiple_of(LARGE_PAGE) - mapped.addr();
        let start = mapped.wrapping_byte_add(before);
        unmap(mapped, before);
        unmap(start.wrapping_byte_add(bytes), LARGE_PAGE - before);
        Ok(Self { start, bytes })
    }

    /// Lets bytes `from` to `to` be read, as zeros, and written.
    fn make_usable(&self, from: usize, to: usize) -> Result<(), LinearError> {
        let (start, bytes) = (self.start.wrapping_byte_add(from), to - from);
        // SAFETY: whole pages of the mapping, which nobody has a pointer into yet.
        unsafe {
            mprotect(start, bytes, MprotectFlags::READ | MprotectFlags::WRITE)
                .map_err(|errno| no_memory(bytes, errno))?;
            // Refused, its pages are small; that is slower and nothing else.
            let _ = madvise(start, bytes, Advice::LinuxHugepage);
        }
        Ok(())
    }
}

const fn no_memory(bytes: usize, errno: Errno) -> LinearError {
    LinearError::NoMemory {
        bytes,
        code: errno.raw_os_error(),
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.start, self.bytes);
    }
}

/// Gives whole pages back, of which nobody knows any more.
fn unmap(start: *mut c_void, bytes: usize) {
    if bytes > 0 {
        // SAFETY: the callers' mapping, and nobody has a pointer into that part of it.
        let unmapped = unsafe { munmap(start, bytes) };
        debug_assert!(unmapped.is_ok(), "the mapping was ours");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_lie_behind_each_other_and_are_zeros() {
        let mut all: Vec<Pages<u16>> = (1..100)
            .map(|at| Pages::zeroed(at * 7919).unwrap())
            .collect();
        for (at, pages) in all.iter_mut().enumerate() {
            assert_eq!(pages.as_ptr().addr() % page_size(), 0);
            assert!(pages.as_mut_slice().iter().all(|number| *number == 0));
            pages.as_mut_slice().fill(at as u16 + 1);
        }
        // What was given back is not given out again, so that whatever comes is zeros.
        drop(all.drain(..50));
        all.extend((0..50).map(|_| Pages::zeroed(5000).unwrap()));
        for (at, pages) in all.iter_mut().enumerate() {
            let expected = if at < 49 { at as u16 + 51 } else { 0 };
            let numbers = pages.as_mut_slice();
            assert!(numbers.iter().all(|number| *number == expected), "{at}");
        }
    }

    #[test]
    fn large_weights_have_mappings_of_their_own() {
        let mut large = Pages::<f32>::zeroed(SHARED_BYTES_MAX / 4 + 1).unwrap();
        assert_eq!(large.as_ptr().addr() % LARGE_PAGE, 0);
        assert_eq!(Arc::strong_count(&large.mapping), 1);
        assert_eq!(large.as_mut_slice().last(), Some(&0.0));
        let small = Pages::<f32>::zeroed(1).unwrap();
        assert!(Arc::strong_count(&small.mapping) > 1);
        let none = Pages::<u64>::zeroed(usize::MAX / 8).err();
        assert!(matches!(none, Some(LinearError::NoMemory { .. })));
    }
}
