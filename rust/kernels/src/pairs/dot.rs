//! Pairs by AVX-512 BF16: some rows with two registers of outputs.

#![expect(
    unsafe_code,
    reason = "reads tensors, by instructions that only some processors have"
)]

use super::{Block, HEIGHT, WIDTH};

/// Rows of a tile, at most: their sums are enough for none to wait for another, and fit the registers.
#[cfg(target_arch = "x86_64")]
const TILE: usize = 8;

/// Whether this processor has it.
pub(super) fn is_here() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// # Safety
/// Rows and weights are there, and so is what [`is_here`] asks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply(block: &Block, sums: &mut [[f32; WIDTH]; HEIGHT]) {
    let tiles = block.count.div_ceil(TILE);
    for tile in 0..tiles {
        let first = block.count * tile / tiles;
        let rows = block.count * (tile + 1) / tiles - first;
        let sums = &mut sums[first..first + rows];
        // SAFETY: the caller's promise: the tile is part of the block.
        unsafe {
            match rows {
                1 => multiply_tile::<1>(block, first, sums),
                2 => multiply_tile::<2>(block, first, sums),
                3 => multiply_tile::<3>(block, first, sums),
                4 => multiply_tile::<4>(block, first, sums),
                5 => multiply_tile::<5>(block, first, sums),
                6 => multiply_tile::<6>(block, first, sums),
                7 => multiply_tile::<7>(block, first, sums),
                _ => multiply_tile::<TILE>(block, first, sums),
            }
        }
    }
}

/// # Safety
/// As [`multiply`], with `M` rows from `first` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_tile<const M: usize>(block: &Block, first: usize, sums: &mut [[f32; WIDTH]]) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::PANEL;

    // SAFETY: both are 64 bytes that may hold anything.
    let pairs = |bits: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) };
    let mut parts = [[_mm512_setzero_ps(); 2]; M];
    for at in (0..block.depth).step_by(2) {
        // SAFETY: two panels lie there, 16 pairs for each pair of inputs.
        let weights = [0, 1].map(|panel| unsafe {
            let from = block.weights.add((panel * block.depth + at) * PANEL);
            pairs(_mm512_loadu_si512(from.cast()))
        });
        for (row, parts) in parts.iter_mut().enumerate() {
            // SAFETY: the row has `depth` numbers.
            let pair = unsafe {
                let from = block.rows.add((first + row) * block.stride + at);
                from.cast::<i32>().read_unaligned()
            };
            let input = pairs(_mm512_set1_epi32(pair));
            for (part, weights) in parts.iter_mut().zip(weights) {
                *part = _mm512_dpbf16_ps(*part, input, weights);
            }
        }
    }
    for (parts, sums) in parts.into_iter().zip(sums) {
        for (panel, part) in parts.into_iter().enumerate() {
            // SAFETY: a row of sums holds two panels.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(panel * PANEL), part) };
        }
    }
}

/// There is no such processor.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn multiply(_block: &Block, _sums: &mut [[f32; WIDTH]; HEIGHT]) {}
