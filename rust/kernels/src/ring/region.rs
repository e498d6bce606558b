//! The memory of a ring: one head, a line for each reader, and the bytes.

#![expect(
    unsafe_code,
    reason = "sees memory that other processes write, and copies in and out of it"
)]

use std::{
    os::fd::OwnedFd,
    ptr,
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
};

use super::{RingConfig, START};
use crate::{counter::Counter, error::SharedMemoryError, memory_file::Mapping};

/// "orchrng" and the version of the layout.
const MAGIC: u64 = 0x6f72_6368_726e_6701;
/// The bytes begin where pages do.
const PAGE: usize = 4096;

/// What everybody reads. Alone on its two cache lines, as processors fetch them in pairs.
#[repr(C, align(128))]
struct Head {
    magic: AtomicU64,
    key: AtomicU64,
    readers: AtomicU64,
    capacity: AtomicU64,
    /// Where the next byte goes.
    written: Counter,
}

/// What one reader tells the writer.
#[repr(C, align(128))]
pub(super) struct Line {
    /// Which byte it takes next. The writer sleeps on it.
    pub(super) taken: Counter,
    is_asleep: AtomicU32,
}

impl Line {
    /// The reader sleeps soundly. In one order with what is written: either it sees that, or the writer sees this.
    pub(super) fn fall_asleep(&self) {
        self.is_asleep.store(1, SeqCst);
    }

    /// Returns whether the reader slept soundly, and writes down that it does not.
    pub(super) fn wake(&self) -> bool {
        // Most of the time it does not, and the line stays where it is read.
        self.is_asleep.load(SeqCst) != 0 && self.is_asleep.swap(0, SeqCst) != 0
    }
}

/// The shared memory.
pub(super) struct Region {
    mapping: Mapping,
    config: RingConfig,
}

impl Region {
    pub(super) fn create(config: RingConfig) -> Result<(Self, OwnedFd), SharedMemoryError> {
        let (mapping, file) = Mapping::create("orchestra-ring", Self::bytes(&config))?;
        let region = Self { mapping, config };
        let head = region.head();
        head.key.store(region.config.key, Relaxed);
        head.readers.store(region.config.readers as u64, Relaxed);
        head.capacity.store(region.config.capacity as u64, Relaxed);
        head.written.publish(START);
        for reader in 0..region.config.readers {
            region.line(reader).taken.publish(START);
        }
        head.magic.store(MAGIC, Release);
        Ok((region, file))
    }

    /// Opens what a writer has made, and compares it with what was expected.
    pub(super) fn open(config: RingConfig, address: &str) -> Result<Self, SharedMemoryError> {
        let mapping = Mapping::open(address, Self::bytes(&config))?;
        let region = Self { mapping, config };
        let head = region.head();
        let is_ours = head.magic.load(Acquire) == MAGIC
            && head.key.load(Relaxed) == region.config.key
            && head.readers.load(Relaxed) == region.config.readers as u64
            && head.capacity.load(Relaxed) == region.config.capacity as u64;
        if is_ours {
            return Ok(region);
        }
        Err(SharedMemoryError::Unusable("it is another ring's"))
    }

    pub(super) const fn config(&self) -> &RingConfig {
        &self.config
    }

    const fn bytes_begin(readers: usize) -> usize {
        (size_of::<Head>() + readers * size_of::<Line>()).next_multiple_of(PAGE)
    }

    const fn bytes(config: &RingConfig) -> usize {
        Self::bytes_begin(config.readers) + config.capacity
    }

    fn head(&self) -> &Head {
        // SAFETY: a mapping begins with a page, which is aligned for and larger than a head; all its fields are atomics,
        // for which every bit pattern is a value and other processes' writes are in order.
        unsafe { self.mapping.base().cast::<Head>().as_ref() }
    }

    /// Where the next byte goes.
    pub(super) fn written(&self) -> &Counter {
        &self.head().written
    }

    pub(super) fn line(&self, reader: usize) -> &Line {
        let readers = self.config.readers;
        assert!(reader < readers, "reader {reader} of {readers}");
        let offset = size_of::<Head>() + reader * size_of::<Line>();
        // SAFETY: the line lies before `bytes_begin`, so inside the mapping; sizes of heads and lines are multiples of
        // their common alignment. All its fields are atomics, as in `head`.
        unsafe { self.mapping.base().add(offset).cast::<Line>().as_ref() }
    }

    /// Where a position is, and how many bytes come before the ring's end.
    fn place(&self, position: u32) -> (*mut u8, usize) {
        let capacity = self.config.capacity;
        let offset = position as usize & (capacity - 1);
        let begin = Self::bytes_begin(self.config.readers);
        // SAFETY: the offset is less than the capacity, which `bytes` counts behind `begin`: inside the mapping.
        let place = unsafe { self.mapping.base().as_ptr().add(begin + offset) };
        (place, capacity - offset)
    }

    /// Copies bytes to a position on, which no reader reads now.
    pub(super) fn put(&self, position: u32, bytes: &[u8]) {
        assert!(bytes.len() <= self.config.capacity, "a piece fits the ring");
        let (place, straight) = self.place(position);
        let (front, back) = bytes.split_at(bytes.len().min(straight));
        let (start, _) = self.place(0);
        // SAFETY: `front` fits before the ring's end and `back`, shorter than the ring, behind its start; neither is
        // memory that Rust has a reference to.
        unsafe {
            ptr::copy_nonoverlapping(front.as_ptr(), place, front.len());
            ptr::copy_nonoverlapping(back.as_ptr(), start, back.len());
        }
    }

    /// Copies bytes from a position on, which the writer has published and does not write now.
    pub(super) fn take(&self, position: u32, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.config.capacity, "a piece fits the ring");
        let (place, straight) = self.place(position);
        let middle = bytes.len().min(straight);
        let (front, back) = bytes.split_at_mut(middle);
        let (start, _) = self.place(0);
        // SAFETY: as in `put`; `bytes` is other memory.
        unsafe {
            ptr::copy_nonoverlapping(place, front.as_mut_ptr(), front.len());
            ptr::copy_nonoverlapping(start, back.as_mut_ptr(), back.len());
        }
    }
}
