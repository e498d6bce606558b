//! What a thread reads next, asked for while it computes.
//!
//! The processor finds out by itself that memory is read in order, but begins anew in each page (Intel's optimization
//! manual, "Hardware prefetching for second-level cache"). To ask for the first lines of each page starts it in time. To ask
//! for all of them takes as long as a fifth of the computation, for a core has few requests at a time.

#![expect(unsafe_code, reason = "asks for memory by an instruction")]

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use super::{
    super::{Layer, step::Tile},
    CHUNK, GROUP,
    layout::Half,
};

const PAGE_BYTES: usize = 4096;
const LINE_BYTES: usize = 64;
/// Lines of a page that are asked for: from four to sixteen it was the same, to the noise.
const LINES: usize = 8;

/// A chunk of a tile that will be computed.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a> {
    tile: &'a Tile,
    start: usize,
    /// Behind its last token that a row sees.
    end: usize,
}

impl<'a> Ahead<'a> {
    /// The chunk that begins at `start`, and what the tile sees of it.
    pub(super) fn new(tile: &'a Tile, start: usize) -> Self {
        let end = tile.last_seen().min(start + CHUNK);
        Self { tile, start, end }
    }

    /// Asks for one of `parts` parts.
    pub(super) fn fetch(&self, layer: &Layer<'_, u16>, part: usize, parts: usize) {
        let first = self.start / layer.config.block_size;
        let last = (self.end - 1) / layer.config.block_size;
        let halves = 2 * (last + 1 - first);
        for half in halves * part / parts..halves * (part + 1) / parts {
            let kind = if half % 2 == 0 {
                Half::Keys
            } else {
                Half::Values
            };
            self.fetch_half(layer, first + half / 2, kind);
        }
    }

    /// Asks for the keys or the values that the chunk has in the sequence's `block`th block.
    fn fetch_half(&self, layer: &Layer<'_, u16>, block: usize, half: Half) {
        let (size, block_size) = (layer.config.head_dim, layer.config.block_size);
        let first = self.start.max(block * block_size);
        let end = self.end.next_multiple_of(GROUP);
        let tokens = end.min((block + 1) * block_size) - first;
        let heads = self.tile.kv_heads as usize;
        // What several heads have of a whole block lies side by side.
        let (runs, count) = if tokens == block_size {
            (1, heads * tokens * size)
        } else {
            (heads, tokens * size)
        };
        for head in 0..runs {
            begin_pages(layer.run(self.tile, first, half, head), count);
        }
    }
}

/// Asks for the first lines of each page of `count` numbers.
fn begin_pages(from: *const u16, count: usize) {
    let end = from.wrapping_add(count).cast::<i8>();
    let mut page = from.cast::<i8>();
    while page < end {
        for line in 0..LINES {
            // SAFETY: nothing is read: an address that is not there is ignored.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(page.wrapping_add(line * LINE_BYTES)) };
        }
        page = page.wrapping_add(PAGE_BYTES - page.addr() % PAGE_BYTES);
    }
}
