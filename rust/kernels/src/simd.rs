//! Eight or sixteen numbers at a time: one body for every kind of processor.
//!
//! A kernel is written once over [`Lanes`] or [`Wide`]. For AVX2 and AVX-512 it is compiled with fused multiply-add,
//! elsewhere with what the compiler makes of plain arrays. A fused one rounds once instead of twice, and sixteen numbers
//! are added up in another order than eight, so the twins differ in the last bits, and are never compared for equality.

#![expect(
    unsafe_code,
    reason = "numbers are read and written through pointers: shared memory has no references"
)]
#![expect(
    clippy::inline_always,
    reason = "has to be part of the kernels, which are compiled for each kind of processor"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
mod processor;

pub(crate) use self::portable::Portable;
pub(crate) use self::processor::Kind;
pub use self::processor::Processor;
#[cfg(target_arch = "x86_64")]
pub(crate) use self::{avx2::Avx2, avx512::Avx512};

/// Numbers in a [`Lanes`].
pub(crate) const LANES: usize = 8;
/// Numbers in the longest vector.
pub(crate) const WIDEST: usize = 16;

/// Some `f32`.
///
/// All methods of vectors are inlined into the kernel, which alone says for which processor it is compiled.
pub trait Vector: Copy {
    /// How many.
    const LEN: usize;
    /// The same number in all places.
    fn splat(value: f32) -> Self;
    /// Reads numbers, at any alignment.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes numbers, at any alignment.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn store(self, to: *mut f32);
    /// Reads bf16.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Writes bf16, rounded as [`narrow`](crate::bf16::narrow) does.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn store_bf16(self, to: *mut u16);
    /// Reads bf16 in an order of the vector's own, which is less work: for sums that do not ask for another.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn load_bf16_unzipped(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::load_bf16(from) }
    }
    /// Writes bf16 that are in that order, as `store_bf16` does those in order.
    ///
    /// # Safety
    /// There is room for them.
    #[inline(always)]
    unsafe fn store_bf16_zipped(self, to: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { self.store_bf16(to) }
    }
    /// Says that what lies at an address is wanted soon. The address may be any.
    fn prefetch<T>(from: *const T);
    /// Sums, number by number.
    fn add(self, other: Self) -> Self;
    /// Products, number by number.
    fn mul(self, other: Self) -> Self;
    /// `self * factor + term`.
    fn mul_add(self, factor: Self, term: Self) -> Self;
}

/// Sixteen `f32`: one register, or two of [`Lanes`].
pub(crate) trait Wide: Vector {
    /// Eight of them.
    type Half: Lanes;
    /// Whether it is one register, of which there are then 32.
    const IS_ONE: bool;
    /// The first eight and the last eight.
    fn halves(self) -> (Self::Half, Self::Half);
}

/// What goes from number to number.
pub trait Arithmetic: Vector {
    /// Quotients, number by number.
    fn div(self, other: Self) -> Self;
    /// The larger of each two; `other`'s where one is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller of each two; `other`'s where one is NaN.
    fn min(self, other: Self) -> Self;
    /// The nearest whole numbers, ties to even.
    fn round(self) -> Self;
    /// `self * 2^whole`, of whole numbers from -126 to 127.
    fn times_exp2(self, whole: Self) -> Self;
    /// `value`, but 0 where `self` is below `bound`.
    fn zero_below(self, value: Self, bound: f32) -> Self;

    /// `e^self`, within two units in the last place; 0 below -87. As in the Cephes library (`expf`): a power of two
    /// times a polynomial in what is left, which is at most `ln 2 / 2`.
    #[inline(always)]
    fn exp(self) -> Self {
        // In this order a NaN stays one.
        let x = Self::splat(EXP_MIN).max(Self::splat(88.0).min(self));
        let whole = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
        let rest = whole.mul_add(Self::splat(-0.693_359_4), x);
        let rest = whole.mul_add(Self::splat(2.121_944_4e-4), rest);
        let mut sum = Self::splat(1.987_569_1e-4);
        for coefficient in [
            1.398_2e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            sum = sum.mul_add(rest, Self::splat(coefficient));
        }
        let power = rest.mul(rest).mul_add(sum, rest).add(Self::splat(1.0));
        self.zero_below(power.times_exp2(whole), EXP_MIN)
    }

