//! Sums of values, times the weights of the rows.

#![expect(unsafe_code, reason = "reads a cache that other processes may write")]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use std::ops::Range;

use super::{super::CHUNK, Scratch};
use crate::{
    element::Element,
    simd::{LANES, Vector, Wide},
};

/// Adds the values in a range to the sums of `R` rows, which see it. Each of the values is where `CHUNK / values.len()`
/// tokens begin.
///
/// # Safety
/// The values of the range are there.
#[inline(always)]
pub(super) unsafe fn add_rows<W: Wide, T: Element, const R: usize>(
    row: usize,
    values: (&[*const T], &Range<usize>),
    scratch: &mut Scratch,
    size: usize,
) {
    let sums = scratch.sums[row * size..(row + R) * size].as_mut_ptr();
    let weights = &scratch.weights[row..].as_chunks().0[0];
    let kept = std::array::from_fn(|index| {
        let row = row + index;
        scratch.softmax[row / LANES].kept[row % LANES]
    });
    let rows = (weights, &kept);
    let mut start = 0;
    // As many sums at a time as there are registers for.
    // SAFETY: each call stays inside the rows; the rest is the caller's promise.
    unsafe {
        while (W::IS_ONE || R == 1) && start + 4 * W::LEN <= size {
            add_values::<W, T, R, 4>(rows, values, (sums, start, size));
            start += 4 * W::LEN;
        }
        while (W::IS_ONE || R <= 2) && start + 2 * W::LEN <= size {
            add_values::<W, T, R, 2>(rows, values, (sums, start, size));
            start += 2 * W::LEN;
        }
        while start + W::LEN <= size {
            add_values::<W, T, R, 1>(rows, values, (sums, start, size));
            start += W::LEN;
        }
        if start < size {
            add_values::<W::Half, T, R, 1>(rows, values, (sums, start, size));
        }
    }
}

/// Adds `N` vectors of each value in `range`, in the order of the tokens, to the sums of `R` rows.
///
/// # Safety
/// So many numbers are there, of each row and of each value in the range.
#[inline(always)]
unsafe fn add_values<V: Vector, T: Element, const R: usize, const N: usize>(
    (weights, kept): (&[[f32; CHUNK]; R], &[f32; R]),
    (values, range): (&[*const T], &Range<usize>),
    (sums, start, size): (*mut f32, usize, usize),
) {
    let place = |row: usize, index: usize| row * size + start + index * V::LEN;
    let mut parts = [[V::splat(0.0); N]; R];
    for (row, parts) in parts.iter_mut().enumerate() {
        for (index, part) in parts.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *part = unsafe { V::load(sums.add(place(row, index))) }.mul(V::splat(kept[row]));
        }
    }
    let span = CHUNK / values.len();
    for (index, values) in values.iter().enumerate() {
        let first = index * span;
        let (from, to) = (range.start.max(first), range.end.min(first + span));
        for token in from..to {
            let mut value = [V::splat(0.0); N];
            for (index, value) in value.iter_mut().enumerate() {
                let at = (token - first) * size + start + index * V::LEN;
                // SAFETY: as above.
                *value = unsafe { T::load_unzipped(values.add(at)) };
            }
            for (parts, weights) in parts.iter_mut().zip(weights) {
                let weight = V::splat(weights[token]);
                for (part, value) in parts.iter_mut().zip(value) {
                    *part = weight.mul_add(value, *part);
                }
            }
        }
    }
    for (row, parts) in parts.into_iter().enumerate() {
        for (index, part) in parts.into_iter().enumerate() {
            // SAFETY: as at the top.
            unsafe { part.store(sums.add(place(row, index))) };
        }
    }
}
