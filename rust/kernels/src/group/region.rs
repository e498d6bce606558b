//! The memory that the ranks of a group share: one head, a line of counters for each rank, and two slots for each.
//!
//! ```text
//! | head | line 0 | line 1 | … | slot 0/even | slot 0/odd | slot 1/even | …
//! ```
//!
//! It is a [memory file](crate::memory_file), of rank 0.

#![expect(
    unsafe_code,
    reason = "sees memory that other processes write, and copies in and out of it"
)]

use std::{
    os::fd::OwnedFd,
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::GroupConfig;
use crate::{
    counter::Counter,
    error::{GroupError, SharedMemoryError},
    memory_file::Mapping,
};

/// "orchgrp" and the version of the layout.
const MAGIC: u64 = 0x6f72_6368_6772_7001;
/// Slots begin where pages do.
const PAGE: usize = 4096;
/// Numbers of a sum whose parts are added before the next are read: they stay in the first cache.
const SUM_CHUNK: usize = 512;

/// What all ranks read. Alone on its two cache lines, as processors fetch them in pairs.
#[repr(C, align(128))]
struct Head {
    magic: AtomicU64,
    generation: AtomicU64,
    size: AtomicU64,
    slot_bytes: AtomicU64,
    /// How the group ended: see `group::Ending`. 0 while it lives.
    ending: AtomicU32,
}

/// What one rank tells the others.
#[repr(C, align(128))]
pub(super) struct Line {
    /// Pieces that the rank has put into its slots, counted from its coming. The others sleep on it.
    pub(super) published: Counter,
    /// Its process.
    pub(super) pid: AtomicU32,
    /// What each of its slots holds: the collective and its bytes, to find ranks that are out of step.
    pub(super) labels: [AtomicU64; 2],
}

/// The shared memory.
pub(super) struct Region {
    // Its counters are atomics, and its slots are reached through raw pointers by one thread at a time: `SharedGroup`
    // holds a lock meanwhile.
    mapping: Mapping,
    size: usize,
    slot_bytes: usize,
}

impl Region {
    /// Makes the memory; rank 0 does. The file has to stay open until all have opened it.
    pub(super) fn create(config: &GroupConfig) -> Result<(Self, OwnedFd), GroupError> {
        let name = format!("orchestra-group-{}", config.generation);
        let (mapping, file) = Mapping::create(&name, Self::bytes(config))?;
        let region = Self::of(mapping, config);
        let head = region.head();
        head.generation.store(config.generation, Ordering::Relaxed);
        head.size.store(config.size as u64, Ordering::Relaxed);
        let slot_bytes = config.slot_bytes as u64;
        head.slot_bytes.store(slot_bytes, Ordering::Relaxed);
        head.magic.store(MAGIC, Ordering::Release);
        Ok((region, file))
    }

    /// Opens what rank 0 made, and compares it with what was expected.
    pub(super) fn open(address: &str, config: &GroupConfig) -> Result<Self, GroupError> {
        let region = Self::of(Mapping::open(address, Self::bytes(config))?, config);
        let head = region.head();
        let is_ours = head.magic.load(Ordering::Acquire) == MAGIC
            && head.generation.load(Ordering::Relaxed) == config.generation
            && head.size.load(Ordering::Relaxed) == config.size as u64
            && head.slot_bytes.load(Ordering::Relaxed) == config.slot_bytes as u64;
        if is_ours {
            return Ok(region);
        }
        let reason = "it is another group's, or another generation's";
        Err(SharedMemoryError::Unusable(reason).into())
    }

    const fn of(mapping: Mapping, config: &GroupConfig) -> Self {
        Self {
            mapping,
            size: config.size,
            slot_bytes: config.slot_bytes,
        }
    }

    /// Bytes up to the first slot.
    const fn slots_begin(size: usize) -> usize {
        (size_of::<Head>() + size * size_of::<Line>()).next_multiple_of(PAGE)
    }

    const fn bytes(config: &GroupConfig) -> usize {
        Self::slots_begin(config.size) + 2 * config.size * config.slot_bytes
    }

    fn head(&self) -> &Head {
        // SAFETY: a mapping begins with a page, which is aligned for and larger than a head; all its fields are atomics,
        // for which every bit pattern is a value and other processes' writes are in order.
        unsafe { self.mapping.base().cast::<Head>().as_ref() }
    }

    /// How the group ended; 0 while it lives.
    pub(super) fn ending(&self) -> &AtomicU32 {
        &self.head().ending
    }

    /// The counters of a rank of the group.
    pub(super) fn line(&self, rank: usize) -> &Line {
        assert!(rank < self.size, "rank {rank} of {}", self.size);
        let offset = size_of::<Head>() + rank * size_of::<Line>();
        // SAFETY: the line lies before `slots_begin`, so inside the mapping; sizes of heads and lines are multiples of
        // their common alignment. All its fields are atomics, as in `head`.
        unsafe { self.mapping.base().add(offset).cast::<Line>().as_ref() }
    }

    fn slot(&self, rank: usize, turn: u32) -> *mut u8 {
        assert!(rank < self.size, "rank {rank} of {}", self.size);
        let index = 2 * rank + (turn & 1) as usize;
        let offset = Self::slots_begin(self.size) + index * self.slot_bytes;
        // SAFETY: `bytes` counts two slots for each rank, so this one is inside the mapping.
        unsafe { self.mapping.base().as_ptr().add(offset) }
    }

    /// Copies into a slot of this rank's own, which no other rank reads now.
    pub(super) fn put(&self, rank: usize, turn: u32, bytes: &[u8]) {
        assert!(bytes.len() <= self.slot_bytes, "a piece fits a slot");
        let slot = self.slot(rank, turn);
        // SAFETY: the slot holds that many bytes, and is no memory that Rust has a reference to.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), slot, bytes.len()) }
    }

    /// Copies the bytes from `offset` on out of a slot that its rank has published and does not write now.
    pub(super) fn take(&self, rank: usize, turn: u32, offset: usize, bytes: &mut [u8]) {
        let is_inside = offset
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.slot_bytes);
        assert!(is_inside, "a piece lies inside its slot");
        let slot = self.slot(rank, turn);
        // SAFETY: the range was just found to be inside the slot; `bytes` is other memory.
        unsafe { ptr::copy_nonoverlapping(slot.add(offset), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Replaces `sum` by the sum of what all ranks have published, from the number `first` of it on, added in the order
    /// of the ranks: so every rank gets the same bits.
    pub(super) fn sum<T: Number>(&self, turn: u32, first: usize, sum: &mut [T]) {
        let is_inside = first
            .checked_add(sum.len())
            .is_some_and(|end| end <= self.slot_bytes / size_of::<T>());
        assert!(is_inside, "a piece lies inside its slot");
        let slots = (0..self.size).map(|rank| {
            let slot = self.slot(rank, turn).cast::<T>().cast_const();
            // SAFETY: the range was just found to be inside the slot.
            unsafe { slot.add(first) }
        });
        let slots: Vec<*const T> = slots.collect();
        // SAFETY: each slot holds `sum.len()` numbers from there on, which their ranks do not write now.
        unsafe { T::add_up(&slots, sum) }
    }
}

/// A kind of number that can be added up.
pub trait Number: Copy + private::Sealed {
    /// As it is added.
    fn widen(self) -> f32;
    /// As the sum is handed out.
    fn narrow(sum: f32) -> Self;
    /// The memory of a slice.
    fn bytes(numbers: &[Self]) -> &[u8];
    /// Replaces `sum` by the sum of the slots, in their order.
    ///
    /// # Safety
    /// Each slot holds `sum.len()` numbers, which nobody writes meanwhile.
    unsafe fn add_up(slots: &[*const Self], sum: &mut [Self]);
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for u16 {}
}

macro_rules! number {
    ($type:ty, $widen:expr, $narrow:expr) => {
        impl Number for $type {
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }

            #[inline(always)]
            fn narrow(sum: f32) -> Self {
                $narrow(sum)
            }

            fn bytes(numbers: &[Self]) -> &[u8] {
                // SAFETY: the same memory, seen as bytes: these have no padding and every value is one.
                unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
            }

            unsafe fn add_up(slots: &[*const Self], sum: &mut [Self]) {
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: this processor has AVX2; the rest is the caller's promise.
                    return unsafe { add_up_avx2(slots, sum) };
                }
                // SAFETY: the caller's promise.
                unsafe { add_up(slots, sum) }
            }
        }
    };
}

number!(f32, std::convert::identity, std::convert::identity);
number!(u16, crate::bf16::widen, crate::bf16::narrow);

/// # Safety
/// Each of `slots` holds `sum.len()` numbers, which nobody writes meanwhile.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "becomes part of a twin for each kind of processor"
)]
unsafe fn add_up<T: Number>(slots: &[*const T], sum: &mut [T]) {
    let mut parts = [0.0_f32; SUM_CHUNK];
    for (index, chunk) in sum.chunks_mut(SUM_CHUNK).enumerate() {
        let parts = &mut parts[..chunk.len()];
        for (rank, slot) in slots.iter().enumerate() {
            // SAFETY: the chunk is a part of `sum`, so the same part of the slot is inside it.
            let numbers = unsafe { slot.add(index * SUM_CHUNK) };
            for (place, part) in parts.iter_mut().enumerate() {
                // SAFETY: as above. Slots begin with pages, so numbers are aligned in them.
                let number = unsafe { numbers.add(place).read() }.widen();
                *part = if rank == 0 { number } else { *part + number };
            }
        }
        for (number, part) in chunk.iter_mut().zip(parts) {
            *number = T::narrow(*part);
        }
    }
}

/// # Safety
/// As `add_up`, on a processor with AVX2. The same additions in the same order, so the same bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn add_up_avx2<T: Number>(slots: &[*const T], sum: &mut [T]) {
    // SAFETY: the caller's promise is the same.
    unsafe { add_up(slots, sum) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(generation: u64) -> GroupConfig {
        GroupConfig {
            size: 2,
            generation,
            slot_bytes: 4096,
            ..GroupConfig::default()
        }
    }

    #[test]
    fn another_generations_memory_is_refused() {
        let (_region, file) = Region::create(&config(1)).unwrap();
        let address = Mapping::address(&file);
        assert!(Region::open(&address, &config(1)).is_ok());
        let refused = Region::open(&address, &config(2)).map(drop);
        let reason = "it is another group's, or another generation's";
        assert_eq!(refused, Err(SharedMemoryError::Unusable(reason).into()));
    }
}
