//! One tile: softmax attention of a few rows over the cached tokens that they see.
//!
//! A row is one query head of one token. It takes the cached tokens 64 at a time, at multiples of 64 of the sequence's
//! positions, with the running maximum and sum of the online softmax (Milakov and Gimelshein, 2018). All of a row's
//! sums have an order that depends on nothing but its position: which rows share its tile, how its prompt was cut and
//! what else is in the step change no bit. Nor does what lies in the cache before the tile's windows and behind its end:
//! no weight is ever multiplied with it.
//!
//! For [`few`] rows, which is what a decode has, keys and values are multiplied where they lie. For [`many`] a chunk is laid
//! out once, so that registers are full of sums. Both add up in the same order.

#![expect(
    unsafe_code,
    reason = "reads a cache that other processes may write, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

mod few;
mod many;
mod softmax;
mod values;

use std::{ops::Range, ptr};

use self::softmax::{BEGIN, Softmax, weigh};
use super::{CHUNK, Layer, step::Tile};
use crate::{
    element::Element,
    simd::{Arithmetic, LANES, Lanes, Vector, WIDEST, Wide},
    spares::Spare,
};

/// Rows that one thread computes at a time, where a token has fewer: what is read of the cache is used for so many.
pub(super) const ROWS: (usize, usize) = (32, 96);
/// KV heads that one tile may have, and rows for each of them.
pub(super) const TOGETHER: (usize, usize) = (8, few::ROWS);
const GROUPS: usize = CHUNK / LANES;
/// Tokens whose keys lie side by side where a chunk is laid out.
const PANEL: usize = WIDEST;

/// What a thread needs beside the tensors. The order of a row's numbers is [`Element::load_unzipped`]'s.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[rows, head_dim]`
    query: Vec<f32>,
    /// `[rows, head_dim]`: sums of values, not yet divided.
    sums: Vec<f32>,
    /// Of each row: its scores in a chunk, then its weights.
    weights: Vec<[f32; CHUNK]>,
    /// Of eight rows each.
    softmax: Vec<Softmax>,
    /// `[CHUNK / PANEL, head_dim, PANEL]`
    keys: Vec<f32>,
    /// `[CHUNK, head_dim]`
    values: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(rows: usize, head_dim: usize) -> Self {
        Self {
            query: vec![0.0; rows * head_dim],
            sums: vec![0.0; rows * head_dim],
            weights: vec![[0.0; CHUNK]; rows],
            softmax: vec![BEGIN; rows.div_ceil(LANES)],
            keys: vec![0.0; CHUNK * head_dim],
            values: vec![0.0; CHUNK * head_dim],
        }
    }

    /// Makes weights of the first rows' scores.
    #[inline(always)]
    fn weigh<L: Lanes>(&mut self, rows: usize) {
        let eights = self.weights[..rows].chunks_mut(LANES);
        for (rows, softmax) in eights.zip(&mut self.softmax) {
            weigh::<L>(rows, softmax);
        }
    }
}

impl Spare for Scratch {}

