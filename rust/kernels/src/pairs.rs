//! Linear layers in bf16 on processors that multiply pairs: `y = x · Wᵀ + b`, for a row or for thousands.
//!
//! Such a processor adds two products of bf16 to an `f32` at a time: sixteen outputs with AVX-512 BF16, tiles of sixteen
//! rows by sixteen outputs with AMX. The weights are laid out once, for both in the same way: panels of 16 outputs, and in
//! each, pair of inputs after pair, the 16 pairs of weights. A thread takes some panels at a time, for the rows of a call
//! 32 after 32, and of these as many inputs at a time as the first cache has room for with two panels.
//!
//! An output is a sum over the pairs in their order. As in [`linear`](crate::linear), neither the other rows of the step
//! nor the threads change a bit of it. oneDNN's own kernels for such processors do not promise that, and do not do it.

#![expect(unsafe_code, reason = "sees the memory of tensors")]

mod dot;
mod packed;
pub(crate) mod tiles;

use std::{ops::Range, ptr};

pub(crate) use self::packed::Lines;
use self::packed::Packed;
use crate::{
    bf16,
    error::LinearError,
    linear::{Cut, Rows, Together, check_shape},
    pages::Pages,
    pool::share_all,
};

/// Outputs of a panel.
pub(crate) const PANEL: usize = 16;
/// Panels that a thread takes at a time. Read side by side, they come from memory a third faster than one after the other.
const PANELS: usize = 4;
/// Outputs that a thread takes at a time.
const WIDTH: usize = PANELS * PANEL;
/// Rows that are computed together.
pub(crate) const HEIGHT: usize = 32;
/// What numbers of inputs are filled up to, with zeros: a tile has so many.
pub(crate) const DEPTH: usize = 32;
/// So many rows are no more than a tile, and read where they are.
const FEW: usize = 16;
/// Inputs, in `DEPTH`s, of which two panels fit the first cache.
const STRETCH: usize = 16;
/// Times `PANELS` that a thread takes at a time, at most: its rows are read once for all of them.
const WIDE: usize = 4;

/// What multiplies: this processor has it, for there is no other way to have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// AVX-512 BF16.
    Dot,
    /// AMX BF16.
    Tiles,
}

impl Unit {
    /// All that this processor has, the fastest last. Where AMX is among them, the process asks the kernel for it.
    #[must_use]
    pub fn all_here() -> Vec<Self> {
        let mut all = Vec::new();
        if dot::is_here() {
            all.push(Self(Kind::Dot));
            if tiles::is_here() {
                all.push(Self(Kind::Tiles));
            }
        }
        all
    }

    /// The fastest that this processor has.
    #[must_use]
    pub fn here() -> Option<Self> {
        Self::all_here().pop()
    }
}

/// A linear layer in bf16, its weights laid out in pairs.
pub struct PairLinear {
    outputs: usize,
    inputs: usize,
    /// `[panels, depth / 2, PANEL, 2]`, a multiple of `PANELS` panels; zeros where there is no weight.
    weights: Pages<u16>,
    /// `[panels * PANEL]`, where there is one.
    bias: Option<Vec<f32>>,
    unit: Unit,
}

/// What a thread needs beside the tensors.
struct Scratch {
    /// `[HEIGHT, PANELS]`
    sums: [PanelSums; HEIGHT * PANELS],
    tiles: tiles::Tiles,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            sums: [PanelSums([0.0; PANEL]); HEIGHT * PANELS],
            tiles: tiles::Tiles::default(),
        }
    }
}

/// `DEPTH` numbers: a cache line, and a tile's row.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(crate) struct Line(pub(crate) [u16; DEPTH]);

/// Sums of a row with a panel: a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct PanelSums(pub(crate) [f32; PANEL]);

/// A block to multiply: up to `HEIGHT` rows with some panels.
pub(crate) struct Block {
    /// The first row's first numbers.
    pub(crate) rows: *const u16,
    /// Those of the row after the first half of `HEIGHT`.
    pub(crate) lower_rows: *const u16,
    /// Numbers from one row to the next.
    pub(crate) row_stride: usize,
    /// Numbers from `DEPTH` inputs of a row to its next.
    pub(crate) step_stride: usize,
    pub(crate) count: usize,
    /// Of the first panel.
    pub(crate) weights: *const u16,
    /// Numbers from one panel to the next.
    pub(crate) panel_stride: usize,
    /// Two, or where rows are few, `PANELS`.
    pub(crate) panels: usize,
    pub(crate) source: tiles::Source,
    pub(crate) begin: tiles::Begin,
    /// Inputs to multiply, in `DEPTH`s.
    pub(crate) steps: usize,
    /// Of the first row with the first panel, which the products are added to; those with the other panels follow.
    pub(crate) sums: *mut PanelSums,
    /// From one row's to the next one's.
    pub(crate) sums_stride: usize,
}

