//! How calls of linear layers are cut into pieces, each of which one thread computes.

use std::ops::Range;

/// A call's outputs and rows, both in blocks, cut into pieces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    columns: usize,
    /// Columns of a piece.
    wide: usize,
    blocks: usize,
    /// Pieces of the blocks of rows.
    parts: usize,
}

impl Cut {
    /// Cuts `columns` blocks of outputs and `blocks` of rows for so many threads.
    ///
    /// Enough pieces for every thread to have some, few enough that a row's inputs are read for several columns, but of
    /// no more than `widest`.
    pub(crate) fn new(columns: usize, blocks: usize, widest: usize, threads: u32) -> Self {
        let pieces = 4 * threads.max(1) as usize;
        let wide = (columns / pieces).clamp(1, widest);
        // Only where columns are few do several threads share one: its weights come from memory, for each of them.
        let parts = pieces.div_ceil(columns.div_ceil(wide)).min(blocks);
        Self {
            columns,
            wide,
            blocks,
            parts,
        }
    }

    /// How many pieces there are.
    pub(crate) const fn count(&self) -> usize {
        self.columns.div_ceil(self.wide) * self.parts
    }

    /// The columns and the blocks of rows of a piece.
    pub(crate) fn piece(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let (column, part) = (index / self.parts * self.wide, index % self.parts);
        let blocks = self.blocks * part / self.parts..self.blocks * (part + 1) / self.parts;
        (column..self.columns.min(column + self.wide), blocks)
    }
}
