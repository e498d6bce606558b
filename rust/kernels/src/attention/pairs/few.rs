//! The products of one panel of rows, which is what a decode has: tiles as small as its rows.

#![expect(
    unsafe_code,
    reason = "reads tensors, by instructions that only some processors have"
)]

use std::arch::asm;

use super::{CHUNK, Chunk, DEPTH, GROUP, GROUPS, PANEL, Scratch};
use crate::pairs::tiles::Shapes;

/// Bytes from one line of the scratch to the next.
const LINE_BYTES: usize = 64;

/// 0 and 1 are scores, 2 queries, 3 keys or values; 4 and 5 sums, 6 and 7 weights.
fn shapes(rows: usize) -> Shapes {
    let narrow = (GROUP as u8, 4 * rows as u8);
    let low = (rows as u8, LINE_BYTES as u8);
    let whole = (GROUP as u8, LINE_BYTES as u8);
    [narrow, narrow, narrow, whole, low, low, low, low]
}

/// Multiplies a chunk's keys with the queries of up to a panel of rows.
///
/// # Safety
/// The processor has tiles, `keys` are the chunk's, and the scratch is for heads of this size.
pub(super) unsafe fn score(
    chunk: &Chunk,
    keys: [*const u16; GROUPS],
    (rows, size): (usize, usize),
    scratch: &mut Scratch,
) {
    for first in (0..chunk.groups()).step_by(2) {
        // SAFETY: the caller's promise: keys are `size` numbers apart, queries a line for each two of them; a line of scores
        // is of two panels.
        unsafe {
            scratch.tiles.configure(shapes(rows));
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm2, [{queries} + {line}]",
                "tileloadd tmm3, [{keys} + {stride}]",
                "tdpbf16ps tmm0, tmm3, tmm2",
                "tileloadd tmm3, [{lower} + {stride}]",
                "tdpbf16ps tmm1, tmm3, tmm2",
                "add {keys}, 64",
                "add {lower}, 64",
                "add {queries}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{scores} + {scores_line}], tmm0",
                "tilestored [{scores_low} + {scores_line}], tmm1",
                keys = inout(reg) keys[first] => _,
                lower = inout(reg) keys[first + 1] => _,
                queries = inout(reg) scratch.queries.as_ptr() => _,
                steps = inout(reg) size / DEPTH => _,
                line = in(reg) LINE_BYTES,
                stride = in(reg) 2 * size,
                scores = in(reg) scratch.scores[first * 2 * GROUP..].as_mut_ptr(),
                scores_low = in(reg) scratch.scores[(first + 1) * 2 * GROUP..].as_mut_ptr(),
                scores_line = in(reg) 2 * LINE_BYTES,
                options(nostack),
            );
        }
    }
}

/// Adds a chunk's values, times their weights, to the sums of the rows.
///
/// # Safety
/// As [`score`].
pub(super) unsafe fn add_values((rows, size): (usize, usize), scratch: &mut Scratch) {
    // SAFETY: the caller's promise: a panel of values has a line for every two tokens, and a row has sums of all panels.
    unsafe {
        scratch.tiles.configure(shapes(rows));
        asm!(
            "tileloadd tmm6, [{weights} + {weights_line}]",
            "tileloadd tmm7, [{weights} + {weights_line} + 64]",
            "2:",
            "tileloadd tmm4, [{sums} + {stride}]",
            "tileloadd tmm3, [{values} + {line}]",
            "tdpbf16ps tmm4, tmm6, tmm3",
            "tileloadd tmm5, [{sums} + {stride} + 64]",
            "tileloadd tmm3, [{next} + {line}]",
            "tdpbf16ps tmm5, tmm6, tmm3",
            "tileloadd tmm3, [{values} + {line} + 1024]",
            "tdpbf16ps tmm4, tmm7, tmm3",
            "tileloadd tmm3, [{next} + {line} + 1024]",
            "tdpbf16ps tmm5, tmm7, tmm3",
            "tilestored [{sums} + {stride}], tmm4",
            "tilestored [{sums} + {stride} + 64], tmm5",
            "add {sums}, 128",
            "add {values}, 4096",
            "add {next}, 4096",
            "dec {parts}",
            "jnz 2b",
            weights = in(reg) scratch.weights.as_ptr(),
            weights_line = in(reg) 2 * CHUNK,
            values = inout(reg) scratch.values.as_ptr() => _,
            next = inout(reg) scratch.values[CHUNK / 2..].as_ptr() => _,
            sums = inout(reg) scratch.sums.as_mut_ptr() => _,
            parts = inout(reg) size / DEPTH => _,
            line = in(reg) LINE_BYTES,
            stride = in(reg) size / PANEL * LINE_BYTES,
            options(nostack),
        );
    }
}
