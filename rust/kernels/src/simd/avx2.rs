//! AVX2 with fused multiply-add: x86-64 since 2013.
//!
//! The methods are inlined into kernels that are compiled for such a processor (`#[target_feature]`), and those run
//! where `is_here` has found one: that is the argument of each block below.

#![expect(
    unsafe_code,
    reason = "calls instructions that only some processors have"
)]
#![expect(
    clippy::cast_ptr_alignment,
    reason = "the instruction wants none: its type is all that there is"
)]
#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "one argument for all: see the top of the file"
)]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC,
    _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_storeu_si128,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_andnot_ps, _mm256_blend_epi16,
    _mm256_blendv_epi8, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_castsi256_si128,
    _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_cvtps_epi32, _mm256_div_ps, _mm256_fmadd_ps,
    _mm256_hadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_packus_epi32, _mm256_permute2f128_ps, _mm256_permute4x64_epi64,
    _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_shuffle_ps,
    _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps, _mm256_storeu_si256,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use super::{Arithmetic, LANES, Lanes, Vector};

/// One register.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

/// Whether this processor has what `Avx2` is made of.
pub(super) fn is_here() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

impl Avx2 {
    #[inline(always)]
    pub(super) const fn of(numbers: __m256) -> Self {
        Self(numbers)
    }

    /// Their bits, those of the nearest bf16 in the upper halves and anything in the lower ones.
    #[inline(always)]
    fn rounded(self) -> __m256i {
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let is_odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let carry = _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff));
            let is_none = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let none = _mm256_set1_epi32(0x7fc0 << 16);
            _mm256_blendv_epi8(_mm256_add_epi32(bits, carry), none, is_none)
        }
    }
}

impl Vector for Avx2 {
    const LEN: usize = LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self(unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast::<__m128i>()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        })
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let rounded = _mm256_srli_epi32::<16>(self.rounded());
            // Two quarters of a register become one of them and the other.
            let halves = _mm256_packus_epi32(rounded, rounded);
            let low = _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(halves));
            _mm_storeu_si128(to.cast::<__m128i>(), low);
        }
    }

    #[inline(always)]
    fn prefetch<T>(from: *const T) {
        // An address that is none is no fault: the instruction does nothing then.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, term.0) })
    }
}

impl Arithmetic for Avx2 {
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        Self(unsafe { _mm256_round_ps::<NEAREST>(self.0) })
    }

    #[inline(always)]
    fn times_exp2(self, whole: Self) -> Self {
        Self(unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole.0), _mm256_set1_epi32(127));
            _mm256_mul_ps(
                self.0,
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)),
            )
        })
    }

    #[inline(always)]
    fn zero_below(self, value: Self, bound: f32) -> Self {
        Self(unsafe {
            let is_below = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, _mm256_set1_ps(bound));
            _mm256_andnot_ps(is_below, value.0)
        })
    }
}

impl Lanes for Avx2 {
    #[inline(always)]
    fn sums(all: [Self; LANES]) -> Self {
        Self(unsafe {
            // Of two rows the sums of neighbours, then of four the sums of four: low halves, high halves. No closure:
            // it would be a function of its own, compiled for every processor.
            let first = _mm256_hadd_ps(all[0].0, all[1].0);
            let second = _mm256_hadd_ps(all[2].0, all[3].0);
            let third = _mm256_hadd_ps(all[4].0, all[5].0);
            let fourth = _mm256_hadd_ps(all[6].0, all[7].0);
            let four = _mm256_hadd_ps(first, second);
            let last = _mm256_hadd_ps(third, fourth);
            let low = _mm256_permute2f128_ps::<0x20>(four, last);
            let high = _mm256_permute2f128_ps::<0x31>(four, last);
            _mm256_add_ps(low, high)
        })
    }
    #[inline(always)]
    fn columns(rows: [Self; LANES]) -> [Self; LANES] {
        unsafe {
            // Of two rows each: their numbers by turns, in each quarter of the columns.
            let mut twos = [_mm256_setzero_ps(); LANES];
            for pair in 0..4 {
                let (upper, lower) = (rows[2 * pair].0, rows[2 * pair + 1].0);
                twos[2 * pair] = _mm256_unpacklo_ps(upper, lower);
                twos[2 * pair + 1] = _mm256_unpackhi_ps(upper, lower);
            }
            // Four rows of a column and of the fourth one after it; then all eight.
            let mut columns = [Self(_mm256_setzero_ps()); LANES];
            for column in 0..4 {
                let at = column / 2;
                let (first, second) = (twos[at], twos[at + 2]);
                let (third, fourth) = (twos[at + 4], twos[at + 6]);
                let (upper, lower) = if column % 2 == 0 {
                    (
                        _mm256_shuffle_ps::<0b0100_0100>(first, second),
                        _mm256_shuffle_ps::<0b0100_0100>(third, fourth),
                    )
                } else {
                    (
                        _mm256_shuffle_ps::<0b1110_1110>(first, second),
                        _mm256_shuffle_ps::<0b1110_1110>(third, fourth),
                    )
                };
                columns[column] = Self(_mm256_permute2f128_ps::<0x20>(upper, lower));
                columns[column + 4] = Self(_mm256_permute2f128_ps::<0x31>(upper, lower));
            }
            columns
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u16) -> [Self; 2] {
        unsafe {
            let pairs = _mm256_loadu_si256(from.cast::<__m256i>());
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            let even = _mm256_slli_epi32::<16>(pairs);
            [
                Self(_mm256_castsi256_ps(even)),
                Self(_mm256_castsi256_ps(odd)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_pairs(pairs: [Self; 2], to: *mut u16) {
        unsafe {
            let even = _mm256_srli_epi32::<16>(pairs[0].rounded());
            let both = _mm256_blend_epi16::<0b1010_1010>(even, pairs[1].rounded());
            _mm256_storeu_si256(to.cast::<__m256i>(), both);
        }
    }
}
