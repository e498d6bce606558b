//! Tokens out of logits: the likeliest one; or a softmax, and the inversion of its distribution function.

#![expect(
    unsafe_code,
    reason = "reads tensors, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use std::{ops::Range, slice};

use super::Work;
use crate::{
    element::Element,
    simd::{Arithmetic, Vector, WIDEST},
};

/// Numbers that are added up or compared together, before the one that is looked for is searched among them.
const BLOCK: usize = 256;
/// Sums that run side by side, for none to wait for another.
const CHAINS: usize = 4;

/// Rows of logits.
#[derive(Clone, Copy, Debug)]
pub struct Logits<E> {
    /// `[count, size]`
    pub numbers: *const E,
    /// Numbers from one row to the next one.
    pub stride: usize,
    /// Rows.
    pub count: usize,
    /// Numbers of a row.
    pub size: usize,
}

/// Rows of logits, of which the largest are looked for: of all tokens, or to be compared with those of other tokens.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<E> {
    /// What is compared.
    pub logits: Logits<E>,
    /// The token of the first column.
    pub first: u32,
    /// `[count]`, for [`likeliest_of`].
    pub candidates: *mut i64,
}

/// Rows of logits that become probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Softmax<E> {
    /// What they are made of.
    pub logits: Logits<E>,
    /// `[count]`, above 0: divides the logits of a row.
    pub temperatures: *const f32,
    /// `[count, size]`, without gaps.
    pub probabilities: *mut f32,
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
unsafe impl<E: Element> Sync for Candidates<E> {}
// SAFETY: as above.
unsafe impl<E: Element> Sync for Softmax<E> {}
// SAFETY: as above.
unsafe impl Sync for Draw {}

impl<E: Element> Logits<E> {
    /// A vector of numbers of a row; where fewer are left, the others are less than any.
    ///
    /// # Safety
    /// The row is one of these, and at least one is left of it.
    #[inline(always)]
    unsafe fn load<V: Vector>(&self, row: usize, at: usize) -> V {
        // SAFETY: the caller's promise.
        let from = unsafe { self.numbers.add(row * self.stride + at) };
        let left = self.size - at;
        if left >= V::LEN {
            // SAFETY: so many are left.
            return unsafe { E::load(from) };
        }
        let mut numbers = [f32::NEG_INFINITY; WIDEST];
        for (at, number) in numbers[..left].iter_mut().enumerate() {
            // SAFETY: so many are left.
            *number = unsafe { from.add(at).read() }.widen();
        }
        // SAFETY: there are as many as in the longest.
        unsafe { V::load(numbers.as_ptr()) }
    }

    /// The largest of some numbers of a row; those that are no numbers do not count.
    ///
    /// # Safety
    /// The row is one of these, and so is the range.
    #[inline(always)]
    unsafe fn largest<V: Arithmetic>(&self, row: usize, range: Range<usize>) -> f32 {
        let mut most = [V::splat(f32::NEG_INFINITY); CHAINS];
        for (step, at) in range.step_by(V::LEN).enumerate() {
            // SAFETY: the caller's promise.
            let numbers = unsafe { self.load::<V>(row, at) };
            most[step % CHAINS] = numbers.max(most[step % CHAINS]);
        }
        most[0].max(most[1]).max(most[2].max(most[3])).largest()
    }

    /// The largest number of a row and its place, the first of equals; not a number where none is, at place 0.
    ///
    /// # Safety
    /// The row is one of these.
    #[inline(always)]
    unsafe fn best<V: Arithmetic>(&self, row: usize) -> (f32, usize) {
        let (mut best, mut chosen) = (f32::NEG_INFINITY, 0);
        for start in (0..self.size).step_by(BLOCK) {
            let end = self.size.min(start + BLOCK);
            // SAFETY: the row is one of these.
            let most = unsafe { self.largest::<V>(row, start..end) };
            if most > best {
                (best, chosen) = (most, start);
            }
        }
        let is_best = |at: &usize| {
            // SAFETY: the row is one of these, and the place is inside it.
            let number = unsafe { self.numbers.add(row * self.stride + at).read() };
            number.widen() >= best
        };
        match (chosen..self.size).find(is_best) {
            Some(place) => (best, place),
            None => (f32::NAN, 0),
        }
    }
}

/// A token and its logit as one number: the largest of several is of the largest logit, and the first of equals.
///
/// The high half is the logit's place among all `f32`, below all where it is no number; the low half counts tokens
/// downwards.
fn candidate(logit: f32, token: u32) -> i64 {
    // Zeros are equal, whatever their sign.
    let bits = (logit + 0.0).to_bits().cast_signed();
    let order = if logit.is_nan() {
        i32::MIN
    } else {
        bits ^ ((bits >> 31) & i32::MAX)
    };
    (i64::from(order) << 32) | i64::from(u32::MAX - token)
}

/// The tokens of some candidates: of each row's best.
///
/// # Panics
/// If there are not as many candidates, at least one, for each token.
pub fn likeliest_of(candidates: &[i64], tokens: &mut [i64]) {
    let each = candidates.len().checked_div(tokens.len()).unwrap_or(1);
    assert_eq!(candidates.len(), each * tokens.len(), "rows of candidates");
    for (token, row) in tokens.iter_mut().zip(candidates.chunks_exact(each)) {
        let best = row.iter().copied().fold(i64::MIN, i64::max);
        *token = i64::from(u32::MAX - best as u32);
    }
}

impl<E: Element> Work for Candidates<E> {
    fn shape(&self) -> (usize, usize) {
        (self.logits.count, self.logits.size)
    }

    #[inline(always)]
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
        // SAFETY: the row is one of these.
        let (logit, place) = unsafe { self.logits.best::<V>(row) };
        let candidate = candidate(logit, self.first + place as u32);
        // SAFETY: as above, and this thread's alone.
        unsafe { *self.candidates.add(row) = candidate };
    }
}

impl<E: Element> Work for Softmax<E> {
    fn shape(&self) -> (usize, usize) {
        (self.logits.count, self.logits.size)
    }

    #[inline(always)]
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
        let size = self.logits.size;
        // SAFETY: the row is one of these, and this thread's alone.
        let (probabilities, temperature, most) = unsafe {
            (
                slice::from_raw_parts_mut(self.probabilities.add(row * size), size),
                *self.temperatures.add(row),
                self.logits.largest::<V>(row, 0..size),
            )
        };
        let (lowered, divisor) = (V::splat(-most), V::splat(temperature));
        let mut sums = [V::splat(0.0); CHAINS];
        for (step, target) in probabilities.chunks_mut(V::LEN).enumerate() {
            // SAFETY: as above; fewer than a vector go through room of their own.
            unsafe {
                let numbers = self.logits.load::<V>(row, step * V::LEN);
                let weights = numbers.add(lowered).div(divisor).exp();
                sums[step % CHAINS] = sums[step % CHAINS].add(weights);
                if target.len() == V::LEN {
                    weights.store(target.as_mut_ptr());
                } else {
                    let mut room = [0.0; WIDEST];
                    weights.store(room.as_mut_ptr());
                    target.copy_from_slice(&room[..target.len()]);
                }
            }
        }
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
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
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
