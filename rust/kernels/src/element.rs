//! The numbers that tensors are made of: computed with as `f32`, whatever they are stored as.

#![expect(unsafe_code, reason = "reads and writes the memory of tensors")]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use crate::simd::Vector;

/// A kind of number.
pub trait Element: Copy + Send + Sync + 'static {
    /// Reads as many as the vector has.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
    /// Rounds and writes as many as the vector has.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn store<V: Vector>(numbers: V, to: *mut Self);
    /// The same address, where these already are `f32`.
    fn as_floats(from: *const Self) -> Option<*const f32>;
    /// Where `count` numbers are as `f32`: here, or in `room`, into which they are copied.
    ///
    /// # Safety
    /// They are there, and `room` holds as many.
    #[inline(always)]
    unsafe fn floats(from: *const Self, count: usize, room: *mut f32) -> *const f32 {
        if let Some(here) = Self::as_floats(from) {
            return here;
        }
        for at in 0..count {
            // SAFETY: the caller's promise.
            unsafe { room.add(at).write(from.add(at).read().widen()) };
        }
        room
    }
    /// Its value.
    fn widen(self) -> f32;
    /// Rounds.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn store<V: Vector>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { numbers.store(to) }
    }

    #[inline(always)]
    fn as_floats(from: *const Self) -> Option<*const f32> {
        Some(from)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn store<V: Vector>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { numbers.store_bf16(to) }
    }

    #[inline(always)]
    fn as_floats(_from: *const Self) -> Option<*const f32> {
        None
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        crate::bf16::widen(self)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        crate::bf16::narrow(value)
    }
}
