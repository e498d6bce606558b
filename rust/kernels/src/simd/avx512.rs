//! AVX-512: sixteen numbers in a register, and 32 registers.
//!
//! As in `avx2`, the methods are inlined into kernels that are compiled for such a processor, and those run where
//! `is_here` has found one: that is the argument of each block below.

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
    __m256i, __m512, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castps512_ps256,
    _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32,
    _mm512_div_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_mov_epi32,
    _mm512_mask_mov_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_srli_epi32, _mm512_storeu_ps,
};

use super::{Arithmetic, Avx2, Vector, Wide, avx2};

/// One register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

/// Whether this processor has what `Avx512` is made of: all servers with AVX-512 but the first (Knights Landing).
pub(super) fn is_here() -> bool {
    avx2::is_here()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
}

impl Vector for Avx512 {
    const LEN: usize = 16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self(unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast::<__m256i>()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        })
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let carry = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, carry));
            let is_none = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let rounded = _mm512_mask_mov_epi32(rounded, is_none, _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256(to.cast::<__m256i>(), _mm512_cvtepi32_epi16(rounded));
        }
    }

    #[inline(always)]
    fn prefetch<T>(from: *const T) {
        // An address that is none is no fault: the instruction does nothing then.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
    }
}

impl Arithmetic for Avx512 {
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }

    #[inline(always)]
    fn zero_below(self, value: Self, bound: f32) -> Self {
        Self(unsafe {
            let is_below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, _mm512_set1_ps(bound));
            _mm512_mask_mov_ps(value.0, is_below, _mm512_setzero_ps())
        })
    }

    #[inline(always)]
    fn times_exp2(self, whole: Self) -> Self {
        Self(unsafe { _mm512_scalef_ps(self.0, whole.0) })
    }
}

impl Wide for Avx512 {
    type Half = Avx2;
    const IS_ONE: bool = true;

    #[inline(always)]
    fn halves(self) -> (Avx2, Avx2) {
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            (Avx2::of(_mm512_castps512_ps256(self.0)), Avx2::of(high))
        }
    }
}
