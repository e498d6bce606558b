//! The online softmax of a chunk (Milakov and Gimelshein, 2018): of sixteen rows side by side, or of a few by themselves.
//!
//! Scores come as `[tokens, rows]`. Sixteen rows are computed with a register for each token, and their weights turned
//! round at the end; a few rows, as decodes have them, would leave most of such registers empty, and are turned round
//! first. Largest scores do not depend on the order, and both add up the weights in the same one: four sums, of every
//! fourth token each, and then `(0 + 1) + (2 + 3)`.

#![expect(unsafe_code, reason = "reads and writes what a thread has laid out")]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _CMP_EQ_OQ, _MM_CMPINT_LT, _MM_CMPINT_NLT, _mm_add_ps,
    _mm_cvtss_f32, _mm_hadd_ps, _mm_setzero_ps, _mm512_add_epi32, _mm512_cmp_epi32_mask,
    _mm512_cmp_ps_mask, _mm512_cvtne2ps_pbh, _mm512_cvtss_f32, _mm512_extractf32x4_ps,
    _mm512_i32gather_ps, _mm512_loadu_si512, _mm512_mask_mov_ps, _mm512_mullo_epi32,
    _mm512_permutexvar_epi16, _mm512_reduce_max_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512, _mm512_sub_epi32,
    _mm512_sub_ps, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

use super::{CHUNK, LINES};
use crate::{
    pairs::{PANEL, PanelSums},
    simd::{Arithmetic, Avx512, Vector},
};

/// So many rows are computed by themselves.
pub(super) const FEW_ROWS: usize = 4;
/// Panels in a row of scores.
const PANELS: usize = 2;
/// Sums of weights that run side by side.
const SUMS: usize = 4;

/// What is done to a score before it counts.
pub(super) struct Bend {
    pub(super) scale: f32,
    pub(super) soft_cap: Option<f32>,
}

/// What the rows of a panel see.
pub(super) struct Seen {
    /// The position of the chunk.
    pub(super) start: i32,
    /// `[PANEL]`: tokens up to each row's own.
    pub(super) tokens: *const i32,
    /// Of these the last so many.
    pub(super) window: Option<i32>,
}

impl Bend {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    fn apply(&self, scores: __m512) -> __m512 {
        let scores = Avx512(scores).mul(Avx512::splat(self.scale));
        match self.soft_cap {
            Some(cap) => {
                let part = scores.mul(Avx512::splat(1.0 / cap));
                part.tanh().mul(Avx512::splat(cap)).0
            }
            None => scores.0,
        }
    }
}

impl Seen {
    /// `scores` of a token, those of rows that do not see it lowered to minus infinity. Of each number, `token` says where
    /// in the chunk it is and `seen` how many tokens its row sees.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    fn mask(&self, scores: __m512, token: __m512i, seen: __m512i) -> __m512 {
        let position = _mm512_add_epi32(token, _mm512_set1_epi32(self.start));
        let mut is_seen = _mm512_cmp_epi32_mask::<_MM_CMPINT_LT>(position, seen);
        if let Some(window) = self.window {
            let lowest = _mm512_sub_epi32(seen, _mm512_set1_epi32(window));
            is_seen &= _mm512_cmp_epi32_mask::<_MM_CMPINT_NLT>(position, lowest);
        }
        _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), is_seen, scores)
    }
}

/// Makes weights of a panel's scores, and says what each row's sums so far are multiplied by.
///
/// # Safety
/// `scores` are `[CHUNK, PANELS]`, of which these rows have the first; `weights`, and largest scores and totals in `state`,
/// are those of `PANEL` rows.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn weigh_panel(
    bend: &Bend,
    seen: &Seen,
    scores: *mut PanelSums,
    weights: *mut __m512i,
    (most, total): (*mut f32, *mut f32),
    kept: &mut [f32; PANEL],
) {
    // SAFETY: the caller's promise.
    let (tokens, largest) = unsafe {
        let tokens = _mm512_loadu_si512(seen.tokens.cast());
        (tokens, Avx512::load(most))
    };
    let mut now = largest;
    for token in 0..CHUNK {
        // SAFETY: the caller's promise.
        unsafe {
            let place = scores.add(token * PANELS).cast::<f32>();
            let bent = bend.apply(Avx512::load(place).0);
            let bent = Avx512(seen.mask(bent, _mm512_set1_epi32(token as i32), tokens));
            bent.store(place);
            now = bent.max(now);
        }
    }
    let lowered = now.lowered();
    let mut sums = [Avx512::splat(0.0); SUMS];
    let mut pairs = [_mm512_setzero_si512(); CHUNK / 2];
    for four in 0..CHUNK / SUMS {
        let mut each = [Avx512::splat(0.0); SUMS];
        for (next, (each, sum)) in each.iter_mut().zip(&mut sums).enumerate() {
            let token = four * SUMS + next;
            // SAFETY: the caller's promise.
            let bent = unsafe { Avx512::load(scores.add(token * PANELS).cast()) };
            *each = bent.add(lowered).exp();
            *sum = sum.add(*each);
        }
        pairs[2 * four] = side_by_side(each[0].0, each[1].0);
        pairs[2 * four + 1] = side_by_side(each[2].0, each[3].0);
    }
    let factor = largest.add(lowered).exp();
    let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3]));
    // SAFETY: the caller's promise.
    unsafe {
        factor.store(kept.as_mut_ptr());
        now.store(most);
        Avx512::load(total).mul_add(factor, sum).store(total);
        for (at, pairs) in pairs.as_chunks().0.iter().enumerate() {
            for (row, line) in turned(pairs).into_iter().enumerate() {
                _mm512_storeu_si512(weights.add(row * LINES + at), line);
            }
        }
    }
}

