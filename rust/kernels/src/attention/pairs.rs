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

mod ahead;
mod few;
mod layout;
mod softmax;

use self::{
    ahead::Ahead,
    layout::{find_keys, load_queries, load_values, store_output},
    softmax::{Bend, FEW_ROWS, Seen},
};
use super::{AttentionConfig, Layer, step::Tile};
use crate::{
    pairs::{Block, DEPTH, HEIGHT, Line, PANEL, PanelSums, tiles},
    spares::Spare,
};

/// Tokens whose keys are a tile.
const GROUP: usize = HEIGHT / 2;
/// Cached tokens that a row takes at a time, at multiples of it.
const CHUNK: usize = 64;
const GROUPS: usize = CHUNK / GROUP;
/// Lines of a row's weights.
const LINES: usize = CHUNK / DEPTH;
/// Rows that one thread computes at a time, where a token has fewer.
pub(super) const ROWS: usize = 64;
/// KV heads that one tile may have, and rows for each of them.
pub(super) const TOGETHER: (usize, usize) = (ROWS / PANEL, PANEL);

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
#[derive(Default)]
pub(super) struct Scratch {
    /// `[panels, head_dim / 2, PANEL, 2]`: the queries; panels come in pairs.
    queries: Vec<Line>,
    /// `[panels / 2, CHUNK, 2]`: of each pair of panels.
    scores: Vec<PanelSums>,
    /// `[rows, CHUNK]`
    weights: Vec<Line>,
    /// `[head_dim / PANEL, CHUNK / 2, PANEL, 2]`: of a chunk. Of each 32 numbers the first panel has those whose place
    /// in eight is below four. Two of these.
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
            values: vec![line; 2 * head_dim * LINES],
            sums: vec![PanelSums([0.0; PANEL]); rows * head_dim / PANEL],
            seen: vec![0; rows],
            most: vec![0.0; rows],
            total: vec![0.0; rows],
            tiles: tiles::Tiles::default(),
        }
    }
}

impl Spare for Scratch {
    fn leave_thread(&mut self) {
        self.tiles = tiles::Tiles::default();
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
    let is_few = tile.tokens as usize * layer.config.group() <= PANEL;
    let (begin, lowest) = first_chunk(layer, tile);
    let last_seen = tile.last_seen();
    scratch.begin(layer, tile);
    // SAFETY: the caller's promise.
    unsafe { load_queries(layer, tile, &mut scratch.queries) };
    for start in (begin..last_seen).step_by(CHUNK) {
        let chunk = Chunk {
            start,
            end: last_seen.min(start + CHUNK),
            lowest: lowest.max(start),
        };
        let ahead = if chunk.end < last_seen {
            Some(Ahead::new(tile, start + CHUNK))
        } else {
            next.map(|next| Ahead::new(next, first_chunk(layer, next).0))
        };
        // SAFETY: the caller's promise.
        unsafe {
            if is_few {
                few::take(layer, tile, (&chunk, ahead), scratch);
            } else {
                take(layer, tile, (&chunk, ahead), scratch);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_output(layer, tile, scratch) };
}

/// Where the first chunk of a tile begins, and the first token that any row sees.
fn first_chunk(layer: &Layer<'_, u16>, tile: &Tile) -> (usize, usize) {
    let lowest = layer.rule.first_seen(tile.seen as usize);
    (lowest / CHUNK * CHUNK, lowest)
}

impl Scratch {
    /// Nothing is seen yet.
    fn begin(&mut self, layer: &Layer<'_, u16>, tile: &Tile) {
        let group = layer.config.group();
        let rows = tile.tokens as usize * group;
        let all = (tile.kv_heads as usize * rows.next_multiple_of(PANEL)).next_multiple_of(HEIGHT);
        let panels = layer.config.head_dim / PANEL;
        self.sums[..all * panels].fill(PanelSums([0.0; PANEL]));
        self.most[..all].fill(f32::NEG_INFINITY);
        self.total[..all].fill(0.0);
        for (row, seen) in self.seen[..all].iter_mut().enumerate() {
            // Of few rows, each head has a panel. Rows that are none see what the last one sees.
            let row = if rows <= PANEL { row % PANEL } else { row };
            *seen = tile.seen as i32 + (row.min(rows - 1) / group) as i32;
        }
    }
}

/// Takes a chunk into the sums of all rows of one KV head.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn take(
    layer: &Layer<'_, u16>,
    tile: &Tile,
    (chunk, ahead): (&Chunk, Option<Ahead<'_>>),
    scratch: &mut Scratch,
) {
    let rows = tile.tokens as usize * layer.config.group();
    if let Some(ahead) = ahead {
        ahead.fetch(layer, 0, 1);
    }
    // One after the other, each for all rows: what a tile reads should not just have been written.
    // SAFETY: the caller's promise; rows come in pairs of panels.
    unsafe {
        load_values(layer, (tile, 0), chunk, &mut scratch.values);
        let keys = find_keys(layer, (tile, 0), chunk);
        for pair in 0..rows.div_ceil(HEIGHT) {
            score((layer, chunk), keys, pair, scratch);
        }
        for panel in 0..rows.div_ceil(PANEL) {
            let count = PANEL.min(rows - panel * PANEL);
            weigh(layer, chunk, (panel, count), scratch);
        }
        for pair in 0..rows.div_ceil(HEIGHT) {
            add_values(layer, pair, scratch);
        }
    }
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
            source: tiles::Source::Cache,
            begin: tiles::Begin::Zeros,
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
            source: tiles::Source::Cache,
            begin: tiles::Begin::Sums,
            steps: LINES,
            sums: scratch.sums[pair * HEIGHT * panels + panel..].as_mut_ptr(),
            sums_stride: panels,
        };
        // SAFETY: weights and values are there, and so are tiles.
        unsafe { scratch.tiles.multiply(&block) };
    }
}
