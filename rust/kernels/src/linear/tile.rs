//! One block: some rows times some panels.
//!
//! The sums of a tile, one to six rows by one to four panels, stay in registers while it runs along a stretch of the
//! inputs. Between stretches they lie in memory as they are, so that a sum has one order however it is cut.

#![expect(
    unsafe_code,
    reason = "reads tensors, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use super::{Block, Call, PANEL, PANELS, ROWS};
use crate::{element::Element, simd::Wide};

/// Inputs of a stretch: a panel's weights for so many stay in the first cache.
const STRETCH: usize = 256;
/// Rows of a tile, at most: with a panel they fill the registers.
const TILE: usize = 6;
/// Numbers of a page: addresses so far apart share a place in the first cache.
const PAGE: usize = 1024;

/// Inputs whose weights are asked for before they are needed, where only one tile needs them.
const AHEAD: usize = 64;
/// Bytes that memory is read in.
const LINE: usize = 64;

/// What a thread needs beside the tensors.
pub(super) struct Scratch {
    /// `[ROWS, PANELS * PANEL]`
    sums: Vec<f32>,
    /// `[ROWS, inputs]`, where the tensor has them in other numbers.
    inputs: Vec<f32>,
    /// Which rows these are: where the tensor has them, how far apart, and how many of which size.
    held: [usize; 4],
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self {
            sums: vec![0.0; ROWS * PANELS * PANEL],
            inputs: Vec::new(),
            held: [0; 4],
        }
    }
}

/// Where a tile begins.
#[derive(Clone, Copy)]
struct Tile<E> {
    /// Of the first row: the stretch's first input.
    input: *const f32,
    input_stride: usize,
    /// Of the first panel: the stretch's first input.
    weights: *const E,
    /// Numbers from one panel to the next.
    panel_stride: usize,
    /// Inputs of the stretch.
    len: usize,
    /// Which of how many tiles of the stretch this is.
    turn: (usize, usize),
}

/// Computes a block.
///
/// # Safety
/// The pointers of `call` are what `Linear::forward` says, and no other thread computes this block.
#[inline(always)]
pub(super) unsafe fn compute<W: Wide, E: Element>(
    call: &Call<'_, E>,
    block: &Block,
    scratch: &mut Scratch,
) {
    let (first, count) = block.rows;
    // SAFETY: the caller's promise: the block's rows are there.
    let (input, input_stride) = unsafe { inputs::<W, E>(call, first, count, scratch) };
    let sums = &mut scratch.sums;
    let width = block.panels.1 * PANEL;
    let bias = &call.layer.bias[block.panels.0 * PANEL..][..width];
    for row in 0..count {
        sums[row * PANELS * PANEL..][..width].copy_from_slice(bias);
    }
    let mut panel = 0;
    while panel < block.panels.1 {
        // Few rows take several panels at a time: there have to be enough sums to wait for none.
        let left = block.panels.1 - panel;
        let together = match count {
            _ if left >= 4 && (W::IS_ONE || count == 1) => 4,
            1..=3 if left >= 2 => 2,
            _ => 1,
        };
        let size = call.layer.inputs;
        for start in (0..size).step_by(STRETCH) {
            let at = (block.panels.0 + panel) * size + start;
            let stretch = Tile {
                // SAFETY: the stretch begins inside each row and inside each panel.
                input: unsafe { input.add(start) },
                input_stride,
                // SAFETY: as above.
                weights: unsafe { call.layer.weights.as_ptr().add(at * PANEL) },
                panel_stride: size * PANEL,
                len: STRETCH.min(size - start),
                turn: (0, count.div_ceil(TILE)),
            };
            // SAFETY: the block's rows and panels are there.
            unsafe { add_stretch::<W, E>(&stretch, count, together, &mut sums[panel * PANEL..]) };
        }
        panel += together;
    }
    // SAFETY: the caller's promise.
    unsafe { store::<W, E>(call, block, sums) };
}

/// Where the block's inputs are as `f32`, and how far apart the rows are.
#[inline(always)]
unsafe fn inputs<W: Wide, E: Element>(
    call: &Call<'_, E>,
    first: usize,
    count: usize,
    scratch: &mut Scratch,
) -> (*const f32, usize) {
    let size = call.layer.inputs;
    // SAFETY: the caller's promise.
    let from = unsafe { call.rows.input.add(first * call.rows.input_stride) };
    let given = call.rows.input_stride;
    // Rows that lie multiples of a page apart push each other out of the first cache.
    let is_crowded = count > 1 && given.is_multiple_of(PAGE);
    if let Some(here) = E::as_floats(from).filter(|_| !is_crowded) {
        return (here, given);
    }
    let stride = size.next_multiple_of(PAGE) + PAGE / 4;
    let (rows, room) = ([from.addr(), given, count, size], &mut scratch.inputs);
    // Nobody writes them during a call, and a thread often has several pieces of the same rows.
    if scratch.held == rows {
        return (room.as_ptr(), stride);
    }
    scratch.held = rows;
    room.resize(count * stride, 0.0);
    for (row, room) in room.chunks_exact_mut(stride).enumerate() {
        // SAFETY: the caller's promise, and a row of the room holds as many.
        unsafe { E::copy_floats::<W>(from.add(row * given), size, room.as_mut_ptr()) };
    }
    (room.as_ptr(), stride)
}

