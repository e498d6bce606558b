//! Plain arrays, for processors that no other twin is written for.

use super::{Arithmetic, LANES, Lanes, Vector};

/// Eight numbers, one by one.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

impl Vector for Portable {
    const LEN: usize = LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(crate::bf16::widen))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let bits = self.0.map(crate::bf16::narrow);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    fn prefetch<T>(_from: *const T) {}

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // Not `f32::mul_add`: without the instruction that is a call of the C library for each number.
        self.mul(factor).add(term)
    }
}

impl Arithmetic for Portable {
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self) -> Self {
        // Adding 1.5 * 2^23 leaves no bits behind the point, for the small numbers that come here.
        let shift = Self::splat(12_582_912.0);
        self.add(shift).zip(shift, |a, b| a - b)
    }

    #[inline(always)]
    fn times_exp2(self, whole: Self) -> Self {
        self.zip(whole, |value, n| {
            value * f32::from_bits(((n as i32 + 127) as u32) << 23)
        })
    }

    #[inline(always)]
    fn zero_below(self, value: Self, bound: f32) -> Self {
        self.zip(value, |x, value| if x < bound { 0.0 } else { value })
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn sums(all: [Self; LANES]) -> Self {
        Self(all.map(Arithmetic::sum))
    }

    #[inline(always)]
    fn columns(rows: [Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|column| Self(rows.map(|row| row.0[column])))
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u16) -> [Self; 2] {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        [0, 1].map(|place: usize| Self(bits.map(|pair| crate::bf16::widen(pair[place]))))
    }

    #[inline(always)]
    unsafe fn store_bf16_pairs(pairs: [Self; 2], to: *mut u16) {
        let bits = pairs.map(|numbers| numbers.0.map(crate::bf16::narrow));
        let zipped: [[u16; 2]; LANES] = std::array::from_fn(|at| [bits[0][at], bits[1][at]]);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[[u16; 2]; LANES]>().write_unaligned(zipped) }
    }
}
