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
use crate::{
    element::Element,
    simd::{Arithmetic, LANES, Lanes, Vector, Wide},
    spares::Spare,
};

const GROUPS: usize = CHUNK / LANES;

/// What a thread needs beside the tensors.
#[derive(Default)]
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

impl Spare for Scratch {}

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
pub(super) unsafe fn attend<W: Wide, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    scratch: &mut Scratch,
) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.tokens as usize * group;
    // SAFETY: the caller's promise.
    unsafe { load_queries::<W::Half, T>(layer, tile, &mut scratch.query[..rows * size]) };
    scratch.sums[..rows * size].fill(0.0);
    scratch.softmax[..rows].fill((f32::NEG_INFINITY, 0.0));
    let first_seen = tile.seen as usize;
    let last_seen = tile.last_seen();
    let begin = layer.rule.first_seen(first_seen) / CHUNK * CHUNK;
    for start in (begin..last_seen).step_by(CHUNK) {
        // SAFETY: the caller's promise.
        let chunk = unsafe { gather::<W, T>(layer, tile, (start, last_seen), &mut scratch.room) };
        // What a row sees of the chunk.
        let range = |row: usize| {
            let seen = first_seen + row / group;
            let low = layer.rule.first_seen(seen).saturating_sub(start);
            (low, seen.saturating_sub(start).min(CHUNK))
        };
        let mut row = 0;
        while row < rows {
            let (low, high) = range(row);
            // Keys and values come from the second cache: the more rows use them at a time, the better.
            let are_alike = |count: usize| {
                row + count <= rows && (row + 1..row + count).all(|row| range(row) == (low, high))
            };
            let together = [4, 2]
                .into_iter()
                .find(|count| are_alike(*count))
                .unwrap_or(1);
            if low < high {
                let place = row * size..(row + together) * size;
                let query = &scratch.query[place.clone()];
                let sums = &mut scratch.sums[place];
                let softmax = &mut scratch.softmax[row..row + together];
                // SAFETY: the chunk's pointers hold the groups below `high`, which is at most `last_seen - start`.
                unsafe {
                    let rows = (query, sums, softmax);
                    match together {
                        4 => take::<W, T, 4>(layer, rows, &chunk, (low, high)),
                        2 => take::<W, T, 2>(layer, rows, &chunk, (low, high)),
                        _ => take::<W, T, 1>(layer, rows, &chunk, (low, high)),
                    }
                }
            }
            row += together;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_output(layer, tile, &scratch.sums, &scratch.softmax) };
}

#[inline(always)]
unsafe fn load_queries<L: Lanes, T: Element>(layer: &Layer<'_, T>, tile: &Tile, rows: &mut [f32]) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    for (row, target) in rows.chunks_exact_mut(size).enumerate() {
        let (token, head) = tile.place(0, row, group);
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
unsafe fn gather<W: Wide, T: Element>(
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
            chunk.keys[group] = T::floats::<W>(at(0), LANES * size, room);
            chunk.values[group] = T::floats::<W>(at(1), LANES * size, room.add(LANES * size));
        }
    }
    chunk
}

/// Takes a chunk into the sums of `R` rows that see the same of it. Each row's own sums are the same for every `R`; several
/// at a time read keys and values once for all.
#[inline(always)]
unsafe fn take<W: Wide, T: Element, const R: usize>(
    layer: &Layer<'_, T>,
    (query, sums, softmax): (&[f32], &mut [f32], &mut [(f32, f32)]),
    chunk: &Chunk,
    (low, high): (usize, usize),
) {
    // SAFETY: the caller's promise.
    let mut weights = unsafe { scores::<W, T, R>(layer, query, chunk, (low, high)) };
    let mut kept = [1.0; R];
    for (row, weights) in weights.iter_mut().enumerate() {
        kept[row] = weigh::<W::Half>(weights, &mut softmax[row]);
    }
    let size = sums.len() / R;
    let mut start = 0;
    // As many sums at a time as there are registers for.
    // SAFETY: each call stays inside the rows, and inside those of the groups that `low..high` touches.
    unsafe {
        while (W::IS_ONE || R == 1) && start + 4 * W::LEN <= size {
            add_values::<W, R, 4>(&weights, chunk, (low, high), (sums, start), &kept);
            start += 4 * W::LEN;
        }
        while (W::IS_ONE || R <= 2) && start + 2 * W::LEN <= size {
            add_values::<W, R, 2>(&weights, chunk, (low, high), (sums, start), &kept);
            start += 2 * W::LEN;
        }
        while start + W::LEN <= size {
            add_values::<W, R, 1>(&weights, chunk, (low, high), (sums, start), &kept);
            start += W::LEN;
        }
        while start < size {
            add_values::<W::Half, R, 1>(&weights, chunk, (low, high), (sums, start), &kept);
            start += LANES;
        }
    }
}

