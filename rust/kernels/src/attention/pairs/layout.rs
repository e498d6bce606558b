//! How queries and values are laid out for tiles, and sums for the tensors.

#![expect(
    unsafe_code,
    reason = "reads a cache that other processes may write, and writes what other threads write beside"
)]

use std::{
    arch::x86_64::{
        __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps,
        _mm512_permutexvar_epi16, _mm512_set1_ps, _mm512_setzero_si512, _mm512_storeu_si512,
        _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
    },
    ptr,
};

use super::{
    super::{Layer, step::Tile},
    CHUNK, Chunk, DEPTH, GROUP, GROUPS, LINES, Line, PANEL, Scratch,
};

/// Lays out the queries of a tile, two numbers of each side by side; zeros where there is no row.
///
/// # Safety
/// As [`attend`](super::attend).
pub(super) unsafe fn load_queries(layer: &Layer<'_, u16>, tile: &Tile, queries: &mut [Line]) {
    let (group, size) = (layer.config.group(), layer.config.head_dim);
    let rows = tile.tokens as usize * group;
    let panels = (tile.kv_heads as usize * rows.div_ceil(PANEL)).next_multiple_of(2);
    queries[..panels * size / 2].fill(Line([0; DEPTH]));
    for (place, token, head) in tile.panel_rows(group) {
        let lines = &mut queries[place / PANEL * size / 2..];
        let place = 2 * (place % PANEL);
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

impl Tile {
    /// Of each row: its place in the scratch, its token and its query head. Each KV head has whole panels.
    fn panel_rows(&self, group: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let rows = self.tokens as usize * group;
        (0..self.kv_heads as usize).flat_map(move |part| {
            (0..rows).map(move |row| {
                let (token, head) = self.place(part, row, group);
                (part * PANEL + row, token, head)
            })
        })
    }
}

/// The halves of a block.
#[derive(Clone, Copy)]
pub(super) enum Half {
    Keys,
    Values,
}

impl Layer<'_, u16> {
    /// Where the keys or the values of 16 tokens from `position` on begin, of one of the tile's KV heads.
    pub(super) fn run(&self, tile: &Tile, position: usize, half: Half, head: usize) -> *const u16 {
        let config = &self.config;
        let block = self.step.block(tile.sequence, position, config.block_size);
        let run = (2 * block + half as usize) * config.num_kv_heads + tile.kv_head as usize + head;
        let place = run * config.block_size + position % config.block_size;
        // Inside the cache: block ids were checked, and blocks hold multiples of 16 tokens.
        self.tensors
            .cache
            .wrapping_add(place * config.head_dim)
            .cast_const()
    }
}

/// Where a chunk's keys begin, each 16 of them.
pub(super) fn find_keys(
    layer: &Layer<'_, u16>,
    (tile, head): (&Tile, usize),
    chunk: &Chunk,
) -> [*const u16; GROUPS] {
    let mut keys = [ptr::null(); GROUPS];
    for group in 0..GROUPS {
        let position = chunk.start + group * GROUP;
        keys[group] = if position < chunk.end {
            layer.run(tile, position, Half::Keys, head)
        } else {
            // Nobody sees what lies there: any keys will do.
            keys[0]
        };
    }
    keys
}

/// Lays out the values of a chunk, two tokens side by side. Values that no row sees become zeros, for nothing is known of
/// what lies there.
///
/// # Safety
/// As [`attend`](super::attend).
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn load_values(
    layer: &Layer<'_, u16>,
    (tile, head): (&Tile, usize),
    chunk: &Chunk,
    values: &mut [Line],
) {
    let size = layer.config.head_dim;
    let values = &mut values[..size * LINES];
    for group in 0..GROUPS {
        let position = chunk.start + group * GROUP;
        if position >= chunk.end {
            for panel in values.chunks_exact_mut(CHUNK / 2) {
                panel[group * GROUP / 2..][..GROUP / 2].fill(Line([0; DEPTH]));
            }
            continue;
        }
        let from = layer.run(tile, position, Half::Values, head);
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
}

/// Divides the sums and writes them where the heads of each token are side by side.
///
/// # Safety
/// As [`attend`](super::attend).
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn store_output(layer: &Layer<'_, u16>, tile: &Tile, scratch: &Scratch) {
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
    let panels = size / PANEL;
    for (row, token, head) in tile.panel_rows(group) {
        let sums = &scratch.sums[row * panels..][..panels];
        let scale = _mm512_set1_ps(1.0 / scratch.total[row]);
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
