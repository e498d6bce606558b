//! One panel of rows, which is what a decode has, for each of some KV heads: tiles as small as the rows.
//!
//! A block's keys of all heads lie side by side, and so do its values: the longer what is read in order, the faster memory
//! is. And with the heads one after the other in each part of the work, no tile reads what has just been written.

#![expect(
    unsafe_code,
    reason = "reads tensors, by instructions that only some processors have"
)]

use std::arch::asm;

use super::{
    super::{Layer, step::Tile},
    CHUNK, Chunk, DEPTH, GROUP, GROUPS, LINES, PANEL, Scratch,
    ahead::Ahead,
    layout::{find_keys, load_values},
    weigh,
};
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

/// Takes a chunk into the sums of a panel of rows for each of the tile's KV heads.
///
/// # Safety
/// As [`attend`](super::attend), of a tile with at most a panel of rows for each head.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn take(
    layer: &Layer<'_, u16>,
    tile: &Tile,
    (chunk, ahead): (&Chunk, Option<Ahead<'_>>),
    scratch: &mut Scratch,
) {
    let size = layer.config.head_dim;
    let rows = tile.tokens as usize * layer.config.group();
    let heads = tile.kv_heads as usize;
    // A little at a time: a core has few requests to memory under way, and waits to make more.
    let fetch = |part| {
        if let Some(ahead) = ahead {
            ahead.fetch(layer, part, 3 * heads);
        }
    };
    // SAFETY: the caller's promise.
    unsafe {
        load_values(layer, (tile, 0), chunk, &mut scratch.values);
        for head in 0..heads {
            fetch(head);
            let keys = find_keys(layer, (tile, head), chunk);
            score(chunk, keys, (rows, size), head, scratch);
        }
        for head in 0..heads {
            fetch(heads + head);
            weigh(layer, chunk, (head, rows), scratch);
        }
        for head in 0..heads {
            fetch(2 * heads + head);
            // Those of the next head are laid out while others are read.
            let next = head + 1;
            if next < heads {
                let values = &mut scratch.values[next % 2 * size * LINES..];
                load_values(layer, (tile, next), chunk, values);
            }
            add_values((rows, size), head, scratch);
        }
    }
}

/// Multiplies a chunk's keys with the queries of up to a panel of rows.
///
/// # Safety
/// The processor has tiles, `keys` are the chunk's, and the scratch has this panel for heads of this size.
unsafe fn score(
    chunk: &Chunk,
    keys: [*const u16; GROUPS],
    (rows, size): (usize, usize),
    panel: usize,
    scratch: &mut Scratch,
) {
    let queries = scratch.queries[panel * size / 2..].as_ptr();
    let scores = &mut scratch.scores[panel / 2 * 2 * CHUNK + panel % 2..];
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
                queries = inout(reg) queries => _,
                steps = inout(reg) size / DEPTH => _,
                line = in(reg) LINE_BYTES,
                stride = in(reg) 2 * size,
                scores = in(reg) scores[first * 2 * GROUP..].as_mut_ptr(),
                scores_low = in(reg) scores[(first + 1) * 2 * GROUP..].as_mut_ptr(),
                scores_line = in(reg) 2 * LINE_BYTES,
                options(nostack),
            );
        }
    }
}

/// Adds a chunk's values, times their weights, to the sums of a panel's rows.
///
/// # Safety
/// As [`score`].
unsafe fn add_values((rows, size): (usize, usize), panel: usize, scratch: &mut Scratch) {
    let values = &scratch.values[panel % 2 * size * LINES..];
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
            weights = in(reg) scratch.weights[panel * PANEL * LINES..].as_ptr(),
            weights_line = in(reg) 2 * CHUNK,
            values = inout(reg) values.as_ptr() => _,
            next = inout(reg) values[CHUNK / 2..].as_ptr() => _,
            sums = inout(reg) scratch.sums[panel * size..].as_mut_ptr() => _,
            parts = inout(reg) size / DEPTH => _,
            line = in(reg) LINE_BYTES,
            stride = in(reg) size / PANEL * LINE_BYTES,
            options(nostack),
        );
    }
}
