//! Many rows: a chunk is laid out once for all, keys by their numbers, and tiles of sums stay in registers.

#![expect(unsafe_code, reason = "reads a cache that other processes may write")]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use std::ops::Range;

use super::{
    super::{CHUNK, Layer, step::Tile},
    Chunk, PANEL, Scratch, copy_unzipped, parts,
    softmax::hide,
    values::add_rows,
};
use crate::{
    element::Element,
    simd::{LANES, Lanes, Vector, Wide},
};

/// Rows whose sums are in registers at a time, at most: with one vector of sixteen each, or two where that is a register.
const TILE: usize = 6;
/// Partial sums of a score, each of every eighth number, are added up in pairs, and pairs of pairs.
const LEVELS: usize = LANES.ilog2() as usize;

/// Takes a chunk into the sums of a tile's rows.
///
/// # Safety
/// As [`attend`](super::attend).
#[inline(always)]
pub(super) unsafe fn take<W: Wide, T: Element>(
    layer: &Layer<'_, T>,
    tile: &Tile,
    chunk: &Chunk<T>,
    scratch: &mut Scratch,
) {
    let size = layer.config.head_dim;
    let rows = tile.tokens as usize * layer.config.group();
    let seen = |row| layer.range(tile, chunk.start, row);
    // SAFETY: the caller's promise; each part stays inside the rows and inside a chunk.
    unsafe {
        lay_out::<W, T>(chunk, scratch, size);
        // Each panel of keys stays in the first cache while all rows take it.
        let panels = const { if W::IS_ONE { 2 } else { 1 } };
        let first = seen(0).start / (panels * PANEL) * panels;
        for panel in (first..chunk.groups.div_ceil(PANEL / LANES)).step_by(panels) {
            for part in parts(rows, TILE) {
                if seen(part.end - 1).end > panel * PANEL {
                    score_part::<W, T>(layer, part, panel, scratch);
                }
            }
        }
        for (row, scores) in scratch.weights[..rows].iter_mut().enumerate() {
            hide(scores, &seen(row));
        }
        scratch.weigh::<W::Half>(rows);
        for part in parts(rows, TILE) {
            // What any of them sees.
            let range = seen(part.start).start..seen(part.end - 1).end;
            if !range.is_empty() {
                add_part::<W>(part, &range, scratch, size);
            }
        }
    }
}

/// Lays out a chunk's keys and values.
#[inline(always)]
unsafe fn lay_out<W: Wide, T: Element>(chunk: &Chunk<T>, scratch: &mut Scratch, size: usize) {
    for group in 0..chunk.groups {
        let first = group * LANES;
        let place = first / PANEL * PANEL * size + first % PANEL;
        // SAFETY: the caller's promise: eight tokens lie there.
        unsafe {
            lay_out_keys::<W, T>(chunk.keys[group], &mut scratch.keys[place..], size);
            let room = scratch.values[first * size..].chunks_exact_mut(size);
            for (token, room) in room.take(LANES).enumerate() {
                copy_unzipped::<W, T>(chunk.values[group].add(token * size), room);
            }
        }
    }
}

/// Lays out eight keys, number by number.
#[inline(always)]
unsafe fn lay_out_keys<W: Wide, T: Element>(from: *const T, to: &mut [f32], size: usize) {
    let whole = size / W::LEN * W::LEN;
    // SAFETY: the caller's promise.
    unsafe {
        for at in (0..whole).step_by(W::LEN) {
            let mut low = [W::Half::splat(0.0); LANES];
            let mut high = low;
            for token in 0..LANES {
                let key: W = T::load_unzipped(from.add(token * size + at));
                (low[token], high[token]) = key.halves();
            }
            store_columns(low, &mut to[at * PANEL..]);
            store_columns(high, &mut to[(at + LANES) * PANEL..]);
        }
        if whole < size {
            let mut rest = [W::Half::splat(0.0); LANES];
            for (token, rest) in rest.iter_mut().enumerate() {
                *rest = T::load_unzipped(from.add(token * size + whole));
            }
            store_columns(rest, &mut to[whole * PANEL..]);
        }
    }
}

#[inline(always)]
fn store_columns<L: Lanes>(rows: [L; LANES], to: &mut [f32]) {
    for (column, numbers) in L::columns(rows).into_iter().enumerate() {
        let to = &mut to[column * PANEL..][..LANES];
        // SAFETY: the slice has room for eight.
        unsafe { numbers.store(to.as_mut_ptr()) };
    }
}

/// The scores of some rows with one panel, or two where a register holds one.
#[inline(always)]
unsafe fn score_part<W: Wide, T: Element>(
    layer: &Layer<'_, T>,
    part: Range<usize>,
    panel: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match part.len() {
            1 => score_rows::<W, T, 1>(layer, part.start, panel, scratch),
            2 => score_rows::<W, T, 2>(layer, part.start, panel, scratch),
            3 => score_rows::<W, T, 3>(layer, part.start, panel, scratch),
            4 => score_rows::<W, T, 4>(layer, part.start, panel, scratch),
            5 => score_rows::<W, T, 5>(layer, part.start, panel, scratch),
            _ => score_rows::<W, T, 6>(layer, part.start, panel, scratch),
        }
    }
}

