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
    /// Reads as many as the vector has, in the order that is the least work for it.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load_unzipped<V: Vector>(from: *const Self) -> V;
    /// Rounds and writes numbers in that order.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn store_zipped<V: Vector>(numbers: V, to: *mut Self);
    /// The same address, where these already are `f32`.
    fn as_floats(from: *const Self) -> Option<*const f32>;
    /// Copies `count` numbers as `f32`.
    ///
    /// # Safety
    /// They are there, and `to` has room for as many.
    #[inline(always)]
    unsafe fn copy_floats<V: Vector>(from: *const Self, count: usize, to: *mut f32) {
        let whole = count / V::LEN * V::LEN;
        // Vectors by hand, whatever the compiler makes of a plain loop over memory that may overlap.
        // SAFETY: the caller's promise.
        unsafe {
            for at in (0..whole).step_by(V::LEN) {
                Self::load::<V>(from.add(at)).store(to.add(at));
            }
            for at in whole..count {
                to.add(at).write(from.add(at).read().widen());
            }
        }
    }
    /// Rounds and writes as many as `numbers` has.
    ///
    /// # Safety
    /// There is room for them.
    #[inline(always)]
    unsafe fn copy_rounded<V: Vector>(numbers: &[f32], to: *mut Self) {
        let vectors = numbers.chunks_exact(V::LEN);
        let rest = vectors.remainder();
        let whole = numbers.len() - rest.len();
        // SAFETY: the caller's promise.
        unsafe {
            for (index, vector) in vectors.enumerate() {
                Self::store(V::load(vector.as_ptr()), to.add(index * V::LEN));
            }
            for (at, number) in rest.iter().enumerate() {
                to.add(whole + at).write(Self::narrow(*number));
            }
        }
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
    unsafe fn load_unzipped<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn store_zipped<V: Vector>(numbers: V, to: *mut Self) {
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
    unsafe fn load_unzipped<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16_unzipped(from) }
    }

    #[inline(always)]
    unsafe fn store_zipped<V: Vector>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { numbers.store_bf16_zipped(to) }
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
