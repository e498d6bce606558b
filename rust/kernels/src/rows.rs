//! What a layer does to each row by itself: norms, gates, rotations; and what the sampler does: softmax, draws.
//!
//! Torch makes several passes over the rows for each of these, and each pass is a call, which for the few rows of a
//! decode step costs more than the numbers do. Here each is one pass. A row's result depends on that row alone, to the
//! bit.

#![expect(unsafe_code, reason = "sees the memory of tensors")]

mod draws;
mod each;

pub use self::draws::{Candidates, Draw, Logits, Softmax, likeliest_of};

use crate::{
    element::Element,
    pool::share,
    simd::{Kind, Portable, Processor},
};

/// Numbers that one thread takes at a time. Fewer in all are left to the caller: waking others costs more.
const SHARE: usize = 8 << 10;

/// Rows to normalise, in groups: the heads of a token, or one row by itself.
#[derive(Clone, Copy, Debug)]
pub struct Norm<E> {
    /// `[count, groups, size]`, the groups without gaps. With an addend it receives the sum.
    pub input: *mut E,
    /// Numbers from one token's rows to the next one's.
    pub input_stride: usize,
    /// `[count, groups, size]`, without gaps: is added to the input first, and the sum rounded.
    pub addend: Option<*const E>,
    /// `[groups, size]`
    pub weight: *const f32,
    /// `[count, groups, size]`, the groups without gaps; may be the input.
    pub output: *mut E,
    /// Numbers from one token's rows to the next one's.
    pub output_stride: usize,
    /// Tokens.
    pub count: usize,
    /// Rows of a token.
    pub groups: usize,
    /// Numbers of a row.
    pub size: usize,
    /// Added to the mean of the squares.
    pub epsilon: f32,
}

/// What bends the gates of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`
    GeluTanh,
}

/// Rows whose first half gates the second.
#[derive(Clone, Copy, Debug)]
pub struct Gate<E> {
    /// `[count, 2 * size]`, without gaps.
    pub input: *const E,
    /// `[count, size]`, without gaps.
    pub output: *mut E,
    /// Rows.
    pub count: usize,
    /// Numbers of an output row.
    pub size: usize,
    /// Of the first half.
    pub activation: Activation,
}

/// Rows of heads to rotate in place.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<E> {
    /// `[count, heads, size]`, the heads without gaps; neighbours are pairs.
    pub heads: *mut E,
    /// Numbers from one row's first head to the next one's.
    pub stride: usize,
    /// `[count, size / 2, 2]`: what each pair, as a complex number, is multiplied by.
    pub angles: *const f32,
    /// Rows.
    pub count: usize,
    /// Heads of a row.
    pub num_heads: usize,
    /// Numbers of a head.
    pub size: usize,
}

/// Rows to which others are added.
#[derive(Clone, Copy, Debug)]
pub struct Sum<E> {
    /// `[count, size]`, without gaps.
    pub target: *mut E,
    /// `[count, size]`, without gaps; other memory.
    pub addend: *const E,
    /// Rows.
    pub count: usize,
    /// Numbers of a row.
    pub size: usize,
}

/// Rows to copy out of a table.
#[derive(Clone, Copy, Debug)]
pub struct LookUp<E> {
    /// `[height, size]`, without gaps.
    pub table: *const E,
    /// Rows of the table.
    pub height: usize,
    /// `[count]`: which rows, counted from `first` on. Those that are not in the table become zeros.
    pub places: *const i64,
    /// The place of the table's first row.
    pub first: i64,
    /// Multiplies what is copied.
    pub scale: Option<f32>,
    /// `[count, size]`, without gaps.
    pub output: *mut E,
    /// Rows to copy.
    pub count: usize,
    /// Numbers of a row.
    pub size: usize,
}

/// Rows to add up, some for each token, each multiplied.
#[derive(Clone, Copy, Debug)]
pub struct Mix<E> {
    /// `[_, size]`, without gaps.
    pub rows: *const E,
    /// `[count, picks]`: which rows, or [`NOWHERE`].
    pub places: *const u32,
    /// `[count, picks]`: what multiplies each.
    pub weights: *const f32,
    /// `[count, size]`, without gaps; other memory.
    pub output: *mut E,
    /// Tokens.
    pub count: usize,
    /// Rows of a token.
    pub picks: usize,
    /// Numbers of a row.
    pub size: usize,
}