/// What the threads of one call share.
struct Call<'a> {
    layer: &'a PairLinear,
    cut: Cut,
    rows: Packed,
    output: *mut u16,
}

// SAFETY: threads read the same inputs and weights, and each writes its own blocks of the output.
unsafe impl Sync for Call<'_> {}

impl PairLinear {
    /// Copies the weights.
    ///
    /// # Safety
    /// `weight` is the address of `outputs * inputs` bf16, output after output, and `bias` of `outputs`; nobody writes
    /// them before this returns.
    pub unsafe fn new(
        unit: Unit,
        (outputs, inputs): (usize, usize),
        weight: *const u16,
        bias: Option<*const u16>,
    ) -> Result<Self, LinearError> {
        check_shape(outputs, inputs)?;
        let panels = PANELS * outputs.div_ceil(WIDTH);
        let depth = inputs.next_multiple_of(DEPTH);
        let mut weights = Pages::zeroed(panels * depth * PANEL)?;
        for (panel, target) in weights
            .as_mut_slice()
            .chunks_exact_mut(depth * PANEL)
            .enumerate()
        {
            for column in 0..PANEL.min(outputs.saturating_sub(panel * PANEL)) {
                for input in 0..inputs {
                    let from = (panel * PANEL + column) * inputs + input;
                    let to = (input / 2 * PANEL + column) * 2 + input % 2;
                    // SAFETY: the caller's promise.
                    target[to] = unsafe { weight.add(from).read() };
                }
            }
        }
        let bias = bias.map(|bias| {
            let mut sums = vec![0.0; panels * PANEL];
            for (at, sum) in sums[..outputs].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *sum = bf16::widen(unsafe { bias.add(at).read() });
            }
            sums
        });
        Ok(Self {
            outputs,
            inputs,
            weights,
            bias,
            unit,
        })
    }

    /// Computes some rows, on up to `threads` threads.
    ///
    /// # Safety
    /// The addresses are of tensors of the shapes that [`Rows`] says, aligned for their numbers. Until the call returns
    /// nobody writes the inputs, and nobody reads or writes the outputs.
    pub unsafe fn forward(&self, rows: &Rows<u16>, threads: u32) {
        let most = packed::rows_at_most(self.inputs);
        for first in (0..rows.count).step_by(most) {
            // SAFETY: the caller's promise: these are some of its rows.
            unsafe {
                let some = Rows {
                    input: rows.input.add(first * rows.input_stride),
                    output: rows.output.add(first * self.outputs),
                    count: most.min(rows.count - first),
                    ..*rows
                };
                Self::forward_together(&[(self, some)], threads);
            }
        }
    }
}

impl Together for PairLinear {
    type Number = u16;

    fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    unsafe fn forward_together(calls: &[(&Self, Rows<u16>)], threads: u32) {
        packed::with_room(|room| {
            let rows = calls.iter().map(|(layer, rows)| (*rows, layer.inputs));
            // SAFETY: the caller's promise.
            let packed = unsafe { packed::lay_out(room, rows, threads) };
            let calls: Vec<_> = calls
                .iter()
                .zip(packed)
                .map(|((layer, rows), packed)| Call {
                    cut: Cut::new(
                        layer.outputs.div_ceil(WIDTH),
                        rows.count.div_ceil(HEIGHT),
                        WIDE,
                        threads,
                    ),
                    layer,
                    rows: packed,
                    output: rows.output,
                })
                .collect();
            let counts = calls.iter().map(|call| call.cut.count());
            share_all(counts, threads, Scratch::default, |scratch, (at, piece)| {
                let (columns, blocks) = calls[at].cut.piece(piece);
                for block in blocks {
                    for column in columns.clone() {
                        // SAFETY: the processor has the unit; the caller's promise; and each block is computed once.
                        unsafe { calls[at].compute(block, column, scratch) }
                    }
                }
            });
        });
    }
}