/// Computes a tile.
///
/// # Safety
/// The pointers of `layer` are what `Attention::forward` says, and no other thread computes this tile.
#[inline(always)]
pub(super) unsafe fn attend<W: Wide, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    scratch: &mut Scratch,
) {
    let size = layer.config.head_dim;
    let rows = tile.rows(layer.config.group());
    // SAFETY: the caller's promise.
    unsafe { load_queries::<W, T>(layer, tile, &mut scratch.query[..rows * size]) };
    scratch.sums[..rows * size].fill(0.0);
    scratch.softmax[..rows.div_ceil(LANES)].fill(BEGIN);
    let last_seen = tile.last_seen();
    for start in (first_chunk(layer, tile)..last_seen).step_by(CHUNK) {
        // SAFETY: the caller's promise.
        unsafe {
            let chunk = Chunk::find(layer, tile, start);
            if tile.is_few(layer.config.group()) {
                few::take::<W, T>(layer, tile, &chunk, scratch);
            } else {
                many::take::<W, T>(layer, tile, &chunk, scratch);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_output::<W, T>(layer, tile, &scratch.sums, &scratch.softmax) };
}

/// Where the first chunk begins that any row sees.
fn first_chunk<T>(layer: &Layer<'_, T>, tile: &Tile) -> usize {
    layer.rule.first_seen(tile.seen as usize) / CHUNK * CHUNK
}

/// Tokens of a sequence that are taken at a time, and where the keys and values of each eight of them begin.
struct Chunk<T> {
    start: usize,
    /// Of those up to the last token that any row sees. One that is not all below it is still inside its block.
    groups: usize,
    keys: [*const T; GROUPS],
    values: [*const T; GROUPS],
}

impl<T: Element> Chunk<T> {
    /// That which begins at `start`, of a tile that sees some of it.
    fn find(layer: &Layer<'_, T>, tile: &Tile, start: usize) -> Self {
        let config = layer.config;
        let (size, block_size) = (config.head_dim, config.block_size);
        let groups = (tile.last_seen() - start).min(CHUNK).div_ceil(LANES);
        let mut chunk = Self {
            start,
            groups,
            keys: [ptr::null(); GROUPS],
            values: [ptr::null(); GROUPS],
        };
        for group in 0..groups {
            let position = start + group * LANES;
            let block = layer.step.block(tile.sequence, position, block_size);
            let at = |half: usize| {
                let run = (2 * block + half) * config.num_kv_heads + tile.kv_head as usize;
                let place = run * block_size + position % block_size;
                // Inside the cache: block ids were checked, and blocks hold multiples of `LANES` tokens.
                layer.tensors.cache.wrapping_add(place * size).cast_const()
            };
            (chunk.keys[group], chunk.values[group]) = (at(0), at(1));
        }
        chunk
    }
}

/// Cuts rows into parts of about the same size, which is at most `most`.
fn parts(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(most);
    (0..count).map(move |part| rows * part / count..rows * (part + 1) / count)
}

impl Tile {
    /// Rows of all its KV heads, of which each token has `group` for each.
    const fn rows(&self, group: usize) -> usize {
        self.kv_heads as usize * self.tokens as usize * group
    }

    /// Whether there are few for each.
    const fn is_few(&self, group: usize) -> bool {
        self.tokens as usize * group <= few::ROWS
    }

    /// The token and the query head of a row.
    const fn row(&self, row: usize, group: usize) -> (usize, usize) {
        let each = self.tokens as usize * group;
        self.place(row / each, row % each, group)
    }
}

impl<T> Layer<'_, T> {
    /// The tokens that a row sees of the chunk that begins at `start`.
    fn range(&self, tile: &Tile, start: usize, row: usize) -> Range<usize> {
        let seen = tile.seen as usize + row / self.config.group();
        let low = self.rule.first_seen(seen).saturating_sub(start);
        low..seen.saturating_sub(start).min(CHUNK)
    }

    /// Scores of products.
    #[inline(always)]
    fn bend<A: Arithmetic>(&self, products: A) -> A {
        let scores = products.mul(A::splat(self.scale));
        match self.rule.soft_cap {
            Some(cap) => scores.mul(A::splat(1.0 / cap)).tanh().mul(A::splat(cap)),
            None => scores,
        }
    }
}

#[inline(always)]
unsafe fn load_queries<W: Wide, T: Element>(layer: &Layer<'_, T>, tile: &Tile, rows: &mut [f32]) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    for (row, target) in rows.chunks_exact_mut(size).enumerate() {
        let (token, head) = tile.row(row, group);
        // SAFETY: token and head are the step's and the rank's, so this is inside the queries.
        unsafe {
            let from = token * layer.tensors.query_stride + head * size;
            copy_unzipped::<W, T>(layer.tensors.query.add(from), target);
        }
    }
}

/// Copies as many numbers as `to` has, vector by vector.
#[inline(always)]
unsafe fn copy_unzipped<W: Wide, T: Element>(from: *const T, to: &mut [f32]) {
    let whole = to.len() / W::LEN * W::LEN;
    for at in (0..whole).step_by(W::LEN) {
        // SAFETY: the caller's promise.
        unsafe { T::load_unzipped::<W>(from.add(at)).store(to.as_mut_ptr().add(at)) };
    }
    if whole < to.len() {
        // SAFETY: as above; heads are multiples of eight.
        unsafe { T::load_unzipped::<W::Half>(from.add(whole)).store(to.as_mut_ptr().add(whole)) };
    }
}

/// Divides the sums and writes them where the heads of each token are side by side.
#[inline(always)]
unsafe fn store_output<W: Wide, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    sums: &[f32],
    softmax: &[Softmax],
) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.rows(group);
    let whole = size / W::LEN * W::LEN;
    for (row, sums) in sums.chunks_exact(size).take(rows).enumerate() {
        let (token, head) = tile.row(row, group);
        let place = (token * layer.config.num_heads + head) * size;
        let scale = 1.0 / softmax[row / LANES].total[row % LANES];
        // SAFETY: token and head are the step's and the rank's, so this is inside the output, and this tile's alone.
        unsafe {
            let (from, to) = (sums.as_ptr(), layer.tensors.output.add(place));
            for at in (0..whole).step_by(W::LEN) {
                T::store_zipped(W::load(from.add(at)).mul(W::splat(scale)), to.add(at));
            }
            if whole < size {
                let rest = W::Half::load(from.add(whole)).mul(W::Half::splat(scale));
                T::store_zipped(rest, to.add(whole));
            }
        }
    }
}
