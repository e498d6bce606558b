//! The same in bf16 on processors with tiles: scores and sums are products of tiles, as a linear layer's are.
//!
//! For the scores the cached keys are the rows, read where they lie, and up to 32 queries the weights, laid out once for a
//! tile: each chunk gives scores `[tokens, queries]`. [`softmax`] makes weights `[queries, tokens]` of them, rounded to
//! bf16, as others do (Dao, "FlashAttention-2", 2023); these are the rows of the second product, and the values, two tokens
//! side by side, its weights.
//!
//! What [`tile`](super::tile) says of bits holds here too: a number of a tile depends on its own row and column alone, and
//! both ways in which a softmax is computed add up in the same order.

#![expect(
    unsafe_code,
    reason = "reads a cache that other processes may write, and writes what other threads write beside"
)]

mod few;
mod layout;
mod softmax;

use self::{
    layout::{fetch, load_chunk, load_queries, store_output},
    softmax::{Bend, FEW_ROWS, Seen},
};
use super::{AttentionConfig, Layer, step::Tile};
use crate::pairs::{Block, DEPTH, HEIGHT, Line, PANEL, PanelSums, tiles};

/// Tokens whose keys are a tile.
const GROUP: usize = HEIGHT / 2;
/// Cached tokens that a row takes at a time, at multiples of it.
const CHUNK: usize = 64;
const GROUPS: usize = CHUNK / GROUP;
/// Lines of a row's weights.
const LINES: usize = CHUNK / DEPTH;
/// Rows that one thread computes at a time, where a token has fewer.
pub(super) const ROWS: usize = 64;