/// The scores of `R` rows with a chunk's tokens; minus infinity for those that they do not see.
#[inline(always)]
unsafe fn scores<W: Wide, T: Element, const R: usize>(
    layer: &Layer<'_, T>,
    query: &[f32],
    chunk: &Chunk,
    (low, high): (usize, usize),
) -> [[f32; CHUNK]; R] {
    let mut scores = [[f32::NEG_INFINITY; CHUNK]; R];
    let size = query.len() / R;
    // Eight sums at a time: `R` rows with so many tokens.
    let tokens = LANES / R;
    for first in (low / LANES * LANES..high).step_by(tokens) {
        // SAFETY: the group has eight rows, see `gather`.
        let keys = unsafe { chunk.keys[first / LANES].add(first % LANES * size) };
        let mut products = [W::Half::splat(0.0); LANES];
        let broad = if W::IS_ONE { size / W::LEN * W::LEN } else { 0 };
        // SAFETY: the ranges are inside each row, and the rows inside the group.
        unsafe {
            if broad > 0 {
                let mut sums = [W::splat(0.0); LANES];
                add_products::<W, R>((query, keys), (0, broad), &mut sums);
                for (product, sum) in products.iter_mut().zip(sums) {
                    let (low, high) = sum.halves();
                    *product = low.add(high);
                }
            }
            add_products::<W::Half, R>((query, keys), (broad, size), &mut products);
        }
        let mut bent = W::Half::sums(products).mul(W::Half::splat(layer.scale));
        if let Some(cap) = layer.rule.soft_cap {
            let part = bent.mul(W::Half::splat(1.0 / cap));
            bent = part.tanh().mul(W::Half::splat(cap));
        }
        let mut numbers = [0.0; LANES];
        // SAFETY: the array has room for eight.
        unsafe { bent.store(numbers.as_mut_ptr()) };
        for (row, scores) in scores.iter_mut().enumerate() {
            let from = &numbers[row * tokens..][..tokens];
            scores[first..first + tokens].copy_from_slice(from);
        }
    }
    for scores in &mut scores {
        scores[..low].fill(f32::NEG_INFINITY);
        scores[high..].fill(f32::NEG_INFINITY);
    }
    scores
}

/// Adds the products of some numbers, `begin` to `end`, of `R` rows with those of `LANES / R` keys.
#[inline(always)]
unsafe fn add_products<V: Vector, const R: usize>(
    (query, keys): (&[f32], *const f32),
    (begin, end): (usize, usize),
    products: &mut [V; LANES],
) {
    let size = query.len() / R;
    let tokens = LANES / R;
    for at in (begin..end).step_by(V::LEN) {
        let mut queries = [V::splat(0.0); R];
        for (row, part) in queries.iter_mut().enumerate() {
            // SAFETY: `at` is inside each row.
            *part = unsafe { V::load(query.as_ptr().add(row * size + at)) };
        }
        for token in 0..tokens {
            // SAFETY: the caller's promise.
            let key = unsafe { V::load(keys.add(token * size + at)) };
            for (row, part) in queries.iter().enumerate() {
                let product = &mut products[row * tokens + token];
                *product = part.mul_add(key, *product);
            }
        }
    }
}

/// Makes weights of a row's scores, relative to its largest score so far; returns what its sums so far are multiplied by.
#[inline(always)]
fn weigh<L: Lanes>(scores: &mut [f32; CHUNK], softmax: &mut (f32, f32)) -> f32 {
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
        L::splat(largest - now).exp().largest()
    } else {
        1.0
    };
    *softmax = (now, weight * kept + weights.sum());
    kept
}

/// Adds `N` vectors of each value that `R` rows see, in the order of the tokens.
#[inline(always)]
unsafe fn add_values<V: Vector, const R: usize, const N: usize>(
    weights: &[[f32; CHUNK]; R],
    chunk: &Chunk,
    (low, high): (usize, usize),
    (sums, start): (&mut [f32], usize),
    kept: &[f32; R],
) {
    let size = sums.len() / R;
    let mut parts = [[V::splat(0.0); N]; R];
    for (row, parts) in parts.iter_mut().enumerate() {
        for (index, part) in parts.iter_mut().enumerate() {
            let at = row * size + start + index * V::LEN;
            // SAFETY: the caller's promise: `N` vectors are there, from `start` on, of each row.
            *part = unsafe { V::load(sums.as_ptr().add(at)) }.mul(V::splat(kept[row]));
        }
    }
    for token in low..high {
        let mut weight = [V::splat(0.0); R];
        for (weight, weights) in weight.iter_mut().zip(weights) {
            *weight = V::splat(weights[token]);
        }
        // SAFETY: the group has eight rows of `size` numbers, see `gather`.
        let values = unsafe { chunk.values[token / LANES].add(token % LANES * size + start) };
        let mut value = [V::splat(0.0); N];
        for (index, value) in value.iter_mut().enumerate() {
            // SAFETY: as above.
            *value = unsafe { V::load(values.add(index * V::LEN)) };
        }
        for (parts, weight) in parts.iter_mut().zip(weight) {
            for (part, value) in parts.iter_mut().zip(value) {
                *part = weight.mul_add(value, *part);
            }
        }
    }
    for (row, parts) in parts.into_iter().enumerate() {
        for (index, part) in parts.into_iter().enumerate() {
            let at = row * size + start + index * V::LEN;
            // SAFETY: as at the top.
            unsafe { part.store(sums.as_mut_ptr().add(at)) };
        }
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
        let (token, head) = tile.place(0, row, group);
        let scale = 1.0 / weight;
        for (at, sum) in sums.iter().enumerate() {
            let place = (token * layer.config.num_heads + head) * size + at;
            let value = T::narrow(sum * scale);
            // SAFETY: token and head are the step's and the rank's, so this is inside the output, and this tile's alone.
            unsafe { layer.tensors.output.add(place).write(value) };
        }
    }
}
