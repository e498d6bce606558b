//! The same of layers in pairs, on everything that multiplies pairs here.

use orchestra_kernels::{
    LinearError, PairLinear, bf16,
    linear::{Rows, Together},
    pairs::Unit,
};
use proptest::prelude::*;

/// What `count` rows give, which lie `stride` apart.
fn forward(layer: &PairLinear, input: &[u16], stride: usize, count: usize) -> Vec<u16> {
    let mut output = vec![0; count * layer.shape().0];
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

fn layer(unit: Unit, shape: (usize, usize), weight: &[u16], bias: Option<&[u16]>) -> PairLinear {
    assert_eq!(weight.len(), shape.0 * shape.1);
    let bias = bias.map(<[u16]>::as_ptr);
    // SAFETY: the slices hold as many numbers as the shape says.
    unsafe { PairLinear::new(unit, shape, weight.as_ptr(), bias) }.unwrap()
}

/// Numbers from -1 to 1, the same for the same seed.
fn numbers(seed: u64, count: usize) -> Vec<u16> {
    super::narrow(&super::numbers(seed, count))
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
        for unit in Unit::all_here() {
            let layer = layer(unit, (outputs, inputs), &weight, Some(&bias));
            let got = forward(&layer, &input, stride, count);
            for (row, got) in got.chunks(outputs).enumerate() {
                let input = &input[row * stride..][..inputs];
                for output in 0..outputs {
                    let weights = &weight[output * inputs..][..inputs];
                    let wide = |number: u16| f64::from(bf16::widen(number));
                    let product = |(a, b): (&u16, &u16)| wide(*a) * wide(*b);
                    let sum = input.iter().zip(weights).map(product).sum::<f64>() + wide(bias[output]);
                    // A bf16 has eight bits.
                    let error = (wide(got[output]) - sum).abs();
                    prop_assert!(error < 2e-4 + sum.abs() / 256.0, "{unit:?} {row} {output}: {error}");
                }
            }
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
        for unit in Unit::all_here() {
            let layer = layer(unit, (outputs, inputs), &weight, None);
            let whole = forward(&layer, &input, inputs, count);
            let rest = &input[cut * inputs..];
            let mut parts = forward(&layer, &input, inputs, cut);
            parts.extend(forward(&layer, rest, inputs, count - cut));
            prop_assert_eq!(&whole, &parts);
            prop_assert_eq!(&whole[cut * outputs..][..outputs], forward(&layer, rest, inputs, 1));
        }
    }
}

#[test]
fn more_rows_than_there_is_room_for_are_computed_in_turns() {
    // 8,192 rows of 1,200 numbers are 20 MB.
    let (outputs, inputs, count) = (3, 1200, 8192);
    let weight = numbers(1, outputs * inputs);
    let input = numbers(2, count * inputs);
    for unit in Unit::all_here() {
        let layer = layer(unit, (outputs, inputs), &weight, None);
        let whole = forward(&layer, &input, inputs, count);
        for row in [0, 6_000, 7_000, count - 1] {
            let alone = forward(&layer, &input[row * inputs..], inputs, 1);
            assert_eq!(whole[row * outputs..][..outputs], alone, "{row}");
        }
    }
}

#[test]
fn sizes_out_of_range_are_refused_by_name() {
    let weight = [0_u16; 4];
    for unit in Unit::all_here() {
        let field = |shape| {
            // SAFETY: nothing is read of a layer without outputs or inputs, nor of one that is too large.
            match unsafe { PairLinear::new(unit, shape, weight.as_ptr(), None) } {
                Err(LinearError::InvalidShape { field, .. }) => field,
                Err(LinearError::NoMemory { .. }) => "memory",
                Ok(_) => "none",
            }
        };
        assert_eq!(field((0, 4)), "outputs");
        assert_eq!(field((1, (1 << 24) + 1)), "inputs");
        assert_eq!(field((1, 4)), "none");
    }
}