/// Whether this processor can, and these shapes fit: a tile takes 32 numbers of a key, and 16 tokens of a block.
pub(super) fn fits(config: &AttentionConfig) -> bool {
    config.head_dim.is_multiple_of(DEPTH)
        && config.block_size.is_multiple_of(GROUP)
        && tiles::is_here()
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// What a thread needs beside the tensors.
pub(super) struct Scratch {
    /// `[panels, head_dim / 2, PANEL, 2]`: the queries; panels come in pairs.
    queries: Vec<Line>,
    /// `[panels / 2, CHUNK, 2]`: of each pair of panels.
    scores: Vec<PanelSums>,
    /// `[rows, CHUNK]`
    weights: Vec<Line>,
    /// `[head_dim / PANEL, CHUNK / 2, PANEL, 2]`: of a chunk. Of each 32 numbers the first panel has those whose place
    /// in eight is below four.
    values: Vec<Line>,
    /// `[rows, head_dim / PANEL]`: sums of values in the order of `values`, not yet divided.
    sums: Vec<PanelSums>,
    /// Of each row: tokens that it sees.
    seen: Vec<i32>,
    /// Of each row: the largest score so far.
    most: Vec<f32>,
    /// Of each row: the sum of the weights relative to it.
    total: Vec<f32>,
    tiles: tiles::Tiles,
}

impl Scratch {
    pub(super) fn new(rows: usize, head_dim: usize) -> Self {
        let rows = rows.next_multiple_of(HEIGHT);
        let line = Line([0; DEPTH]);
        Self {
            queries: vec![line; rows / PANEL * head_dim / 2],
            scores: vec![PanelSums([0.0; PANEL]); rows / PANEL * CHUNK],
            weights: vec![line; rows * LINES],
            values: vec![line; head_dim * LINES],
            sums: vec![PanelSums([0.0; PANEL]); rows * head_dim / PANEL],
            seen: vec![0; rows],
            most: vec![0.0; rows],
            total: vec![0.0; rows],
            tiles: tiles::Tiles::default(),
        }
    }
}

/// Computes a tile, and asks for what the one needs that this thread will most likely have next.
///
/// # Safety
/// The pointers of `layer` are what `Attention::forward` says, no other thread computes this tile, and [`fits`] has said
/// yes.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn attend(
    layer: &Layer<'_, u16>,
    (tile, next): (&Tile, Option<&Tile>),
    scratch: &mut Scratch,
) {
    let group = layer.config.group();
    let rows = tile.tokens as usize * group;
    let panel_pairs = rows.div_ceil(HEIGHT);
    let first_seen = tile.seen as usize;
    let last_seen = first_seen + tile.tokens as usize - 1;
    let lowest = layer.rule.first_seen(first_seen);
    // SAFETY: the caller's promise.
    unsafe { load_queries(layer, tile, &mut scratch.queries) };
    let panels = layer.config.head_dim / PANEL;
    scratch.sums[..panel_pairs * HEIGHT * panels].fill(PanelSums([0.0; PANEL]));
    scratch.most[..panel_pairs * HEIGHT].fill(f32::NEG_INFINITY);
    scratch.total[..panel_pairs * HEIGHT].fill(0.0);
    for (row, seen) in scratch.seen[..panel_pairs * HEIGHT].iter_mut().enumerate() {
        // Rows that are none see what the last one sees.
        *seen = (first_seen + row.min(rows - 1) / group) as i32;
    }
    for start in (lowest / CHUNK * CHUNK..last_seen).step_by(CHUNK) {
        let chunk = Chunk {
            start,
            end: last_seen.min(start + CHUNK),
            lowest: lowest.max(start),
        };
        // SAFETY: the caller's promise; rows come in pairs of panels.
        unsafe {
            if chunk.end < last_seen {
                fetch(layer, tile, start + CHUNK, last_seen);
            } else if let Some(next) = next {
                let first = next.seen as usize;
                let lowest = layer.rule.first_seen(first) / CHUNK * CHUNK;
                fetch(layer, next, lowest, first + next.tokens as usize - 1);
            }
            let keys = load_chunk(layer, tile, &chunk, &mut scratch.values);
            if rows <= PANEL {
                few::score(&chunk, keys, (rows, layer.config.head_dim), scratch);
                weigh(layer, &chunk, (0, rows), scratch);
                few::add_values((rows, layer.config.head_dim), scratch);
                continue;
            }
            // One after the other, each for all rows: what a tile reads should not just have been written.
            for pair in 0..panel_pairs {
                score((layer, &chunk), keys, pair, scratch);
            }
            for panel in 0..rows.div_ceil(PANEL) {
                let count = PANEL.min(rows - panel * PANEL);
                weigh(layer, &chunk, (panel, count), scratch);
            }
            for pair in 0..panel_pairs {
                add_values(layer, pair, scratch);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_output(layer, tile, scratch) };
}

/// Tokens of a sequence that are taken at a time, at most `CHUNK`.
struct Chunk {
    start: usize,
    /// Behind the last of the chunk that any row sees.
    end: usize,
    /// The first that any row sees.
    lowest: usize,
}

impl Chunk {
    /// Groups of tokens up to the last that any row sees.
    const fn groups(&self) -> usize {
        (self.end - self.start).div_ceil(GROUP)
    }
}

/// Multiplies a chunk's keys with the queries of a pair of panels.
///
/// # Safety
/// As [`attend`]; `keys` are the chunk's.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn score(
    (layer, chunk): (&Layer<'_, u16>, &Chunk),
    keys: [*const u16; GROUPS],
    pair: usize,
    scratch: &mut Scratch,
) {
    let size = layer.config.head_dim;
    for first in (0..chunk.groups()).step_by(2) {
        let scores = &mut scratch.scores[(pair * GROUPS + first) * 2 * GROUP..];
        let block = Block {
            rows: keys[first],
            lower_rows: keys[first + 1],
            row_stride: size,
            step_stride: DEPTH,
            count: HEIGHT,
            weights: scratch.queries[pair * size..].as_ptr().cast(),
            panel_stride: size * PANEL,
            panels: 2,
            kind: tiles::Kind::Fresh,
            steps: size / DEPTH,
            sums: scores.as_mut_ptr(),
            sums_stride: 2,
        };
        // SAFETY: keys and queries are there, and so are tiles.
        unsafe { scratch.tiles.multiply(&block) };
    }
}

/// Makes weights of the scores of a panel's rows, and lowers the rows' sums where a larger score has come.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn weigh(
    layer: &Layer<'_, u16>,
    chunk: &Chunk,
    (panel, rows): (usize, usize),
    scratch: &mut Scratch,
) {
    let first = panel * PANEL;
    let seen = Seen {
        start: chunk.start as i32,
        tokens: scratch.seen[first..].as_ptr(),
        // One that is larger than any context is none.
        window: layer.rule.window.and_then(|window| window.try_into().ok()),
    };
    let bend = Bend {
        scale: layer.scale,
        soft_cap: layer.rule.soft_cap,
    };
    let mut kept = [1.0; PANEL];
    // SAFETY: a panel's rows have so many of each.
    unsafe {
        let scores = scratch.scores[panel / 2 * 2 * CHUNK + panel % 2..].as_mut_ptr();
        let weights = scratch.weights[first * LINES..].as_mut_ptr().cast();
        let state = (
            scratch.most[first..].as_mut_ptr(),
            scratch.total[first..].as_mut_ptr(),
        );
        if rows <= FEW_ROWS {
            softmax::weigh_rows(&bend, &seen, (scores, rows), weights, state, &mut kept);
        } else {
            softmax::weigh_panel(&bend, &seen, scores, weights, state, &mut kept);
        }
    }
    let panels = layer.config.head_dim / PANEL;
    let sums = scratch.sums[first * panels..].chunks_exact_mut(panels);
    for (sums, kept) in sums.zip(kept) {
        if kept < 1.0 {
            for sums in sums {
                for sum in &mut sums.0 {
                    *sum *= kept;
                }
            }
        }
    }
}

/// Adds a chunk's values, times their weights, to the sums of a pair of panels.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn add_values(layer: &Layer<'_, u16>, pair: usize, scratch: &mut Scratch) {
    let panels = layer.config.head_dim / PANEL;
    let weights = &scratch.weights[pair * HEIGHT * LINES..];
    for panel in (0..panels).step_by(2) {
        let block = Block {
            rows: weights.as_ptr().cast(),
            lower_rows: weights[GROUP * LINES..].as_ptr().cast(),
            row_stride: CHUNK,
            step_stride: DEPTH,
            count: HEIGHT,
            weights: scratch.values[panel * CHUNK / 2..].as_ptr().cast(),
            panel_stride: CHUNK * PANEL,
            panels: 2,
            kind: tiles::Kind::Near,
            steps: LINES,
            sums: scratch.sums[pair * HEIGHT * panels + panel..].as_mut_ptr(),
            sums_stride: panels,
        };
        // SAFETY: weights and values are there, and so are tiles.
        unsafe { scratch.tiles.multiply(&block) };
    }
}