#[inline(always)]
unsafe fn score_rows<W: Wide, T: Element, const R: usize>(
    layer: &Layer<'_, T>,
    row: usize,
    panel: usize,
    scratch: &mut Scratch,
) {
    let size = layer.config.head_dim;
    let query = &scratch.query[row * size..(row + R) * size];
    let (keys, scores) = (
        (&scratch.keys[..], panel),
        &mut scratch.weights[row..row + R],
    );
    // SAFETY: the caller's promise.
    unsafe {
        if W::IS_ONE {
            score::<W, T, R, 2>(layer, query, keys, scores);
        } else {
            score::<W, T, R, 1>(layer, query, keys, scores);
        }
    }
}

/// Adds the values of `range` to the sums of some rows.
#[inline(always)]
unsafe fn add_part<W: Wide>(
    part: Range<usize>,
    range: &Range<usize>,
    scratch: &mut Scratch,
    size: usize,
) {
    let (row, values) = (part.start, [scratch.values.as_ptr()]);
    let values = (&values[..], range);
    // SAFETY: the caller's promise.
    unsafe {
        match part.len() {
            1 => add_rows::<W, f32, 1>(row, values, scratch, size),
            2 => add_rows::<W, f32, 2>(row, values, scratch, size),
            3 => add_rows::<W, f32, 3>(row, values, scratch, size),
            4 => add_rows::<W, f32, 4>(row, values, scratch, size),
            5 => add_rows::<W, f32, 5>(row, values, scratch, size),
            _ => add_rows::<W, f32, 6>(row, values, scratch, size),
        }
    }
}

/// The scores of `R` rows with `N` panels of keys, added up in the order of [`few`](super::few).
#[inline(always)]
unsafe fn score<W: Wide, T: Element, const R: usize, const N: usize>(
    layer: &Layer<'_, T>,
    query: &[f32],
    (keys, panel): (&[f32], usize),
    scores: &mut [[f32; CHUNK]],
) {
    let size = query.len() / R;
    let keys = &keys[panel * size * PANEL..(panel + N) * size * PANEL];
    let whole = if W::IS_ONE { size / W::LEN * W::LEN } else { 0 };
    let zeros = [[W::splat(0.0); N]; R];
    let mut levels = [zeros; LEVELS];
    for lane in 0..LANES {
        let mut sums = zeros;
        // SAFETY: keys and rows have `size` numbers.
        unsafe {
            if W::IS_ONE {
                let mut upper = zeros;
                add_products(&mut sums, (query, keys), (lane..whole, W::LEN));
                add_products(&mut upper, (query, keys), (lane + LANES..whole, W::LEN));
                add(&mut sums, &upper);
            }
            add_products(&mut sums, (query, keys), (whole + lane..size, LANES));
        }
        // What a binary counter does.
        let mut level = 0;
        while lane >> level & 1 == 1 {
            add(&mut sums, &levels[level]);
            level += 1;
        }
        if level < LEVELS {
            levels[level] = sums;
            continue;
        }
        for (sums, scores) in sums.into_iter().zip(scores.iter_mut()) {
            for (index, sum) in sums.into_iter().enumerate() {
                let (low, high) = sum.halves();
                let to = &mut scores[(panel + index) * PANEL..][..PANEL];
                // SAFETY: the slice has room for sixteen.
                unsafe {
                    layer.bend(low).store(to.as_mut_ptr());
                    layer.bend(high).store(to.as_mut_ptr().add(LANES));
                }
            }
        }
    }
}

/// Adds the products of every `step`th number.
#[inline(always)]
unsafe fn add_products<V: Vector, const R: usize, const N: usize>(
    sums: &mut [[V; N]; R],
    (query, keys): (&[f32], &[f32]),
    (numbers, step): (Range<usize>, usize),
) {
    let size = query.len() / R;
    for at in numbers.step_by(step) {
        let mut key = [V::splat(0.0); N];
        for (index, key) in key.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *key = unsafe { V::load(keys.as_ptr().add((index * size + at) * PANEL)) };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let query = V::splat(unsafe { *query.as_ptr().add(row * size + at) });
            for (sum, key) in sums.iter_mut().zip(key) {
                *sum = query.mul_add(key, *sum);
            }
        }
    }
}

#[inline(always)]
fn add<V: Vector, const R: usize, const N: usize>(sums: &mut [[V; N]; R], others: &[[V; N]; R]) {
    for (sums, others) in sums.iter_mut().zip(others) {
        for (sum, other) in sums.iter_mut().zip(others) {
            *sum = sum.add(*other);
        }
    }
}
