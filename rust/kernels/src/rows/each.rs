//! One row of each kind of work. Numbers go eight at a time; what is left of a row goes through a padded eight, so that
//! every number is computed in the same way.

#![expect(
    unsafe_code,
    reason = "reads tensors, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use super::{Activation, Gate, LookUp, Norm, Rotation, Sum, Work};
use crate::{
    element::Element,
    simd::{LANES, Lanes},
};

/// Sums of squares that run side by side, for none to wait for another.
const CHAINS: usize = 4;

/// Reads up to eight numbers; zeros follow.
#[inline(always)]
unsafe fn load<L: Lanes, E: Element>(from: *const E, count: usize) -> L {
    if count >= LANES {
        // SAFETY: the caller's promise.
        return unsafe { E::load::<L>(from) };
    }
    let mut numbers = [0.0_f32; LANES];
    for (at, number) in numbers[..count].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *number = unsafe { from.add(at).read() }.widen();
    }
    // SAFETY: the array has eight.
    unsafe { L::load(numbers.as_ptr()) }
}

/// Rounds and writes up to eight numbers.
#[inline(always)]
unsafe fn store<L: Lanes, E: Element>(value: L, to: *mut E, count: usize) {
    let mut numbers = [0.0_f32; LANES];
    // SAFETY: the array has eight.
    unsafe { value.store(numbers.as_mut_ptr()) };
    if count >= LANES {
        for (at, number) in numbers.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(at).write(E::narrow(*number)) };
        }
        return;
    }
    for (at, number) in numbers[..count].iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(at).write(E::narrow(*number)) };
    }
}

impl<E: Element> Work for Norm<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count * self.groups, self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        let size = self.size;
        let (token, group) = (row / self.groups, row % self.groups);
        // SAFETY: the row is there, in all of them.
        let (input, output, weights) = unsafe {
            (
                self.input.add(token * self.input_stride + group * size),
                self.output.add(token * self.output_stride + group * size),
                self.weight.add(group * size),
            )
        };
        let mut sums = [L::splat(0.0); CHAINS];
        for (step, at) in (0..size).step_by(LANES).enumerate() {
            let left = size - at;
            // SAFETY: so many are left of the row.
            unsafe {
                let mut value = load::<L, E>(input.add(at), left);
                if let Some(addend) = self.addend {
                    let sum = value.add(load::<L, E>(addend.add(row * size + at), left));
                    store(sum, input.add(at), left);
                    value = load::<L, E>(input.add(at), left);
                }
                let sum = &mut sums[step % CHAINS];
                *sum = value.mul_add(value, *sum);
            }
        }
        let [first, second, third, fourth] = sums;
        let squares = first.add(second).add(third.add(fourth)).sum();
        let scale = L::splat(1.0 / (squares / size as f32 + self.epsilon).sqrt());
        for at in (0..size).step_by(LANES) {
            let left = size - at;
            // SAFETY: so many are left of the row, and of its weights.
            unsafe {
                let value = load::<L, E>(input.add(at), left).mul(scale);
                let weight = load::<L, f32>(weights.add(at), left);
                store(value.mul(weight), output.add(at), left);
            }
        }
    }
}

impl<E: Element> Work for Gate<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        let size = self.size;
        // SAFETY: the row is there, in both.
        let (input, output) =
            unsafe { (self.input.add(2 * row * size), self.output.add(row * size)) };
        for at in (0..size).step_by(LANES) {
            let left = size - at;
            // SAFETY: so many are left of each half and of the output.
            unsafe {
                let gate = self.activation.bend(load::<L, E>(input.add(at), left));
                let value = load::<L, E>(input.add(size + at), left);
                store(gate.mul(value), output.add(at), left);
            }
        }
    }
}

impl Activation {
    #[inline(always)]
    fn bend<L: Lanes>(self, x: L) -> L {
        let one = L::splat(1.0);
        match self {
            Self::Silu => x.div(x.mul(L::splat(-1.0)).exp().add(one)),
            Self::GeluTanh => {
                let cube = x.mul(x).mul(x);
                let inner = cube.mul_add(L::splat(0.044_715), x);
                let bent = inner.mul(L::splat(0.797_884_6)).tanh();
                x.mul(L::splat(0.5)).mul(bent.add(one))
            }
        }
    }
}

impl<E: Element> Work for Sum<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        for at in (0..self.size).step_by(LANES) {
            let left = self.size - at;
            // SAFETY: the row is there, in both, and so many are left of it.
            unsafe {
                let target = self.target.add(row * self.size + at);
                let addend = self.addend.add(row * self.size + at);
                let sum = load::<L, E>(target, left).add(load::<L, E>(addend, left));
                store(sum, target, left);
            }
        }
    }
}

impl<E: Element> Work for LookUp<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        let size = self.size;
        // SAFETY: the row is there.
        let (place, output) = unsafe { (*self.places.add(row), self.output.add(row * size)) };
        let place = usize::try_from(place.wrapping_sub(self.first));
        let Some(place) = place.ok().filter(|place| *place < self.height) else {
            for at in (0..size).step_by(LANES) {
                // SAFETY: so many are left of the row.
                unsafe { store(L::splat(0.0), output.add(at), size - at) };
            }
            return;
        };
        // SAFETY: the place is in the table.
        let from = unsafe { self.table.add(place * size) };
        let Some(scale) = self.scale else {
            // SAFETY: the row is there, in both, and the output is other memory.
            unsafe { from.copy_to_nonoverlapping(output, size) };
            return;
        };
        for at in (0..size).step_by(LANES) {
            let left = size - at;
            // SAFETY: so many are left of both rows.
            unsafe {
                let numbers = load::<L, E>(from.add(at), left).mul(L::splat(scale));
                store(numbers, output.add(at), left);
            }
        }
    }
}

impl<E: Element> Work for Rotation<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.num_heads * self.size)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, row: usize) {
        for head in 0..self.num_heads {
            for pair in 0..self.size / 2 {
                // SAFETY: row, head and pair are there.
                unsafe {
                    let angle = self.angles.add((row * (self.size / 2) + pair) * 2);
                    let (cosine, sine) = (*angle, *angle.add(1));
                    let at = self
                        .heads
                        .add(row * self.stride + head * self.size + 2 * pair);
                    let (real, imaginary) = (at.read().widen(), at.add(1).read().widen());
                    at.write(E::narrow(real * cosine - imaginary * sine));
                    at.add(1).write(E::narrow(real * sine + imaginary * cosine));
                }
            }
        }
    }
}