    /// The sum of all: of each eight `((0+1)+(2+3)) + ((4+5)+(6+7))`, and of both eights where there are so many.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut numbers = [0.0_f32; WIDEST];
        // SAFETY: the array has room for all.
        unsafe { self.store(numbers.as_mut_ptr()) };
        let pair = |at: usize| numbers[at] + numbers[at + 1];
        let eight = |at: usize| (pair(at) + pair(at + 2)) + (pair(at + 4) + pair(at + 6));
        if Self::LEN == LANES {
            eight(0)
        } else {
            eight(0) + eight(LANES)
        }
    }

    /// The largest of all.
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut numbers = [f32::NEG_INFINITY; WIDEST];
        // SAFETY: the array has room for all.
        unsafe { self.store(numbers.as_mut_ptr()) };
        numbers.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `tanh(self)`, within 1e-7.
    #[inline(always)]
    fn tanh(self) -> Self {
        let twice = self.add(self).exp().add(Self::splat(1.0));
        Self::splat(1.0).add(Self::splat(-2.0).div(twice))
    }
}

/// Eight `f32`.
pub trait Lanes: Arithmetic {
    /// The sum of each of eight: `((0+1)+(2+3)) + ((4+5)+(6+7))` of each.
    fn sums(all: [Self; LANES]) -> Self;
    /// Columns of eight rows.
    fn columns(rows: [Self; LANES]) -> [Self; LANES];
    /// Reads sixteen bf16: those in even places, and those in odd ones.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load_bf16_pairs(from: *const u16) -> [Self; 2];
    /// Writes what `load_bf16_pairs` reads, rounded.
    ///
    /// # Safety
    /// There is room for sixteen.
    unsafe fn store_bf16_pairs(pairs: [Self; 2], to: *mut u16);
}

impl<L: Lanes> Vector for [L; 2] {
    const LEN: usize = 2 * LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        [L::splat(value); 2]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { [L::load(from), L::load(from.add(LANES))] }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            self[0].store(to);
            self[1].store(to.add(LANES));
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { [L::load_bf16(from), L::load_bf16(from.add(LANES))] }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe {
            self[0].store_bf16(to);
            self[1].store_bf16(to.add(LANES));
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_unzipped(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16_pairs(from) }
    }

    #[inline(always)]
    unsafe fn store_bf16_zipped(self, to: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { L::store_bf16_pairs(self, to) }
    }

    #[inline(always)]
    fn prefetch<T>(from: *const T) {
        L::prefetch(from);
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        [self[0].add(other[0]), self[1].add(other[1])]
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        [self[0].mul(other[0]), self[1].mul(other[1])]
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        [
            self[0].mul_add(factor[0], term[0]),
            self[1].mul_add(factor[1], term[1]),
        ]
    }
}

impl<L: Lanes> Wide for [L; 2] {
    type Half = L;
    const IS_ONE: bool = false;

    #[inline(always)]
    fn halves(self) -> (L, L) {
        (self[0], self[1])
    }
}

/// Below this `exp` gives 0: what a softmax adds there is lost in rounding anyway.
const EXP_MIN: f32 = -87.0;

#[cfg(test)]
#[expect(
    clippy::float_cmp,
    reason = "these are equal to the bit, or the test is wrong"
)]
mod tests {
    use super::*;

    fn each<V: Vector>(numbers: [f32; LANES], f: impl Fn(V) -> V) -> [f32; LANES] {
        let (mut given, mut results) = ([0.0; WIDEST], [0.0; WIDEST]);
        given[..LANES].copy_from_slice(&numbers);
        // SAFETY: both arrays hold the longest.
        unsafe { f(V::load(given.as_ptr())).store(results.as_mut_ptr()) };
        std::array::from_fn(|lane| results[lane])
    }

    fn check_functions<V: Arithmetic>() {
        for step in 0..20_000 {
            let start = -90.0 + step as f32 * 0.0089;
            let numbers = std::array::from_fn(|lane| start + lane as f32 * 1e-3);
            let powers = each::<V>(numbers, V::exp);
            let bent = each::<V>(numbers, V::tanh);
            for lane in 0..LANES {
                let (x, y) = (numbers[lane], powers[lane]);
                if x < EXP_MIN {
                    assert_eq!(y, 0.0, "e^{x}");
                } else if x < 88.0 {
                    assert!((y / x.exp() - 1.0).abs() < 3e-7, "e^{x} = {y}");
                }
                assert!(
                    (bent[lane] - x.tanh()).abs() < 2e-7,
                    "tanh {x} = {}",
                    bent[lane]
                );
            }
        }
        let edges = [
            0.0,
            -0.0,
            f32::NEG_INFINITY,
            f32::INFINITY,
            f32::NAN,
            -87.0,
            1.0,
            -1.0,
        ];
        let powers = each::<V>(edges, V::exp);
        assert_eq!(powers[..3], [1.0, 1.0, 0.0]);
        assert!(powers[3] > 1e38);
        assert!(powers[4].is_nan());
    }

