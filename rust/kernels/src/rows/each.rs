//! One row of each kind of work. Numbers go a vector at a time; what is left of a row goes through a padded one, so that
//! every number is computed in the same way.

#![expect(
    unsafe_code,
    reason = "reads tensors, and writes what other threads write beside"
)]
#![expect(
    clippy::inline_always,
    reason = "becomes part of a kernel for each kind of processor"
)]

use super::{Activation, Gate, LookUp, Mix, NOWHERE, Norm, Rotation, Sum, Work};
use crate::{
    element::Element,
    simd::{Arithmetic, Vector, WIDEST},
};

/// Sums of squares that run side by side, for none to wait for another.
const CHAINS: usize = 4;

/// Reads up to a vector of numbers; zeros follow.
#[inline(always)]
unsafe fn load<V: Vector, E: Element>(from: *const E, count: usize) -> V {
    if count >= V::LEN {
        // SAFETY: the caller's promise.
        return unsafe { E::load::<V>(from) };
    }
    let mut numbers = [0.0_f32; WIDEST];
    for (at, number) in numbers[..count].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *number = unsafe { from.add(at).read() }.widen();
    }
    // SAFETY: the array has as many as the longest.
    unsafe { V::load(numbers.as_ptr()) }
}

/// Rounds and writes up to a vector of numbers.
#[inline(always)]
unsafe fn store<V: Vector, E: Element>(value: V, to: *mut E, count: usize) {
    if count >= V::LEN {
        // SAFETY: the caller's promise.
        unsafe { E::store(value, to) };
        return;
    }
    let mut numbers = [0.0_f32; WIDEST];
    // SAFETY: as above.
    unsafe { value.store(numbers.as_mut_ptr()) };
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
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
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
        let mut sums = [V::splat(0.0); CHAINS];
        for (step, at) in (0..size).step_by(V::LEN).enumerate() {
            let left = size - at;
            // SAFETY: so many are left of the row.
            unsafe {
                let mut value = load::<V, E>(input.add(at), left);
                if let Some(addend) = self.addend {
                    let sum = value.add(load::<V, E>(addend.add(row * size + at), left));
                    store(sum, input.add(at), left);
                    value = load::<V, E>(input.add(at), left);
                }
                let sum = &mut sums[step % CHAINS];
                *sum = value.mul_add(value, *sum);
            }
        }
        let [first, second, third, fourth] = sums;
        let squares = first.add(second).add(third.add(fourth)).sum();
        let scale = V::splat(1.0 / (squares / size as f32 + self.epsilon).sqrt());
        for at in (0..size).step_by(V::LEN) {
            let left = size - at;
            // SAFETY: so many are left of the row, and of its weights.
            unsafe {
                let value = load::<V, E>(input.add(at), left).mul(scale);
                let weight = load::<V, f32>(weights.add(at), left);
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
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
        let size = self.size;
        // SAFETY: the row is there, in both.
        let (input, output) =
            unsafe { (self.input.add(2 * row * size), self.output.add(row * size)) };
        for at in (0..size).step_by(V::LEN) {
            let left = size - at;
            // SAFETY: so many are left of each half and of the output.
            unsafe {
                let gate = self.activation.bend(load::<V, E>(input.add(at), left));
                let value = load::<V, E>(input.add(size + at), left);
                store(gate.mul(value), output.add(at), left);
            }
        }
    }
}

impl Activation {
    #[inline(always)]
    fn bend<V: Arithmetic>(self, x: V) -> V {
        let one = V::splat(1.0);
        match self {
            Self::Silu => x.div(x.mul(V::splat(-1.0)).exp().add(one)),
            Self::GeluTanh => {
                let cube = x.mul(x).mul(x);
                let inner = cube.mul_add(V::splat(0.044_715), x);
                let bent = inner.mul(V::splat(0.797_884_6)).tanh();
                x.mul(V::splat(0.5)).mul(bent.add(one))
            }
        }
    }
}

impl<E: Element> Work for Sum<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
        for at in (0..self.size).step_by(V::LEN) {
            let left = self.size - at;
            // SAFETY: the row is there, in both, and so many are left of it.
            unsafe {
                let target = self.target.add(row * self.size + at);
                let addend = self.addend.add(row * self.size + at);
                let sum = load::<V, E>(target, left).add(load::<V, E>(addend, left));
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
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
        let size = self.size;
        // SAFETY: the row is there.
        let (place, output) = unsafe { (*self.places.add(row), self.output.add(row * size)) };
        let place = usize::try_from(place.wrapping_sub(self.first));
        let Some(place) = place.ok().filter(|place| *place < self.height) else {
            for at in (0..size).step_by(V::LEN) {
                // SAFETY: so many are left of the row.
                unsafe { store(V::splat(0.0), output.add(at), size - at) };
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
        for at in (0..size).step_by(V::LEN) {
            let left = size - at;
            // SAFETY: so many are left of both rows.
            unsafe {
                let numbers = load::<V, E>(from.add(at), left).mul(V::splat(scale));
                store(numbers, output.add(at), left);
            }
        }
    }
}

impl<E: Element> Work for Mix<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.size)
    }

    #[inline(always)]
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
        for at in (0..self.size).step_by(V::LEN) {
            let left = self.size - at;
            let mut sum = V::splat(0.0);
            for pick in row * self.picks..(row + 1) * self.picks {
                // SAFETY: the pick is there, and so is the row where it says, and so many are left of that.
                unsafe {
                    let place = *self.places.add(pick);
                    if place == NOWHERE {
                        continue;
                    }
                    let numbers = self.rows.add(place as usize * self.size + at);
                    let weight = V::splat(*self.weights.add(pick));
                    sum = load::<V, E>(numbers, left).mul_add(weight, sum);
                }
            }
            // SAFETY: so many are left of the row.
            unsafe { store(sum, self.output.add(row * self.size + at), left) };
        }
    }
}

impl<E: Element> Work for Rotation<E> {
    fn shape(&self) -> (usize, usize) {
        (self.count, self.num_heads * self.size)
    }

    #[inline(always)]
    unsafe fn row<V: Arithmetic>(&self, row: usize) {
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
