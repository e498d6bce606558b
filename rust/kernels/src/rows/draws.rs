//! Tokens out of logits: a softmax, and the inversion of its distribution function.

#![expect(
    unsafe_code,
    reason = "reads tensors, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use std::slice;

use super::Work;
use crate::simd::{LANES, Lanes};

/// Probabilities that are added up together, before the one that is looked for is searched among them.
const BLOCK: usize = 256;
/// Sums that run side by side, for none to wait for another.
const CHAINS: usize = 4;

/// Rows of logits that become probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Softmax {
    /// `[count, size]`, without gaps.
    pub logits: *const f32,
    /// `[count]`, above 0: divides the logits of a row.
    pub temperatures: *const f32,
    /// `[count, size]`, without gaps.
    pub probabilities: *mut f32,
    /// Rows.
    pub count: usize,
    /// Numbers of a row.
    pub size: usize,
}

/// Rows of probabilities from which a token each is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// `[count, size]`, without gaps, not necessarily of sum 1.
    pub probabilities: *const f32,
    /// `[count]`, in `[0, 1)`.
    pub numbers: *const f64,
    /// `[count]`
    pub tokens: *mut i64,
    /// Rows.
    pub count: usize,
    /// Numbers of a row.
    pub size: usize,
}

// SAFETY: threads read the same rows, and each writes rows that no other has.
unsafe impl Sync for Softmax {}
// SAFETY: as above.
unsafe impl Sync for Draw {}

impl Work for Softmax {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        // SAFETY: the row is one of these, and this thread's alone.
        let (logits, probabilities, temperature) = unsafe {
            (
                slice::from_raw_parts(self.logits.add(row * self.size), self.size),
                slice::from_raw_parts_mut(self.probabilities.add(row * self.size), self.size),
                *self.temperatures.add(row),
            )
        };
        let (eights, rest) = logits.as_chunks::<LANES>();
        // What fills the last eight up counts for nothing.
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut most = [L::splat(f32::NEG_INFINITY); CHAINS];
        for (at, eight) in eights.iter().chain([&last]).enumerate() {
            // SAFETY: there are eight.
            let numbers = unsafe { L::load(eight.as_ptr()) };
            most[at % CHAINS] = numbers.max(most[at % CHAINS]);
        }
        let most = most[0].max(most[1]).max(most[2].max(most[3])).largest();
        let (lowered, divisor) = (L::splat(-most), L::splat(temperature));
        let mut sums = [L::splat(0.0); CHAINS];
        let (targets, target_rest) = probabilities.as_chunks_mut::<LANES>();
        let mut target_last = [0.0; LANES];
        let pairs = eights.iter().zip(targets.iter_mut());
        for (at, (eight, target)) in pairs.chain([(&last, &mut target_last)]).enumerate() {
            // SAFETY: there are eight of both.
            unsafe {
                let weights = L::load(eight.as_ptr()).add(lowered).div(divisor).exp();
                sums[at % CHAINS] = sums[at % CHAINS].add(weights);
                weights.store(target.as_mut_ptr());
            }
        }
        target_rest.copy_from_slice(&target_last[..rest.len()]);
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        for probability in probabilities {
            *probability *= 1.0 / sum;
        }
    }
}

impl Work for Draw {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        // SAFETY: the row is one of these.
        let (probabilities, number) = unsafe {
            let row_start = self.probabilities.add(row * self.size);
            (
                slice::from_raw_parts(row_start, self.size),
                *self.numbers.add(row),
            )
        };
        let total: f64 = probabilities.chunks(BLOCK).map(block_sum).sum();
        let target = number * total;
        // The last block that can be drawn from is taken where sums rounded to less than the target; without any, the first.
        let (mut chosen, mut left) = (0, target);
        let mut before = 0.0;
        for (at, block) in probabilities.chunks(BLOCK).enumerate() {
            let sum = block_sum(block);
            if sum > 0.0 {
                (chosen, left) = (at * BLOCK, target - before);
            }
            before += sum;
            if before > target {
                break;
            }
        }
        let end = self.size.min(chosen + BLOCK);
        let drawn = chosen + place(&probabilities[chosen..end], left);
        // SAFETY: as above, and this thread's alone.
        unsafe { *self.tokens.add(row) = drawn as i64 };
    }
}

/// The sum of some probabilities. In double precision, so that the last of 100,000 small ones is not lost.
#[inline(always)]
fn block_sum(block: &[f32]) -> f64 {
    let (fours, rest) = block.as_chunks::<CHAINS>();
    let mut sums = [0.0_f64; CHAINS];
    for four in fours {
        for (sum, number) in sums.iter_mut().zip(four) {
            *sum += f64::from(*number);
        }
    }
    let rest: f64 = rest.iter().copied().map(f64::from).sum();
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

/// The first of a block with which its sum passes `target`; where none does, the last that is above 0.
#[inline(always)]
fn place(block: &[f32], target: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (at, number) in block.iter().enumerate() {
        sum += f64::from(*number);
        if *number > 0.0 {
            last = at;
            if sum > target {
                break;
            }
        }
    }
    last
}
