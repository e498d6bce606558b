//! Pairs by AVX-512 BF16: some rows with two registers of outputs.

#![expect(
    unsafe_code,
    reason = "reads tensors, by instructions that only some processors have"
)]

use super::Block;

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

/// Adds the products of a block to its sums.
///
/// # Safety
/// Rows and weights are there, and so is what [`is_here`] asks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply(block: &Block) {
    let tiles = block.count.div_ceil(TILE);
    for panel in (0..block.panels).step_by(2) {
        for tile in 0..tiles {
            let first = block.count * tile / tiles;
            let rows = block.count * (tile + 1) / tiles - first;
            // SAFETY: the caller's promise: the tile is part of the block.
            unsafe {
                match rows {
                    1 => multiply_tile::<1>(block, first, panel),
                    2 => multiply_tile::<2>(block, first, panel),
                    3 => multiply_tile::<3>(block, first, panel),
                    4 => multiply_tile::<4>(block, first, panel),
                    5 => multiply_tile::<5>(block, first, panel),
                    6 => multiply_tile::<6>(block, first, panel),
                    7 => multiply_tile::<7>(block, first, panel),
                    _ => multiply_tile::<TILE>(block, first, panel),
                }
            }
        }
    }
}

/// # Safety
/// As [`multiply`], with `M` rows from `first` on and two panels from `panel` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_tile<const M: usize>(block: &Block, first: usize, panel: usize) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{DEPTH, PANEL};

    // SAFETY: both are 64 bytes that may hold anything.
    let pairs = |bits: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) };
    let sums = block.sums.wrapping_add(first * block.sums_stride + panel);
    let mut parts = [[_mm512_setzero_ps(); 2]; M];
    for (row, parts) in parts.iter_mut().enumerate() {
        for (panel, part) in parts.iter_mut().enumerate() {
            // SAFETY: the block has sums of each row and panel.
            *part = unsafe { _mm512_loadu_ps(sums.add(row * block.sums_stride + panel).cast()) };
        }
    }
    for at in (0..block.steps * DEPTH).step_by(2) {
        // SAFETY: the panels lie there, 16 pairs for each pair of inputs.
        let weights = [panel, panel + 1].map(|panel| unsafe {
            let from = block.weights.add(panel * block.panel_stride + at * PANEL);
            pairs(_mm512_loadu_si512(from.cast()))
        });
        let place = at / DEPTH * block.step_stride + at % DEPTH;
        for (row, parts) in parts.iter_mut().enumerate() {
            // SAFETY: the row has so many numbers.
            let pair = unsafe {
                let from = block.rows.add((first + row) * block.row_stride + place);
                from.cast::<i32>().read_unaligned()
            };
            let input = pairs(_mm512_set1_epi32(pair));
            for (part, weights) in parts.iter_mut().zip(weights) {
                *part = _mm512_dpbf16_ps(*part, input, weights);
            }
        }
    }
    for (row, parts) in parts.into_iter().enumerate() {
        for (panel, part) in parts.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(sums.add(row * block.sums_stride + panel).cast(), part) };
        }
    }
}

/// There is no such processor.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn multiply(_block: &Block) {}
