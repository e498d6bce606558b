//! A row's outputs beside sums in `f64`, and the promise that nothing else in the call changes a bit of them.

#![expect(unsafe_code, reason = "hands tensors over")]
#![expect(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod experts;
mod pairs;

use orchestra_kernels::{
    Element, Linear, LinearError, Processor, bf16,
    linear::{Rows, Together},
};
use proptest::prelude::*;

/// What `rows` of `inputs` numbers give, which may lie `stride` apart.
fn forward<E: Element + Default>(
    layer: &Linear<E>,
    input: &[E],
    stride: usize,
    count: usize,
) -> Vec<E> {
    let mut output = vec![E::default(); count * layer.shape().0];
    let rows = Rows {
        input: input.as_ptr(),
        input_stride: stride,
        output: output.as_mut_ptr(),
        count,
    };
    // SAFETY: the vectors hold as many numbers as these rows have.
    unsafe { layer.forward(&rows, 1) };
    output
}

fn layer<E: Element>(shape: (usize, usize), weight: &[E], bias: Option<&[E]>) -> Linear<E> {
    assert_eq!(weight.len(), shape.0 * shape.1);
    // SAFETY: the slices hold as many numbers as the shape says.
    let made = unsafe { Linear::new(shape, weight.as_ptr(), bias.map(<[E]>::as_ptr)) };
    made.unwrap()
}

/// Numbers from -1 to 1, the same for the same seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let draw = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(draw).take(count).collect()
}

fn narrow(numbers: &[f32]) -> Vec<u16> {
    numbers.iter().map(|number| bf16::narrow(*number)).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// What each twin gives, the portable one first, and the layer on the fastest.
fn on_every_processor<E: Element, T>(
    mut kernel: Linear<E>,
    run: impl Fn(&Linear<E>) -> T,
) -> (Vec<(Processor, T)>, Linear<E>) {
    let mut results = Vec::new();
    for processor in Processor::all_here() {
        kernel = kernel.on(processor);
        results.push((processor, run(&kernel)));
    }
    (results, kernel)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn outputs_are_the_sums(
        outputs in 1_usize..150,
        inputs in 1_usize..600,
        count in 1_usize..110,
        gap in 0_usize..9,
        seed in any::<u64>(),
    ) {
        let (weight, bias) = (numbers(seed, outputs * inputs), numbers(!seed, outputs));
        let stride = inputs + gap;
        let input = numbers(seed ^ 7, count * stride);
        let kernel = layer((outputs, inputs), &weight, Some(&bias));
        let (twins, kernel) = on_every_processor(kernel, |kernel| forward(kernel, &input, stride, count));
        for row in 0..count {
            let input = &input[row * stride..][..inputs];
            for output in 0..outputs {
                let weights = &weight[output * inputs..][..inputs];
                let product = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
                let sum = input.iter().zip(weights).map(product).sum::<f64>() + f64::from(bias[output]);
                for (processor, got) in &twins {
                    let got = f64::from(got[row * outputs + output]);
                    prop_assert!((got - sum).abs() < 2e-4, "{processor:?} {row} {output}");
                }
            }
        }
        // Those that round once for each product do the same in the same order.
        for (processor, got) in &twins[1..] {
            prop_assert_eq!(bits(got), bits(&forward(&kernel, &input, stride, count)), "{:?}", processor);
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_among_others(
        outputs in 1_usize..150,
        inputs in 1_usize..600,
        count in 2_usize..110,
        cut in 1_usize..109,
        seed in any::<u64>(),
    ) {
        let cut = cut.min(count - 1);
        let weight = numbers(seed, outputs * inputs);
        let input = numbers(seed ^ 7, count * inputs);
        let kernel = layer((outputs, inputs), &weight, None);
        let whole = forward(&kernel, &input, inputs, count);
        let mut parts = forward(&kernel, &input, inputs, cut);
        parts.extend(forward(&kernel, &input[cut * inputs..], inputs, count - cut));
        prop_assert_eq!(bits(&whole), bits(&parts));
        let alone = forward(&kernel, &input[cut * inputs..], inputs, 1);
        prop_assert_eq!(bits(&whole[cut * outputs..][..outputs]), bits(&alone));

        let (weight, input) = (narrow(&weight), narrow(&input));
        let kernel = layer((outputs, inputs), &weight, None);
        let whole = forward(&kernel, &input, inputs, count);
        let alone = forward(&kernel, &input[cut * inputs..], inputs, 1);
        prop_assert_eq!(&whole[cut * outputs..][..outputs], alone);
    }
}

#[test]
fn bf16_is_rounded_once_at_the_end() {
    let (shape, count) = ((40, 70), 9);
    let (weight, input) = (
        narrow(&numbers(1, shape.0 * shape.1)),
        narrow(&numbers(2, count * shape.1)),
    );
    let bias = narrow(&numbers(3, shape.0));
    let got = forward(&layer(shape, &weight, Some(&bias)), &input, shape.1, count);
    let wide = |numbers: &[u16]| -> Vec<f32> { numbers.iter().copied().map(bf16::widen).collect() };
    let exact = layer(shape, &wide(&weight), Some(&wide(&bias)));
    assert_eq!(got, narrow(&forward(&exact, &wide(&input), shape.1, count)));
}

#[test]
fn sizes_out_of_range_are_refused_by_name() {
    let weight = [0.0_f32; 4];
    let field = |shape| {
        // SAFETY: nothing is read of a layer without outputs or inputs, nor of one that is too large.
        match unsafe { Linear::new(shape, weight.as_ptr(), None) } {
            Err(LinearError::InvalidShape { field, .. }) => field,
            Err(LinearError::NoMemory { .. }) => "memory",
            Ok(_) => "none",
        }
    };
    assert_eq!(field((0, 4)), "outputs");
    assert_eq!(field((4, 0)), "inputs");
    assert_eq!(field((1, (1 << 24) + 1)), "inputs");
    assert_eq!(field((1 << 24, 1 << 24)), "memory");
    assert_eq!(field((1, 4)), "none");
}