    fn check_sums<L: Lanes>() {
        let rows: [[f32; LANES]; LANES] = std::array::from_fn(|row| {
            std::array::from_fn(|lane| (row * 37 + lane * lane) as f32 / 3.0)
        });
        // SAFETY: each row holds eight.
        let lanes = rows.map(|row| unsafe { L::load(row.as_ptr()) });
        let mut sums = [0.0_f32; LANES];
        // SAFETY: the array has room for eight.
        unsafe { L::sums(lanes).store(sums.as_mut_ptr()) };
        // To the bit: `sum` and `sums` have the same order.
        assert_eq!(
            sums.map(f32::to_bits),
            lanes.map(|lanes| lanes.sum().to_bits())
        );
        assert_eq!(
            lanes.map(Arithmetic::largest),
            rows.map(|row| row[LANES - 1])
        );
        let halves: [u16; LANES] = std::array::from_fn(|lane| 0x3f80 + lane as u16);
        let mut widened = [0.0; LANES];
        // SAFETY: both arrays hold eight.
        unsafe { L::load_bf16(halves.as_ptr()).store(widened.as_mut_ptr()) };
        assert_eq!(widened, halves.map(crate::bf16::widen));
        for (at, column) in L::columns(lanes).into_iter().enumerate() {
            let mut numbers = [0.0; LANES];
            // SAFETY: the array has room for eight.
            unsafe { column.store(numbers.as_mut_ptr()) };
            assert_eq!(numbers, rows.map(|row| row[at]));
        }
    }

    fn check_pairs<L: Lanes>() {
        // All kinds of bf16, a NaN too, each in an even place and in an odd one.
        for bits in 0..=u16::MAX {
            let given: [u16; WIDEST] = std::array::from_fn(|at| bits ^ (at as u16) << 4);
            let (mut numbers, mut written) = ([0.0; WIDEST], [0; WIDEST]);
            // SAFETY: all arrays hold sixteen.
            unsafe {
                let unzipped = <[L; 2]>::load_bf16_unzipped(given.as_ptr());
                unzipped.store(numbers.as_mut_ptr());
                unzipped.store_bf16_zipped(written.as_mut_ptr());
            }
            for (at, bits) in given.into_iter().enumerate() {
                let number = crate::bf16::widen(bits);
                let place = at % 2 * LANES + at / 2;
                assert_eq!(numbers[place].to_bits(), number.to_bits());
                assert_eq!(written[at], crate::bf16::narrow(number));
            }
        }
    }

    fn check_rounding<V: Vector>() {
        // All kinds of bf16, and between each two of them what is nearer to one, to the other, and to neither.
        for upper in 0..=u16::MAX {
            let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x4000, 0xc000];
            let number = |at: usize| f32::from_bits(u32::from(upper) << 16 | lower[at % LANES]);
            let numbers: [f32; WIDEST] = std::array::from_fn(number);
            let mut rounded = [0; WIDEST];
            // SAFETY: both arrays hold the longest.
            unsafe { V::load(numbers.as_ptr()).store_bf16(rounded.as_mut_ptr()) };
            let expected = numbers.map(crate::bf16::narrow);
            assert_eq!(rounded[..V::LEN], expected[..V::LEN]);
        }
    }

    #[test]
    fn the_portable_twin_is_right() {
        check_functions::<Portable>();
        check_sums::<Portable>();
        check_pairs::<Portable>();
        check_rounding::<Portable>();
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_avx2_twin_is_right() {
        if avx2::is_here() {
            check_functions::<Avx2>();
            check_sums::<Avx2>();
            check_pairs::<Avx2>();
            check_rounding::<Avx2>();
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_avx512_twin_is_right() {
        if avx512::is_here() {
            check_functions::<Avx512>();
            check_rounding::<Avx512>();
            let numbers: [f32; WIDEST] = std::array::from_fn(|lane| (lane * lane) as f32 / 3.0);
            let (low, high) = numbers.split_at(LANES);
            // SAFETY: the processor has it; the array holds sixteen, and its halves eight each.
            let (all, low, high) = unsafe {
                let all = Avx512::load(numbers.as_ptr());
                (all, Avx2::load(low.as_ptr()), Avx2::load(high.as_ptr()))
            };
            assert_eq!(all.sum(), low.sum() + high.sum());
            assert_eq!(all.largest(), numbers[WIDEST - 1]);
        }
    }
}