/// A row that is not there.
pub const NOWHERE: u32 = u32::MAX;

/// Something done to one row at a time.
///
/// # Safety
/// Of `row`: it is one of the rows, and no other thread has it.
trait Work: Sync {
    /// How many, and numbers of each.
    fn shape(&self) -> (usize, usize);
    /// Computes one, with vectors of this kind.
    unsafe fn row<V: crate::simd::Arithmetic>(&self, row: usize);
}

macro_rules! shared_by_threads {
    ($($name:ident),*) => { $(
        // SAFETY: threads read the same weights, and each reads and writes rows that no other has.
        unsafe impl<E: Element> Sync for $name<E> {}
    )* };
}
shared_by_threads!(Norm, Gate, Rotation, Sum, LookUp, Mix);

/// Normalises: `y = x / sqrt(mean(x^2) + epsilon) * weight` (Zhang and Sennrich, 2019), sums and weight in `f32`.
///
/// # Safety
/// The addresses are of tensors of the shapes that [`Norm`] says, aligned for their numbers, which nobody else touches
/// until the call returns; the weight may be read.
pub unsafe fn rms_norm<E: Element>(norm: &Norm<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(norm, threads) }
}

/// Multiplies the second half of each row by its bent first half, in `f32`.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Gate`].
pub unsafe fn gate<E: Element>(gate: &Gate<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(gate, threads) }
}

/// Rotates pairs, in `f32`.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Rotation`].
pub unsafe fn rotate<E: Element>(rotation: &Rotation<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(rotation, threads) }
}

/// Adds, in `f32`, and rounds.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Sum`].
pub unsafe fn add<E: Element>(sum: &Sum<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(sum, threads) }
}

/// Copies rows out of a table, multiplied in `f32` and rounded where there is a scale.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`LookUp`].
pub unsafe fn look_up<E: Element>(look_up: &LookUp<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(look_up, threads) }
}

/// Adds up each token's rows in their order, multiplied in `f32` and rounded once.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Mix`].
pub unsafe fn mix<E: Element>(mix: &Mix<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(mix, threads) }
}

/// Finds the largest number of each row, the first of equals, for [`likeliest_of`]; one that is NaN only where no other is
/// a number above negative infinity.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Candidates`].
pub unsafe fn candidates<E: Element>(candidates: &Candidates<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(candidates, threads) }
}

/// Divides rows by their temperatures and makes probabilities of them, in `f32`.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Softmax`].
pub unsafe fn softmax<E: Element>(softmax: &Softmax<E>, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(softmax, threads) }
}

/// Draws from each row the first token with which the sum of probabilities passes its number's share of the total, in
/// `f64`; never one of probability 0, but where all are, or are no numbers: then some token.
///
/// # Safety
/// As [`rms_norm`], with the shapes of [`Draw`].
pub unsafe fn draw(draw: &Draw, threads: u32) {
    // SAFETY: the caller's promise.
    unsafe { run(draw, threads) }
}

/// # Safety
/// The tensors are as the kind of work wants them.
unsafe fn run<W: Work>(work: &W, threads: u32) {
    let (count, size) = work.shape();
    let together = (SHARE / size.max(1)).max(1);
    let parts = count.div_ceil(together);
    let processor = Processor::here();
    share(
        parts,
        threads,
        || (),
        |(), part| {
            let rows = part * together..count.min((part + 1) * together);
            // SAFETY: the processor is of that kind; each row is computed once.
            unsafe {
                match processor.kind() {
                    #[cfg(target_arch = "x86_64")]
                    Kind::Avx512 => rows_avx512(work, rows),
                    #[cfg(target_arch = "x86_64")]
                    Kind::Avx2 => rows_avx2(work, rows),
                    Kind::Portable => rows.for_each(|row| work.row::<Portable>(row)),
                }
            }
        },
    );
}

/// # Safety
/// As `Work::row`, on a processor with AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn rows_avx512<W: Work>(work: &W, rows: std::ops::Range<usize>) {
    for row in rows {
        // SAFETY: the caller's promise.
        unsafe { work.row::<crate::simd::Avx512>(row) };
    }
}

/// # Safety
/// As `Work::row`, on a processor with AVX2 and fused multiply-add.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2<W: Work>(work: &W, rows: std::ops::Range<usize>) {
    for row in rows {
        // SAFETY: the caller's promise.
        unsafe { work.row::<crate::simd::Avx2>(row) };
    }
}