/// Adds a stretch of the inputs to the sums of all rows in some panels, tile by tile.
#[inline(always)]
unsafe fn add_stretch<W: Wide, E: Element>(
    stretch: &Tile<E>,
    rows: usize,
    panels: usize,
    sums: &mut [f32],
) {
    let tiles = stretch.turn.1;
    for tile in 0..tiles {
        let row = rows * tile / tiles;
        let count = rows * (tile + 1) / tiles - row;
        // SAFETY: the tile is inside the block.
        unsafe {
            let at = Tile {
                input: stretch.input.add(row * stretch.input_stride),
                turn: (tile, tiles),
                ..*stretch
            };
            let sums = sums.as_mut_ptr().add(row * PANELS * PANEL);
            if W::IS_ONE && panels == 4 {
                add_broad_tile::<W, E>(&at, count, sums);
                continue;
            }
            match (count, panels) {
                (1, 4) => add_tile::<W, E, 1, 4>(&at, sums),
                (1, 2) => add_tile::<W, E, 1, 2>(&at, sums),
                (2, 2) => add_tile::<W, E, 2, 2>(&at, sums),
                (3, 2) => add_tile::<W, E, 3, 2>(&at, sums),
                (1, _) => add_tile::<W, E, 1, 1>(&at, sums),
                (2, _) => add_tile::<W, E, 2, 1>(&at, sums),
                (3, _) => add_tile::<W, E, 3, 1>(&at, sums),
                (4, _) => add_tile::<W, E, 4, 1>(&at, sums),
                (5, _) => add_tile::<W, E, 5, 1>(&at, sums),
                _ => add_tile::<W, E, 6, 1>(&at, sums),
            }
        }
    }
}

/// Adds a stretch to rows of sums in four panels, where there are registers for so many.
///
/// # Safety
/// As `add_tile`.
#[inline(always)]
unsafe fn add_broad_tile<W: Wide, E: Element>(tile: &Tile<E>, rows: usize, sums: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            1 => add_tile::<W, E, 1, 4>(tile, sums),
            2 => add_tile::<W, E, 2, 4>(tile, sums),
            3 => add_tile::<W, E, 3, 4>(tile, sums),
            4 => add_tile::<W, E, 4, 4>(tile, sums),
            5 => add_tile::<W, E, 5, 4>(tile, sums),
            _ => add_tile::<W, E, 6, 4>(tile, sums),
        }
    }
}

/// Adds a stretch to `M` rows of sums in `P` panels.
///
/// # Safety
/// The rows, the panels and the sums are there, from where the tile begins on.
#[inline(always)]
unsafe fn add_tile<W: Wide, E: Element, const M: usize, const P: usize>(
    tile: &Tile<E>,
    sums: *mut f32,
) {
    let place = |row: usize, panel: usize| (row * PANELS + panel) * PANEL;
    let mut parts = [[W::splat(0.0); P]; M];
    for (row, parts) in parts.iter_mut().enumerate() {
        for (panel, part) in parts.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *part = unsafe { W::load(sums.add(place(row, panel))) };
        }
    }
    // Memory is asked for line by line while the tiles multiply, across the borders of pages, where the processor's own
    // prefetching ends: a little ahead by a tile that is alone, its share of the next stretch by one of several.
    let inputs = const { LINE.div_ceil(PANEL * size_of::<E>()) };
    let (turn, turns) = tile.turn;
    let (mut wait, every) = (turn * inputs, turns * inputs);
    let ahead = if turns == 1 { AHEAD } else { STRETCH };
    for at in 0..tile.len {
        if wait == 0 {
            wait = every;
            for panel in 0..P {
                let next = panel * tile.panel_stride + (at + ahead) * PANEL;
                W::prefetch(tile.weights.wrapping_add(next));
            }
        }
        wait -= 1;
        let mut weights = [W::splat(0.0); P];
        for (panel, weight) in weights.iter_mut().enumerate() {
            let from = panel * tile.panel_stride + at * PANEL;
            // SAFETY: the caller's promise.
            *weight = unsafe { E::load::<W>(tile.weights.add(from)) };
        }
        for (row, parts) in parts.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let input = W::splat(unsafe { *tile.input.add(row * tile.input_stride + at) });
            for (part, weight) in parts.iter_mut().zip(weights) {
                *part = input.mul_add(weight, *part);
            }
        }
    }
    for (row, parts) in parts.into_iter().enumerate() {
        for (panel, part) in parts.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { part.store(sums.add(place(row, panel))) };
        }
    }
}

/// Rounds the sums into the output.
#[inline(always)]
unsafe fn store<W: Wide, E: Element>(call: &Call<'_, E>, block: &Block, sums: &[f32]) {
    let outputs = call.layer.outputs;
    let start = block.panels.0 * PANEL;
    let width = (block.panels.1 * PANEL).min(outputs - start);
    let (first, count) = block.rows;
    for row in 0..count {
        let sums = &sums[row * PANELS * PANEL..][..width];
        let place = (first + row) * outputs + start;
        // SAFETY: inside the output, and this block's alone.
        unsafe { E::copy_rounded::<W>(sums, call.rows.output.add(place)) };
    }
}
