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
mod softmax;

use std::{
    arch::x86_64::{
        __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
        _mm512_permutexvar_epi16, _mm512_set1_ps, _mm512_setzero_si512, _mm512_storeu_si512,
        _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
    },
    ptr,
};

use self::softmax::{Bend, FEW_ROWS, Seen};
use super::{AttentionConfig, Layer, step::Tile};
use crate::pairs::{Block, DEPTH, HEIGHT, PANEL, PanelSums, tiles};

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
    tiles::is_here()
        && config.head_dim.is_multiple_of(DEPTH)
        && config.block_size.is_multiple_of(GROUP)
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
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

/// 32 numbers of bf16, where a tile's row begins.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u16; DEPTH]);

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

/// Computes a tile.
///
/// # Safety
/// The pointers of `layer` are what `Attention::forward` says, no other thread computes this tile, and [`fits`] has said
/// yes.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn attend(layer: &Layer<'_, u16>, tile: &Tile, scratch: &mut Scratch) {
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
        window: layer.rule.window.map(|window| window as i32),
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

/// Lays out the queries of a tile, two numbers of each side by side; zeros where there is no row.
///
/// # Safety
/// As [`attend`].
unsafe fn load_queries(layer: &Layer<'_, u16>, tile: &Tile, queries: &mut [Line]) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.tokens as usize * group;
    let lines = rows.div_ceil(HEIGHT) * 2 * size / 2;
    queries[..lines].fill(Line([0; DEPTH]));
    for row in 0..rows {
        let token = tile.first as usize + row / group;
        let head = tile.kv_head as usize * group + row % group;
        let lines = &mut queries[row / PANEL * size / 2..];
        let place = 2 * (row % PANEL);
        for (pair, line) in lines[..size / 2].iter_mut().enumerate() {
            // SAFETY: token and head are the step's and the rank's, so this is inside the queries.
            unsafe {
                let from = layer
                    .tensors
                    .query
                    .add(token * layer.tensors.query_stride + head * size);
                let numbers = from.add(2 * pair).cast::<[u16; 2]>().read_unaligned();
                line.0[place..place + 2].copy_from_slice(&numbers);
            }
        }
    }
}

/// Lays out the values of a chunk, two tokens side by side, and says where its keys begin: each 16 of them. Values that no
/// row sees become zeros, for nothing is known of what lies there.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn load_chunk(
    layer: &Layer<'_, u16>,
    tile: &Tile,
    chunk: &Chunk,
    values: &mut [Line],
) -> [*const u16; GROUPS] {
    let config = layer.config;
    let (size, block_size) = (config.head_dim, config.block_size);
    let mut keys = [ptr::null(); GROUPS];
    for group in 0..GROUPS {
        let position = chunk.start + group * GROUP;
        if position >= chunk.end {
            // Nobody sees what lies there: any keys will do.
            keys[group] = keys[0];
            for panel in values.chunks_exact_mut(CHUNK / 2) {
                panel[group * GROUP / 2..][..GROUP / 2].fill(Line([0; DEPTH]));
            }
            continue;
        }
        let block = layer.step.block(tile.sequence, position, block_size);
        let run = |kind: usize| {
            let run = (2 * block + kind) * config.num_kv_heads + tile.kv_head as usize;
            let place = run * block_size + position % block_size;
            // Inside the cache: block ids were checked, and blocks hold multiples of 16 tokens.
            layer.tensors.cache.wrapping_add(place * size).cast_const()
        };
        keys[group] = run(0);
        let from = run(1);
        for pair in 0..GROUP / 2 {
            let token = 2 * pair;
            let is_seen = |token: usize| (chunk.lowest..chunk.end).contains(&(position + token));
            let is_seen = [is_seen(token), is_seen(token + 1)];
            for part in 0..size / DEPTH {
                // SAFETY: sixteen tokens lie there, and each panel of values has a line for every two.
                unsafe {
                    let numbers = [0, 1].map(|next: usize| {
                        if is_seen[next] {
                            let at = (token + next) * size + part * DEPTH;
                            _mm512_loadu_si512(from.add(at).cast())
                        } else {
                            _mm512_setzero_si512()
                        }
                    });
                    let line = part * CHUNK + group * GROUP / 2 + pair;
                    let low = _mm512_unpacklo_epi16(numbers[0], numbers[1]);
                    let high = _mm512_unpackhi_epi16(numbers[0], numbers[1]);
                    _mm512_storeu_si512(values.as_mut_ptr().add(line).cast(), low);
                    _mm512_storeu_si512(values.as_mut_ptr().add(line + CHUNK / 2).cast(), high);
                }
            }
        }
    }
    keys
}

/// Divides the sums and writes them where the heads of each token are side by side.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn store_output(layer: &Layer<'_, u16>, tile: &Tile, scratch: &Scratch) {
    // Where each number of a `DEPTH` lies in two panels of sums: see `Scratch::values`.
    const PLACES: [u16; DEPTH] = {
        let mut places = [0; DEPTH];
        let mut at = 0;
        while at < DEPTH {
            let (eight, rest) = (at / 8, at % 8);
            places[at] = (eight * 4 + rest % 4 + rest / 4 * PANEL) as u16;
            at += 1;
        }
        places
    };
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.tokens as usize * group;
    let sums = scratch.sums.chunks_exact(size / PANEL);
    for (row, (sums, total)) in sums.zip(&scratch.total).take(rows).enumerate() {
        let token = tile.first as usize + row / group;
        let head = tile.kv_head as usize * group + row % group;
        let scale = _mm512_set1_ps(1.0 / total);
        for (part, sums) in sums.chunks_exact(2).enumerate() {
            // SAFETY: token and head are the step's and the rank's, so this is inside the output, and this tile's alone.
            unsafe {
                let low = _mm512_mul_ps(_mm512_loadu_ps(sums[0].0.as_ptr()), scale);
                let high = _mm512_mul_ps(_mm512_loadu_ps(sums[1].0.as_ptr()), scale);
                let rounded = _mm512_cvtne2ps_pbh(high, low);
                let bits = std::mem::transmute::<__m512bh, __m512i>(rounded);
                let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
                let place = (token * layer.config.num_heads + head) * size + part * DEPTH;
                let to = layer.tensors.output.add(place).cast();
                _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, bits));
            }
        }
    }
}
