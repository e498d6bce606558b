//! One tile: softmax attention of a few rows over the cached tokens that they see.
//!
//! A row is one query head of one token. It takes the cached tokens 32 at a time, at multiples of 32 of the sequence's
//! positions, with the running maximum and sum of the online softmax (Milakov and Gimelshein, 2018). All of a row's
//! sums have an order that depends on nothing but its position: which rows share its tile, how its prompt was cut and
//! what else is in the step change no bit. Nor does what lies in the cache before its window and behind its end, for
//! it is never multiplied.

#![expect(
    unsafe_code,
    reason = "reads a cache that other processes may write, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use super::{CHUNK, Layer, step::Tile};
use crate::simd::{LANES, Lanes};

const GROUPS: usize = CHUNK / LANES;
/// Sums of values that are kept in registers at a time.
const WIDE: usize = 8;

/// A kind of number in the cache.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Reads eight.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
    /// Where `LANES` rows of `size` numbers are as `f32`: here, or in `room`, into which they are copied.
    ///
    /// # Safety
    /// The rows are there, and `room` holds as many.
    unsafe fn rows<L: Lanes>(from: *const Self, size: usize, room: *mut f32) -> *const f32;
    /// Rounds.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }

    #[inline(always)]
    unsafe fn rows<L: Lanes>(from: *const Self, _size: usize, _room: *mut f32) -> *const f32 {
        from
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn rows<L: Lanes>(from: *const Self, size: usize, room: *mut f32) -> *const f32 {
        for at in (0..LANES * size).step_by(LANES) {
            // SAFETY: the caller's promise; sizes are multiples of `LANES`.
            unsafe { L::load_bf16(from.add(at)).store(room.add(at)) };
        }
        room
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        crate::bf16::narrow(value)
    }
}

/// What a thread needs beside the tensors.
pub(super) struct Scratch {
    /// `[rows, head_dim]`
    query: Vec<f32>,
    /// `[rows, head_dim]`: sums of values, not yet divided.
    sums: Vec<f32>,
    /// Of each row: the largest score so far, and the sum of the weights relative to it.
    softmax: Vec<(f32, f32)>,
    /// `[2, CHUNK, head_dim]`: keys and values, where the cache has them in other numbers.
    room: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(rows: usize, head_dim: usize) -> Self {
        Self {
            query: vec![0.0; rows * head_dim],
            sums: vec![0.0; rows * head_dim],
            softmax: vec![(0.0, 0.0); rows],
            room: vec![0.0; 2 * CHUNK * head_dim],
        }
    }
}

/// The keys and values of a chunk: where each eight of them begin.
#[derive(Clone, Copy)]
struct Chunk {
    keys: [*const f32; GROUPS],
    values: [*const f32; GROUPS],
}

/// Computes a tile.
///
/// # Safety
/// The pointers of `layer` are what `Attention::forward` says, and no other thread computes this tile.
#[inline(always)]
pub(super) unsafe fn attend<L: Lanes, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    scratch: &mut Scratch,
) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.tokens as usize * group;
    // SAFETY: the caller's promise.
    unsafe { load_queries::<L, T>(layer, tile, &mut scratch.query[..rows * size]) };
    scratch.sums[..rows * size].fill(0.0);
    scratch.softmax[..rows].fill((f32::NEG_INFINITY, 0.0));
    let first_seen = tile.seen as usize;
    let last_seen = first_seen + tile.tokens as usize - 1;
    let begin = layer.rule.first_seen(first_seen) / CHUNK * CHUNK;
    for start in (begin..last_seen).step_by(CHUNK) {
        // SAFETY: the caller's promise.
        let chunk = unsafe { gather::<L, T>(layer, tile, (start, last_seen), &mut scratch.room) };
        for row in 0..rows {
            let seen = first_seen + row / group;
            let low = layer.rule.first_seen(seen).saturating_sub(start);
            let high = seen.saturating_sub(start).min(CHUNK);
            if low < high {
                let query = &scratch.query[row * size..][..size];
                // SAFETY: the chunk's pointers hold the groups below `high`, which is at most `last_seen - start`.
                let scores = unsafe { scores::<L, T>(layer, query, &chunk, (low, high)) };
                let sums = &mut scratch.sums[row * size..][..size];
                let softmax = &mut scratch.softmax[row];
                // SAFETY: as above.
                unsafe { accumulate::<L>(scores, &chunk, (low, high), sums, softmax) };
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_output(layer, tile, &scratch.sums, &scratch.softmax) };
}

#[inline(always)]
unsafe fn load_queries<L: Lanes, T: Element>(layer: &Layer<'_, T>, tile: &Tile, rows: &mut [f32]) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    for (row, target) in rows.chunks_exact_mut(size).enumerate() {
        let token = tile.first as usize + row / group;
        let head = tile.kv_head as usize * group + row % group;
        for at in (0..size).step_by(LANES) {
            // SAFETY: token and head are the step's and the rank's, so this is inside the queries.
            unsafe {
                let tensors = &layer.tensors;
                let from = tensors
                    .query
                    .add(token * tensors.query_stride + head * size + at);
                T::load::<L>(from).store(target.as_mut_ptr().add(at));
            }
        }
    }
}

