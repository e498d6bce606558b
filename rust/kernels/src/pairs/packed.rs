//! The rows of a call, laid out as tiles: what a block needs of them lies in one piece, whatever their stride was.
//!
//! Rows that are a multiple of 512 numbers apart push each other out of the first cache, and each block of rows is read
//! once for each block of outputs. So they are copied first, once for all threads; but for the few of a decode step, which
//! are read where they are.

#![expect(unsafe_code, reason = "reads tensors")]

use std::{cell::RefCell, ptr};

use super::{DEPTH, FEW, HEIGHT, Line};
use crate::{linear::Rows, pool::share_all};

/// More bytes than that are copied by all threads: waking others costs more than fewer.
const COPY_ALONE_BYTES: usize = 128 << 10;

/// Memory for the rows of a call at most, where a block of them takes no more: longer calls read the weights several times.
const ROOM_BYTES: usize = 16 << 20;

thread_local! {
    /// Kept between calls: a step makes hundreds.
    static ROOM: RefCell<Lines> = const { RefCell::new(Lines(Vec::new())) };
}

/// Memory for the rows of a call, as much as the longest call of this thread needed.
#[derive(Default)]
pub(crate) struct Lines(Vec<Line>);

impl Lines {
    /// So many lines, of whatever numbers.
    pub(crate) fn take(&mut self, count: usize) -> *mut Line {
        if self.0.len() < count {
            self.0.resize(count, Line::default());
        }
        self.0.as_mut_ptr()
    }
}

/// How many rows of so many inputs there may be room for: whole blocks.
pub(super) const fn rows_at_most(inputs: usize) -> usize {
    let block_bytes = inputs.div_ceil(DEPTH) * HEIGHT * size_of::<Line>();
    let blocks = ROOM_BYTES / block_bytes;
    if blocks == 0 { HEIGHT } else { blocks * HEIGHT }
}

/// Calls `work` with the room of this thread.
pub(super) fn with_room(work: impl FnOnce(&mut Lines)) {
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

/// Rows that are copied.
struct Copying {
    rows: Rows<u16>,
    inputs: usize,
    /// `[blocks, steps, HEIGHT]`
    lines: *mut Line,
}

// SAFETY: threads read the same rows, and each writes the lines of other blocks.
unsafe impl Sync for Copying {}

impl Copying {
    const fn blocks(&self) -> usize {
        self.rows.count.div_ceil(HEIGHT)
    }

    /// Lines of a block.
    const fn block_lines(&self) -> usize {
        self.inputs.div_ceil(DEPTH) * HEIGHT
    }

    const fn packed(&self) -> Packed {
        Packed {
            start: self.lines.cast(),
            count: self.rows.count,
            row_stride: DEPTH,
            step_stride: HEIGHT * DEPTH,
            block_stride: self.block_lines() * DEPTH,
        }
    }

    /// Copies the rows of a block, in the order in which they lie there: each one after the other.
    ///
    /// # Safety
    /// The rows and the lines are there, and no other thread copies this block.
    unsafe fn copy_block(&self, block: usize) {
        let rows = &self.rows;
        let first = block * HEIGHT;
        for row in first..rows.count.min(first + HEIGHT) {
            // SAFETY: the row is one of the call's, and there is a line for each step of it.
            unsafe {
                let from = rows.input.add(row * rows.input_stride);
                let to = block * self.block_lines() + row % HEIGHT;
                copy_row(from, self.inputs, self.lines.add(to));
            }
        }
    }
}

/// Lays out the rows of several calls, each with so many inputs, on up to `threads` threads. What it returns points into
/// the rows or the room.
///
/// # Safety
/// The rows are there, and stay so while the result is used.
pub(super) unsafe fn lay_out(
    room: &mut Lines,
    calls: impl Iterator<Item = (Rows<u16>, usize)> + Clone,
    threads: u32,
) -> Vec<Packed> {
    let needed = calls.clone().map(|(rows, inputs)| lines_for(&rows, inputs));
    let mut free = room.take(needed.sum());
    let mut copies = Vec::new();
    let packed = calls.map(|(rows, inputs)| match lines_for(&rows, inputs) {
        0 => Packed::in_place(&rows),
        lines => {
            let copying = Copying {
                rows,
                inputs,
                lines: free,
            };
            free = free.wrapping_add(lines);
            let packed = copying.packed();
            copies.push(copying);
            packed
        }
    });
    let packed = packed.collect();
    // SAFETY: the caller's promise; the room has lines for all blocks.
    unsafe { copy_all(&copies, threads) };
    packed
}

/// # Safety
/// Rows and lines are there.
unsafe fn copy_all(copies: &[Copying], threads: u32) {
    let bytes_of = |copying: &Copying| copying.rows.count * copying.inputs * size_of::<u16>();
    let bytes: usize = copies.iter().map(bytes_of).sum();
    let threads = if bytes > COPY_ALONE_BYTES { threads } else { 1 };
    let blocks = copies.iter().map(Copying::blocks);
    // SAFETY: the caller's promise, and each block is copied once.
    let copy = |(): &mut (), (at, block): (usize, usize)| unsafe { copies[at].copy_block(block) };
    share_all(blocks, threads, || (), copy);
}

/// Lines that rows of so many inputs are copied to; none where they are read where they lie.
const fn lines_for(rows: &Rows<u16>, inputs: usize) -> usize {
    if rows.count <= FEW && inputs.is_multiple_of(DEPTH) {
        return 0;
    }
    rows.count.div_ceil(HEIGHT) * inputs.div_ceil(DEPTH) * HEIGHT
}

impl Packed {
    const fn in_place(rows: &Rows<u16>) -> Self {
        Self {
            start: rows.input,
            count: rows.count,
            row_stride: rows.input_stride,
            step_stride: DEPTH,
            block_stride: HEIGHT * rows.input_stride,
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
