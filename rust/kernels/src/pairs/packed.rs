//! The rows of a call, laid out as tiles: what a block needs of them lies in one piece, whatever their stride was.
//!
//! Rows that are a multiple of 512 numbers apart push each other out of the first cache, and each block of rows is read
//! once for each block of outputs. So they are copied first, once for all threads; but for the few of a decode step, which
//! are read where they are.

#![expect(unsafe_code, reason = "reads tensors")]

use std::{cell::RefCell, ptr};

use super::{DEPTH, FEW, HEIGHT, Line};
use crate::{linear::Rows, pool::share};

/// More bytes than that are copied by all threads: waking others costs more than fewer.
const COPY_ALONE_BYTES: usize = 128 << 10;

/// Memory for the rows of a call at most, where a block of them takes no more: longer calls read the weights several times.
const ROOM_BYTES: usize = 16 << 20;

thread_local! {
    /// Kept between calls: a step makes hundreds.
    static ROOM: RefCell<Room> = const { RefCell::new(Room(Vec::new())) };
}

/// Memory for the rows of a call, as much as the longest call of this thread needed.
pub(super) struct Room(Vec<Line>);

/// How many rows of so many inputs there may be room for: whole blocks.
pub(super) const fn rows_at_most(inputs: usize) -> usize {
    let block_bytes = inputs.div_ceil(DEPTH) * HEIGHT * size_of::<Line>();
    let blocks = ROOM_BYTES / block_bytes;
    if blocks == 0 { HEIGHT } else { blocks * HEIGHT }
}

/// Calls `work` with the room of this thread.
pub(super) fn with_room(work: impl FnOnce(&mut Room)) {
    ROOM.with_borrow_mut(work);
}

/// Rows in blocks of `HEIGHT`.
pub(super) struct Packed {
    start: *const u16,
    pub(super) count: usize,
    /// Numbers from one row of a block to the next.
    pub(super) row_stride: usize,
    /// Numbers from `DEPTH` inputs of a row to its next.
    pub(super) step_stride: usize,
    block_stride: usize,
}

/// What threads that copy rows share.
struct Copying<'a> {
    rows: &'a Rows<u16>,
    inputs: usize,
    /// `[blocks, steps, HEIGHT]`
    lines: *mut Line,
}

// SAFETY: they read the same rows, and each writes the lines of other blocks.
unsafe impl Sync for Copying<'_> {}

impl Copying<'_> {
    /// Copies the rows of a block, in the order in which they lie there: each one after the other.
    ///
    /// # Safety
    /// The rows and the lines are there, and no other thread copies this block.
    unsafe fn copy_block(&self, block: usize) {
        let rows = self.rows;
        let first = block * HEIGHT;
        for row in first..rows.count.min(first + HEIGHT) {
            // SAFETY: the row is one of the call's, and there is a line for each step of it.
            unsafe {
                let from = rows.input.add(row * rows.input_stride);
                let to = first * self.inputs.div_ceil(DEPTH) + row % HEIGHT;
                copy_row(from, self.inputs, self.lines.add(to));
            }
        }
    }
}

impl Packed {
    /// Lays out rows of `inputs` numbers, on up to `threads` threads. What it returns points into the rows or the room.
    ///
    /// # Safety
    /// The rows are there, and stay so while the result is used.
    pub(super) unsafe fn new(
        room: &mut Room,
        rows: &Rows<u16>,
        inputs: usize,
        threads: u32,
    ) -> Self {
        if rows.count <= FEW && inputs.is_multiple_of(DEPTH) {
            return Self {
                start: rows.input,
                count: rows.count,
                row_stride: rows.input_stride,
                step_stride: DEPTH,
                block_stride: HEIGHT * rows.input_stride,
            };
        }
        let steps = inputs.div_ceil(DEPTH);
        let blocks = rows.count.div_ceil(HEIGHT);
        let block_lines = steps * HEIGHT;
        if room.0.len() < blocks * block_lines {
            room.0.resize(blocks * block_lines, Line([0; DEPTH]));
        }
        let copying = Copying {
            rows,
            inputs,
            lines: room.0.as_mut_ptr(),
        };
        let bytes = rows.count * steps * size_of::<Line>();
        let threads = if bytes > COPY_ALONE_BYTES { threads } else { 1 };
        // SAFETY: the caller's promise; the room has lines for all blocks, and each block is copied once.
        let copy = |(): &mut (), block| unsafe { copying.copy_block(block) };
        share(blocks, threads, || (), copy);
        Self {
            start: room.0.as_ptr().cast(),
            count: rows.count,
            row_stride: DEPTH,
            step_stride: HEIGHT * DEPTH,
            block_stride: block_lines * DEPTH,
        }
    }

    /// Where a block's first row begins.
    pub(super) fn block(&self, index: usize) -> *const u16 {
        self.start.wrapping_add(index * self.block_stride)
    }
}

/// Copies a row to every `HEIGHT`th line from `to` on, and zeros behind it.
///
/// # Safety
/// The row has `inputs` numbers, and so many lines are there.
unsafe fn copy_row(from: *const u16, inputs: usize, to: *mut Line) {
    let whole = inputs / DEPTH;
    for step in 0..whole {
        // SAFETY: the caller's promise.
        unsafe {
            let numbers = from.add(step * DEPTH).cast::<[u16; DEPTH]>();
            to.add(step * HEIGHT).write(Line(numbers.read_unaligned()));
        }
    }
    let rest = inputs % DEPTH;
    if rest > 0 {
        let mut line = Line([0; DEPTH]);
        // SAFETY: the caller's promise.
        unsafe {
            ptr::copy_nonoverlapping(from.add(whole * DEPTH), line.0.as_mut_ptr(), rest);
            to.add(whole * HEIGHT).write(line);
        }
    }
}