/// Finds the keys and values at positions from `start` up to `end`, at most `CHUNK`. A group that is not all below `end`
/// is still inside its block; one that lies behind it is not looked up.
#[inline(always)]
unsafe fn gather<L: Lanes, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    (start, end): (usize, usize),
    room: &mut [f32],
) -> Chunk {
    let config = layer.config;
    let (size, block_size) = (config.head_dim, config.block_size);
    let nothing = std::ptr::null();
    let mut chunk = Chunk {
        keys: [nothing; GROUPS],
        values: [nothing; GROUPS],
    };
    for group in 0..GROUPS {
        let position = start + group * LANES;
        if position >= end {
            break;
        }
        let block = layer.step.block(tile.sequence, position, block_size);
        let place = position % block_size;
        // SAFETY: block ids were checked, and blocks hold multiples of `LANES` tokens: eight rows lie here. The room
        // has two places for each group.
        unsafe {
            let at = |half: usize| {
                let head = half * config.num_kv_heads + tile.kv_head as usize;
                let run = block * 2 * config.num_kv_heads + head;
                layer.tensors.cache.add((run * block_size + place) * size)
            };
            let room = room.as_mut_ptr().add(2 * group * LANES * size);
            chunk.keys[group] = T::rows::<L>(at(0), size, room);
            chunk.values[group] = T::rows::<L>(at(1), size, room.add(LANES * size));
        }
    }
    chunk
}

/// The scores of a row with a chunk's tokens; minus infinity for those that it does not see.
#[inline(always)]
unsafe fn scores<L: Lanes, T: Element>(
    layer: &Layer<'_, T>,
    query: &[f32],
    chunk: &Chunk,
    (low, high): (usize, usize),
) -> [f32; CHUNK] {
    let mut scores = [f32::NEG_INFINITY; CHUNK];
    let size = query.len();
    for group in low / LANES..high.div_ceil(LANES) {
        let keys = chunk.keys[group];
        let mut products = [L::splat(0.0); LANES];
        for at in (0..size).step_by(LANES) {
            // SAFETY: `at` is inside the query and inside each of the group's eight rows, see `gather`.
            unsafe {
                let query = L::load(query.as_ptr().add(at));
                for (token, product) in products.iter_mut().enumerate() {
                    *product = query.mul_add(L::load(keys.add(token * size + at)), *product);
                }
            }
        }
        let mut bent = L::sums(products).mul(L::splat(layer.scale));
        if let Some(cap) = layer.rule.soft_cap {
            bent = bent.mul(L::splat(1.0 / cap)).tanh().mul(L::splat(cap));
        }
        // SAFETY: the array has a place for each group.
        unsafe { bent.store(scores.as_mut_ptr().add(group * LANES)) };
    }
    scores[..low].fill(f32::NEG_INFINITY);
    scores[high..].fill(f32::NEG_INFINITY);
    scores
}

