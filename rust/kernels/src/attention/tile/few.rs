//! A few rows: keys and values are read where they lie, once for all rows that see the same of them.

#![expect(unsafe_code, reason = "reads a cache that other processes may write")]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use std::ops::Range;

use super::{
    super::{Layer, step::Tile},
    Chunk, Scratch, parts,
    softmax::hide,
    values::add_rows,
};
use crate::{
    element::Element,
    simd::{LANES, Lanes, Vector, Wide},
};

/// Rows of a KV head, at most: more would read the same keys too often.
pub(super) const ROWS: usize = 8;
/// Rows that are computed together, at most: their sums are in registers.
const TILE: usize = 4;

/// Takes a chunk into the sums of a tile's rows.
///
/// # Safety
/// As [`attend`](super::attend), of a tile with at most [`ROWS`] rows.
#[inline(always)]
pub(super) unsafe fn take<W: Wide, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    chunk: &Chunk<T>,
    scratch: &mut Scratch,
) {
    let size = layer.config.head_dim;
    // SAFETY: the caller's promise; what a row sees ends where the tile does or before.
    unsafe {
        for at in places(layer, tile, chunk) {
            match at.rows.len() {
                1 => score::<W, T, 1>(layer, &at, chunk, scratch),
                2 => score::<W, T, 2>(layer, &at, chunk, scratch),
                3 => score::<W, T, 3>(layer, &at, chunk, scratch),
                _ => score::<W, T, 4>(layer, &at, chunk, scratch),
            }
        }
        scratch.weigh::<W::Half>(tile.rows(layer.config.group()));
        for at in places(layer, tile, chunk) {
            let values = chunk.values.map(|values| values.wrapping_add(at.head));
            let (row, values) = (at.rows.start, (&values[..], &at.seen));
            match at.rows.len() {
                1 => add_rows::<W, T, 1>(row, values, scratch, size),
                2 => add_rows::<W, T, 2>(row, values, scratch, size),
                3 => add_rows::<W, T, 3>(row, values, scratch, size),
                _ => add_rows::<W, T, 4>(row, values, scratch, size),
            }
        }
    }
}

/// Rows of one token and one KV head that are computed together.
struct At {
    rows: Range<usize>,
    /// Numbers from the tile's first head's keys or values to theirs.
    head: usize,
    /// What they see of a chunk.
    seen: Range<usize>,
}

/// All rows of a tile.
fn places<T>(layer: &Layer<'_, T>, tile: &Tile, chunk: &Chunk<T>) -> impl Iterator<Item = At> {
    let config = &layer.config;
    let (group, each) = (config.group(), tile.tokens as usize * config.group());
    (0..tile.rows(group)).step_by(group).flat_map(move |first| {
        parts(group, TILE).map(move |part| At {
            rows: first + part.start..first + part.end,
            head: first / each * config.block_size * config.head_dim,
            seen: layer.range(tile, chunk.start, first % each),
        })
    })
}

/// The scores of `R` rows with a chunk's tokens; minus infinity for those that they do not see.
#[inline(always)]
unsafe fn score<W: Wide, T: Element, const R: usize>(
    layer: &Layer<'_, T>,
    at: &At,
    chunk: &Chunk<T>,
    scratch: &mut Scratch,
) {
    let (size, row, seen) = (layer.config.head_dim, at.rows.start, &at.seen);
    let query = scratch.query[row * size..(row + R) * size].as_ptr();
    let scores = &mut scratch.weights[row..row + R];
    // At most eight sums at a time: `R` rows with so many tokens.
    let tokens = const { LANES / R.next_power_of_two() };
    for first in (seen.start / LANES * LANES..seen.end).step_by(tokens) {
        // SAFETY: the group has eight rows.
        let products = unsafe {
            let keys = chunk.keys[first / LANES].add(at.head + first % LANES * size);
            products::<W, T, R>(query, keys, size)
        };
        let mut numbers = [0.0; LANES];
        // SAFETY: the array has room for eight.
        unsafe {
            let scores = layer.bend(W::Half::sums(products));
            scores.store(numbers.as_mut_ptr());
        }
        for (scores, numbers) in scores.iter_mut().zip(numbers.chunks_exact(tokens)) {
            scores[first..first + tokens].copy_from_slice(numbers);
        }
    }
    for scores in scores {
        hide(scores, seen);
    }
}

/// Products of `R` rows with as many keys as make eight, each still eight sums: those of the numbers that are eight apart
/// (where registers are longer, sixteen, then both halves and what is left).
#[inline(always)]
unsafe fn products<W: Wide, T: Element, const R: usize>(
    query: *const f32,
    keys: *const T,
    size: usize,
) -> [W::Half; LANES] {
    let tokens = const { LANES / R.next_power_of_two() };
    let whole = size / W::LEN * W::LEN;
    let mut products = [W::Half::splat(0.0); LANES];
    let mut broad = [W::splat(0.0); LANES];
    // SAFETY: the caller's promise: rows and keys have `size` numbers.
    unsafe {
        for at in (0..whole).step_by(W::LEN) {
            for token in 0..tokens {
                let key: W = T::load_unzipped(keys.add(token * size + at));
                let (low, high) = key.halves();
                for row in 0..R {
                    let (place, query) = (row * tokens + token, query.add(row * size + at));
                    if W::IS_ONE {
                        broad[place] = W::load(query).mul_add(key, broad[place]);
                    } else {
                        let product = W::Half::load(query).mul_add(low, products[place]);
                        products[place] = W::Half::load(query.add(LANES)).mul_add(high, product);
                    }
                }
            }
        }
        if W::IS_ONE {
            for (product, broad) in products.iter_mut().zip(broad) {
                let (low, high) = broad.halves();
                *product = low.add(high);
            }
        }
        if whole < size {
            for token in 0..tokens {
                let key: W::Half = T::load_unzipped(keys.add(token * size + whole));
                for row in 0..R {
                    let product = &mut products[row * tokens + token];
                    let query = W::Half::load(query.add(row * size + whole));
                    *product = query.mul_add(key, *product);
                }
            }
        }
    }
    products
}