impl Call<'_> {
    /// Computes a block.
    ///
    /// # Safety
    /// As `PairLinear::forward`, and no other thread computes this block.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx512f,avx512bf16"))]
    unsafe fn compute(&self, row: usize, column: usize, scratch: &mut Scratch) {
        let steps = self.layer.inputs.div_ceil(DEPTH);
        // Where a tile holds all rows, their weights come from memory, and best from many places at once.
        let (panels, stretch) = match self.rows.count {
            0..=FEW => (PANELS, steps),
            _ => (2, STRETCH),
        };
        let sums = &mut scratch.sums;
        // Which only tiles of two panels can.
        let begins_with_zeros =
            self.layer.bias.is_none() && panels == 2 && self.layer.unit.0 == Kind::Tiles;
        if !begins_with_zeros {
            let count = HEIGHT.min(self.rows.count - row * HEIGHT);
            self.begin(column, &mut sums[..count * PANELS]);
        }
        for first in (0..steps).step_by(stretch) {
            let steps = first..steps.min(first + stretch);
            for panel in (0..PANELS).step_by(panels) {
                let panels = column * PANELS + panel..column * PANELS + panel + panels;
                let mut block = self.block(row, panels, steps.clone(), &mut sums[panel..]);
                if begins_with_zeros && first == 0 {
                    block.begin = tiles::Begin::Zeros;
                }
                // SAFETY: the processor has the unit; rows and weights are there.
                unsafe {
                    match self.layer.unit.0 {
                        Kind::Dot => dot::multiply(&block),
                        Kind::Tiles => scratch.tiles.multiply(&block),
                    }
                }
            }
        }
        // SAFETY: the processor has the unit; and no other thread computes this block.
        unsafe { self.store(row * HEIGHT, column * WIDTH, sums) };
    }

    /// What the sums of some rows with a thread's panels begin with.
    fn begin(&self, column: usize, sums: &mut [PanelSums]) {
        let Some(bias) = &self.layer.bias else {
            sums.fill(PanelSums([0.0; PANEL]));
            return;
        };
        let bias = bias[column * WIDTH..][..WIDTH].as_chunks().0;
        for sums in sums.chunks_exact_mut(PANELS) {
            for (sums, bias) in sums.iter_mut().zip(bias) {
                sums.0 = *bias;
            }
        }
    }

    /// Some inputs of a block of rows, to multiply with some panels.
    fn block(
        &self,
        index: usize,
        panels: Range<usize>,
        steps: Range<usize>,
        sums: &mut [PanelSums],
    ) -> Block {
        let panel_stride = self.layer.inputs.next_multiple_of(DEPTH) * PANEL;
        let place = panels.start * panel_stride + steps.start * DEPTH * PANEL;
        let rows = &self.rows;
        let start = rows
            .block(index)
            .wrapping_add(steps.start * rows.step_stride);
        Block {
            rows: start,
            lower_rows: start.wrapping_add(HEIGHT / 2 * rows.row_stride),
            row_stride: rows.row_stride,
            step_stride: rows.step_stride,
            count: HEIGHT.min(rows.count - index * HEIGHT),
            weights: self.layer.weights.as_ptr().wrapping_add(place),
            panel_stride,
            panels: panels.len(),
            source: tiles::Source::Memory,
            begin: tiles::Begin::Sums,
            steps: steps.len(),
            sums: sums.as_mut_ptr(),
            sums_stride: PANELS,
        }
    }

    /// Rounds the sums of a block into the output.
    ///
    /// # Safety
    /// The processor has the unit, and no other thread computes this block.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn store(&self, first: usize, start: usize, sums: &[PanelSums]) {
        use std::arch::x86_64::{
            __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_storeu_si512,
        };

        let outputs = self.layer.outputs;
        let width = WIDTH.min(outputs - start);
        let mut part = [0; WIDTH];
        for (row, sums) in (first..self.rows.count).zip(sums.chunks_exact(PANELS)) {
            // SAFETY: inside the output, and this block's alone; what does not fit there goes through `part`.
            unsafe {
                let place = self.output.add(row * outputs + start);
                let to = if width == WIDTH {
                    place
                } else {
                    part.as_mut_ptr()
                };
                for at in (0..PANELS).step_by(2) {
                    let low = _mm512_loadu_ps(sums[at].0.as_ptr());
                    let high = _mm512_loadu_ps(sums[at + 1].0.as_ptr());
                    let rounded = _mm512_cvtne2ps_pbh(high, low);
                    let bits = std::mem::transmute::<__m512bh, __m512i>(rounded);
                    _mm512_storeu_si512(to.add(at * PANEL).cast(), bits);
                }
                if width < WIDTH {
                    ptr::copy_nonoverlapping(part.as_ptr(), place, width);
                }
            }
        }
    }

    /// There is no such processor.
    #[cfg(not(target_arch = "x86_64"))]
    unsafe fn store(&self, _first: usize, _start: usize, _sums: &[PanelSums]) {}
}
