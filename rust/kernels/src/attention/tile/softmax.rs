//! The online softmax: weights relative to the largest score so far.

#![expect(unsafe_code, reason = "loads and stores vectors")]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use std::ops::Range;

use super::super::CHUNK;
use crate::simd::{LANES, Lanes};

/// The online softmax of eight rows.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    /// The largest score so far.
    most: [f32; LANES],
    /// The sum of the weights relative to it.
    pub(super) total: [f32; LANES],
    /// What the sums before the last chunk are multiplied by.
    pub(super) kept: [f32; LANES],
}

/// Of rows that have seen nothing.
pub(super) const BEGIN: Softmax = Softmax {
    most: [f32::NEG_INFINITY; LANES],
    total: [0.0; LANES],
    kept: [1.0; LANES],
};

/// Leaves a row only the scores of what it sees.
#[inline(always)]
pub(super) fn hide(scores: &mut [f32; CHUNK], seen: &Range<usize>) {
    if *seen != (0..CHUNK) {
        scores[..seen.start.min(CHUNK)].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
    }
}

/// Makes weights of the scores of up to eight rows, relative to each row's largest so far: side by side, for what is done
/// for one row waits for itself.
#[inline(always)]
pub(super) fn weigh<L: Lanes>(rows: &mut [[f32; CHUNK]], softmax: &mut Softmax) {
    // SAFETY: the arrays hold eight.
    let load = |numbers: &[f32; LANES]| unsafe { L::load(numbers.as_ptr()) };
    let mut most = [L::splat(f32::NEG_INFINITY); LANES];
    for (row, most) in rows.iter().zip(&mut most) {
        for scores in row.as_chunks().0 {
            *most = load(scores).max(*most);
        }
    }
    let before = load(&softmax.most);
    let mut now = before;
    for column in L::columns(most) {
        now = column.max(now);
    }
    // A row that has seen nothing yet is still minus infinity, of which no difference can be taken.
    let base = now.max(L::splat(f32::MIN));
    let mut bases = [0.0; LANES];
    // SAFETY: the array holds eight.
    unsafe { base.mul(L::splat(-1.0)).store(bases.as_mut_ptr()) };
    let mut totals = [L::splat(0.0); LANES];
    for ((row, total), base) in rows.iter_mut().zip(&mut totals).zip(bases) {
        for scores in row.as_chunks_mut().0 {
            let weights = load(scores).add(L::splat(base)).exp();
            // SAFETY: the array holds eight.
            unsafe { weights.store(scores.as_mut_ptr()) };
            *total = total.add(weights);
        }
    }
    let kept = before.add(base.mul(L::splat(-1.0))).exp();
    let total = load(&softmax.total).mul(kept).add(L::sums(totals));
    // SAFETY: the arrays hold eight.
    unsafe {
        now.store(softmax.most.as_mut_ptr());
        total.store(softmax.total.as_mut_ptr());
        kept.store(softmax.kept.as_mut_ptr());
    }
}
