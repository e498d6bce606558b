//! Linear layers in bf16 on processors that multiply pairs: `y = x · Wᵀ + b`, for a row or for thousands.
//!
//! Such a processor adds two products of bf16 to an `f32` at a time: sixteen outputs with AVX-512 BF16, tiles of sixteen
//! rows by sixteen outputs with AMX. The weights are laid out once, for both in the same way: panels of 16 outputs, and in
//! each, pair of inputs after pair, the 16 pairs of weights. Two panels and all of their inputs are computed by one
//! thread, for the rows of a call 32 at a time.
//!
//! An output is a sum over the pairs in their order. As in [`linear`](crate::linear), neither the other rows of the step
//! nor the threads change a bit of it. oneDNN's own kernels for such processors do not promise that, and do not do it.

#![expect(unsafe_code, reason = "sees the memory of tensors")]
#![expect(
    clippy::inline_always,
    reason = "becomes part of what is compiled for such a processor"
)]

mod dot;
mod tiles;

use std::{ops::Range, ptr};

use crate::{
    bf16, error::LinearError, linear::Rows, linear::check_shape, pages::Pages, pool::share,
};

/// Outputs of a panel.
const PANEL: usize = 16;
/// Outputs that are computed together.
const WIDTH: usize = 2 * PANEL;
/// Rows that are computed together.
const HEIGHT: usize = 32;
/// What numbers of inputs are filled up to, with zeros: a tile has so many.
const DEPTH: usize = 32;

/// Columns of blocks that rows are laid out for at a time, at most.
const COLUMNS: usize = 4;
/// Numbers: rows so far apart, or a multiple of it, share few places in the first cache.
const CROWDING: usize = 512;
/// So many rows have room there anyway.
const FEW: usize = 8;

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
    /// `[panels, depth / 2, PANEL, 2]`, an even number of panels; zeros where there is no weight.
    weights: Pages<u16>,
    /// `[panels * PANEL]`
    bias: Vec<f32>,
    unit: Unit,
}

/// What a thread needs beside the tensors.
struct Scratch {
    /// `[HEIGHT, WIDTH]`
    sums: Sums,
    /// `[HEIGHT, depth]`, where rows have to be filled up.
    rows: Vec<u16>,
}

/// Sums of a block, at the border of a cache line.
#[repr(align(64))]
struct Sums([[f32; WIDTH]; HEIGHT]);

/// A block to multiply: up to `HEIGHT` rows with two panels.
struct Block {
    /// `[count, depth]`
    rows: *const u16,
    /// Numbers from one row to the next.
    stride: usize,
    count: usize,
    /// Of the first panel; the second lies behind it.
    weights: *const u16,
    /// Inputs, filled up: a multiple of `DEPTH`.
    depth: usize,
}

/// What the threads of one call share.
struct Call<'a> {
    layer: &'a PairLinear,
    rows: Rows<u16>,
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
        let panels = 2 * outputs.div_ceil(WIDTH);
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
        let mut sums = vec![0.0; panels * PANEL];
        if let Some(bias) = bias {
            for (at, sum) in sums[..outputs].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *sum = bf16::widen(unsafe { bias.add(at).read() });
            }
        }
        Ok(Self {
            outputs,
            inputs,
            weights,
            bias: sums,
            unit,
        })
    }

    /// Outputs and inputs.
    pub const fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Computes some rows, on up to `threads` threads.
    ///
    /// # Safety
    /// The addresses are of tensors of the shapes that [`Rows`] says, aligned for their numbers. Until the call returns
    /// nobody writes the inputs, and nobody reads or writes the outputs.
    pub unsafe fn forward(&self, rows: &Rows<u16>, threads: u32) {
        let call = Call {
            layer: self,
            rows: *rows,
        };
        let (columns, down) = (self.outputs.div_ceil(WIDTH), rows.count.div_ceil(HEIGHT));
        // Enough pieces for every thread to have some, few enough that rows are laid out for several columns.
        let pieces = 4 * threads.max(1) as usize;
        let wide = (columns / pieces).clamp(1, COLUMNS);
        let across = columns.div_ceil(wide);
        // Only where columns are few do several threads share one: its weights come from memory, for each of them.
        let parts = pieces.div_ceil(across).min(down);
        let begin = || Scratch {
            sums: Sums([[0.0; WIDTH]; HEIGHT]),
            rows: Vec::new(),
        };
        share(across * parts, threads, begin, |scratch, index| {
            let (column, part) = (index / parts * wide, index % parts);
            let columns = column..columns.min(column + wide);
            for block in down * part / parts..down * (part + 1) / parts {
                let first = block * HEIGHT;
                let count = HEIGHT.min(call.rows.count - first);
                // SAFETY: the processor has the unit; the caller's promise; and each block is computed once.
                unsafe { call.compute((first, count), columns.clone(), scratch) }
            }
        });
    }
}