/// Adds a chunk's values to a row's sums, weighted by the softmax of its scores so far.
#[inline(always)]
unsafe fn accumulate<L: Lanes>(
    mut scores: [f32; CHUNK],
    chunk: &Chunk,
    (low, high): (usize, usize),
    sums: &mut [f32],
    softmax: &mut (f32, f32),
) {
    let (largest, weight) = *softmax;
    let mut each = [L::splat(0.0); GROUPS];
    for (group, each) in each.iter_mut().enumerate() {
        // SAFETY: the array holds `GROUPS` times eight.
        *each = unsafe { L::load(scores.as_ptr().add(group * LANES)) };
    }
    let mut most = each[0];
    for other in &each[1..] {
        most = other.max(most);
    }
    let now = most.largest().max(largest);
    let mut weights = L::splat(0.0);
    for (group, each) in each.into_iter().enumerate() {
        let each = each.add(L::splat(-now)).exp();
        // SAFETY: as above.
        unsafe { each.store(scores.as_mut_ptr().add(group * LANES)) };
        weights = weights.add(each);
    }
    let kept = if now > largest {
        L::splat(largest - now).exp()
    } else {
        L::splat(1.0)
    };
    *softmax = (now, weight * kept.largest() + weights.sum());
    let size = sums.len();
    let mut start = 0;
    // SAFETY: each call stays inside the row, and inside the rows of the groups that `low..high` touches.
    unsafe {
        while start + WIDE * LANES <= size {
            add_values::<L, WIDE>(
                &scores,
                chunk,
                (low, high),
                &mut sums[start..],
                (start, size),
                kept,
            );
            start += WIDE * LANES;
        }
        while start + 2 * LANES <= size {
            add_values::<L, 2>(
                &scores,
                chunk,
                (low, high),
                &mut sums[start..],
                (start, size),
                kept,
            );
            start += 2 * LANES;
        }
        while start < size {
            add_values::<L, 1>(
                &scores,
                chunk,
                (low, high),
                &mut sums[start..],
                (start, size),
                kept,
            );
            start += LANES;
        }
    }
}

/// Adds `N` times eight numbers of each value that a row sees, in the order of the tokens.
#[inline(always)]
unsafe fn add_values<L: Lanes, const N: usize>(
    weights: &[f32; CHUNK],
    chunk: &Chunk,
    (low, high): (usize, usize),
    sums: &mut [f32],
    (start, size): (usize, usize),
    kept: L,
) {
    let mut parts = [L::splat(0.0); N];
    for (index, part) in parts.iter_mut().enumerate() {
        // SAFETY: the caller's promise: `N` times eight numbers of `sums` are there.
        *part = unsafe { L::load(sums.as_ptr().add(index * LANES)) }.mul(kept);
    }
    for group in low / LANES..high.div_ceil(LANES) {
        let tokens = low.max(group * LANES)..high.min((group + 1) * LANES);
        for token in tokens {
            let weight = L::splat(weights[token]);
            for (index, part) in parts.iter_mut().enumerate() {
                let at = token % LANES * size + start + index * LANES;
                // SAFETY: the group has eight rows of `size` numbers, see `gather`.
                let value = unsafe { L::load(chunk.values[group].add(at)) };
                *part = weight.mul_add(value, *part);
            }
        }
    }
    for (index, part) in parts.into_iter().enumerate() {
        // SAFETY: as at the top.
        unsafe { part.store(sums.as_mut_ptr().add(index * LANES)) };
    }
}

/// Divides the sums and writes them where the heads of each token are side by side.
#[inline(always)]
unsafe fn store_output<T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    sums: &[f32],
    softmax: &[(f32, f32)],
) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.tokens as usize * group;
    for (row, (sums, (_, weight))) in sums.chunks_exact(size).zip(softmax).take(rows).enumerate() {
        let token = tile.first as usize + row / group;
        let head = tile.kv_head as usize * group + row % group;
        let scale = 1.0 / weight;
        for (at, sum) in sums.iter().enumerate() {
            let place = (token * layer.config.num_heads + head) * size + at;
            let value = T::narrow(sum * scale);
            // SAFETY: token and head are the step's and the rank's, so this is inside the output, and this tile's alone.
            unsafe { layer.tensors.output.add(place).write(value) };
        }
    }
}