/// The same of a few rows, one by one.
///
/// # Safety
/// As [`weigh_panel`], of `rows` rows.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
pub(super) unsafe fn weigh_rows(
    bend: &Bend,
    seen: &Seen,
    (scores, rows): (*mut PanelSums, usize),
    weights: *mut __m512i,
    (most, total): (*mut f32, *mut f32),
    kept: &mut [f32; PANEL],
) {
    const TOKENS: [i32; PANEL] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    const LINE: usize = PANELS * PANEL;
    // SAFETY: the array is a register.
    let tokens = unsafe { _mm512_loadu_si512(TOKENS.as_ptr().cast()) };
    let lines = _mm512_mullo_epi32(tokens, _mm512_set1_epi32(LINE as i32));
    for (row, kept) in kept.iter_mut().enumerate().take(rows) {
        // SAFETY: the caller's promise.
        let (row_tokens, largest) = unsafe { (*seen.tokens.add(row), *most.add(row)) };
        let row_tokens = _mm512_set1_epi32(row_tokens);
        let mut bent = [Avx512::splat(0.0); CHUNK / PANEL];
        let mut now = largest;
        for (part, bent) in bent.iter_mut().enumerate() {
            // SAFETY: the caller's promise: there are scores of every token.
            let column = unsafe {
                let place = scores.cast::<f32>().add(part * PANEL * LINE + row);
                _mm512_i32gather_ps::<4>(lines, place)
            };
            let token = _mm512_add_epi32(tokens, _mm512_set1_epi32((part * PANEL) as i32));
            *bent = Avx512(seen.mask(bend.apply(column), token, row_tokens));
            now = now.max(_mm512_reduce_max_ps(bent.0));
        }
        let lowered = Avx512::splat(now).lowered();
        let each = bent.map(|bent| bent.add(lowered).exp());
        let factor = _mm512_cvtss_f32(Avx512::splat(largest).add(lowered).exp().0);
        // SAFETY: the caller's promise.
        unsafe {
            *kept = factor;
            *most.add(row) = now;
            *total.add(row) = (*total.add(row)).mul_add(factor, sum(each));
            for (at, each) in each.chunks_exact(2).enumerate() {
                let line = _mm512_cvtne2ps_pbh(each[1].0, each[0].0);
                let bits = std::mem::transmute::<__m512bh, __m512i>(line);
                _mm512_storeu_si512(weights.add(row * LINES + at), bits);
            }
        }
    }
}

impl Avx512 {
    /// What is added to scores: minus the largest, and nothing where a row has seen no token yet.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    fn lowered(self) -> Self {
        let is_none = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, _mm512_set1_ps(f32::NEG_INFINITY));
        let zero = _mm512_set1_ps(0.0);
        Self(_mm512_mask_mov_ps(
            _mm512_sub_ps(zero, self.0),
            is_none,
            zero,
        ))
    }
}

/// The sum of the weights of a row, in the order of `weigh_panel`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
fn sum(weights: [Avx512; CHUNK / PANEL]) -> f32 {
    let mut sums = _mm_setzero_ps();
    for weights in weights {
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps::<0>(weights.0));
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps::<1>(weights.0));
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps::<2>(weights.0));
        sums = _mm_add_ps(sums, _mm512_extractf32x4_ps::<3>(weights.0));
    }
    let pairs = _mm_hadd_ps(sums, sums);
    _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs))
}

/// Sixteen weights of one token and of the next, rounded: those of a row side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn side_by_side(token: __m512, next: __m512) -> __m512i {
    const PLACES: [u16; 2 * PANEL] = {
        let mut places = [0; 2 * PANEL];
        let mut at = 0;
        while at < 2 * PANEL {
            places[at] = (at / 2 + at % 2 * PANEL) as u16;
            at += 1;
        }
        places
    };
    // SAFETY: the array is a register, and both kinds of register hold the same bits.
    unsafe {
        let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
        let bits = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(next, token));
        _mm512_permutexvar_epi16(places, bits)
    }
}

/// Sixteen rows of sixteen words, turned into columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn turned(rows: &[__m512i; PANEL]) -> [__m512i; PANEL] {
    let mut twos = *rows;
    for at in (0..PANEL).step_by(2) {
        twos[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
        twos[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
    }
    // Of four rows: in quarter `q` of the `j`th the column `4 * q + j`.
    let mut fours = twos;
    for at in (0..PANEL).step_by(4) {
        fours[at] = _mm512_unpacklo_epi64(twos[at], twos[at + 2]);
        fours[at + 1] = _mm512_unpackhi_epi64(twos[at], twos[at + 2]);
        fours[at + 2] = _mm512_unpacklo_epi64(twos[at + 1], twos[at + 3]);
        fours[at + 3] = _mm512_unpackhi_epi64(twos[at + 1], twos[at + 3]);
    }
    let mut columns = fours;
    for at in 0..4 {
        let [low, high] = [at, at + 8].map(|at| (fours[at], fours[at + 4]));
        let even = [low, high].map(|(a, b)| _mm512_shuffle_i32x4::<0x88>(a, b));
        let odd = [low, high].map(|(a, b)| _mm512_shuffle_i32x4::<0xdd>(a, b));
        columns[at] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        columns[at + 4] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        columns[at + 8] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        columns[at + 12] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    columns
}