impl Call<'_> {
    /// Computes some rows of the columns.
    ///
    /// # Safety
    /// As `PairLinear::forward`, and no other thread computes this block.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx512f,avx512bf16"))]
    unsafe fn compute(&self, rows: (usize, usize), columns: Range<usize>, scratch: &mut Scratch) {
        let layer = self.layer;
        let depth = layer.inputs.next_multiple_of(DEPTH);
        // SAFETY: the rows are the call's.
        let (from, stride) = unsafe { self.laid_out(rows, &mut scratch.rows) };
        let sums = &mut scratch.sums.0;
        for column in columns {
            let block = Block {
                rows: from,
                stride,
                count: rows.1,
                // SAFETY: the layer has an even number of panels.
                weights: unsafe { layer.weights.as_ptr().add(column * WIDTH * depth) },
                depth,
            };
            // SAFETY: the processor has the unit; rows and weights are there.
            unsafe {
                match layer.unit.0 {
                    Kind::Dot => dot::multiply(&block, sums),
                    Kind::Tiles => tiles::multiply(&block, sums),
                }
                self.store(rows, column, sums);
            }
        }
    }

    /// Where rows begin that have `depth` numbers, and how far apart they are: here, or in `room`, with zeros behind.
    #[inline(always)]
    unsafe fn laid_out(
        &self,
        (first, count): (usize, usize),
        room: &mut Vec<u16>,
    ) -> (*const u16, usize) {
        let (size, given) = (self.layer.inputs, self.rows.input_stride);
        // SAFETY: the caller's promise.
        let from = unsafe { self.rows.input.add(first * given) };
        // Rows that lie a multiple of this apart push each other out of the first cache.
        let is_crowded = count > FEW && given.is_multiple_of(CROWDING);
        if size.is_multiple_of(DEPTH) && !is_crowded {
            return (from, given);
        }
        let stride = size.next_multiple_of(CROWDING) + DEPTH;
        room.resize(HEIGHT * stride, 0);
        for (row, target) in room.chunks_exact_mut(stride).take(count).enumerate() {
            // SAFETY: the caller's promise, and a row of the room is longer.
            unsafe { ptr::copy_nonoverlapping(from.add(row * given), target.as_mut_ptr(), size) };
        }
        (room.as_ptr(), stride)
    }

    /// Adds the bias to the sums of a block and rounds them into the output.
    #[inline(always)]
    unsafe fn store(
        &self,
        (first, count): (usize, usize),
        column: usize,
        sums: &[[f32; WIDTH]; HEIGHT],
    ) {
        let outputs = self.layer.outputs;
        let start = column * WIDTH;
        let bias = &self.layer.bias[start..][..WIDTH];
        for (row, sums) in sums[..count].iter().enumerate() {
            let mut numbers = [0_u16; WIDTH];
            for ((number, sum), bias) in numbers.iter_mut().zip(sums).zip(bias) {
                *number = bf16::narrow(sum + bias);
            }
            let place = (first + row) * outputs + start;
            let width = WIDTH.min(outputs - start);
            // SAFETY: inside the output, and this block's alone.
            unsafe {
                let to = self.rows.output.add(place);
                ptr::copy_nonoverlapping(numbers.as_ptr(), to, width);
            }
        }
    }
}
