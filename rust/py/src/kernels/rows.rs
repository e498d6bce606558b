//! Norms, gates and rotations; softmax and draws.

#![expect(
    unsafe_code,
    reason = "sees the memory of tensors, whose addresses Python gives"
)]
#![expect(
    clippy::too_many_arguments,
    reason = "tensors, each an address and where its rows lie; several calls for each layer of each step"
)]

use orchestra_kernels::{
    Element,
    rows::{
        self, Activation, Candidates, Draw, Gate, Logits, LookUp, Mix, Norm, Rotation, Softmax, Sum,
    },
};
use pyo3::prelude::*;

use super::{Dtype, recording::call_or_note, view, with_numbers};
use crate::errors::Failure;

/// Normalises rows by the root of their mean square.
#[pyfunction]
pub(crate) fn rms_norm(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize, usize),
    input: (usize, usize),
    addend_ptr: Option<usize>,
    weight: (usize, f32),
    output: (usize, usize),
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let (count, groups, size) = shape;
    call_or_note(py, count, move |count| {
        let shape = (count, groups, size);
        with_numbers!(
            dtype,
            normalise(shape, input, addend_ptr, weight, output, threads)
        );
    })
}

/// # Safety
/// As `rows::rms_norm`.
unsafe fn normalise<E: Element>(
    (count, groups, size): (usize, usize, usize),
    (input, input_stride): (usize, usize),
    addend: Option<usize>,
    (weight, epsilon): (usize, f32),
    (output, output_stride): (usize, usize),
    threads: u32,
) {
    let norm = Norm {
        input: input as *mut E,
        input_stride,
        addend: addend.map(|address| address as *const E),
        weight: weight as *const f32,
        output: output as *mut E,
        output_stride,
        count,
        groups,
        size,
        epsilon,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::rms_norm(&norm, threads) }
}

/// Multiplies the second half of each row by its bent first half.
#[pyfunction]
pub(crate) fn gate(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize),
    activation: &str,
    input_ptr: usize,
    output_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let activation = read_activation(activation)?;
    let (count, size) = shape;
    call_or_note(py, count, move |count| {
        let shape = (count, size);
        with_numbers!(
            dtype,
            bend(shape, activation, input_ptr, output_ptr, threads)
        );
    })
}

/// From transformers' name.
pub(super) fn read_activation(name: &str) -> Result<Activation, Failure> {
    match name {
        "silu" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        _ => {
            let message = format!("activation: {name} is neither silu nor gelu_pytorch_tanh");
            Err(Failure::invalid("activation", message))
        }
    }
}

/// # Safety
/// As `rows::gate`.
unsafe fn bend<E: Element>(
    (count, size): (usize, usize),
    activation: Activation,
    input: usize,
    output: usize,
    threads: u32,
) {
    let gate = Gate {
        input: input as *const E,
        output: output as *mut E,
        count,
        size,
        activation,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::gate(&gate, threads) }
}

/// Rotates pairs of neighbours in place.
#[pyfunction]
pub(crate) fn rotate(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize, usize),
    heads: (usize, usize),
    angles_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let (count, num_heads, size) = shape;
    call_or_note(py, count, move |count| {
        let shape = (count, num_heads, size);
        with_numbers!(dtype, turn(shape, heads, angles_ptr, threads));
    })
}

/// # Safety
/// As `rows::rotate`.
unsafe fn turn<E: Element>(
    (count, num_heads, size): (usize, usize, usize),
    (heads, stride): (usize, usize),
    angles: usize,
    threads: u32,
) {
    let rotation = Rotation {
        heads: heads as *mut E,
        stride,
        angles: angles as *const f32,
        count,
        num_heads,
        size,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::rotate(&rotation, threads) }
}

/// Adds rows to rows.
#[pyfunction]
pub(crate) fn add(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize),
    target_ptr: usize,
    addend_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let (count, size) = shape;
    call_or_note(py, count, move |count| {
        let shape = (count, size);
        with_numbers!(dtype, add_up(shape, target_ptr, addend_ptr, threads));
    })
}

/// # Safety
/// As `rows::add`.
unsafe fn add_up<E: Element>(
    (count, size): (usize, usize),
    target: usize,
    addend: usize,
    threads: u32,
) {
    let sum = Sum {
        target: target as *mut E,
        addend: addend as *const E,
        count,
        size,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::add(&sum, threads) }
}

/// Copies rows out of a table.
#[pyfunction]
pub(crate) fn look_up(
    py: Python<'_>,
    dtype: &str,
    table: (usize, usize, usize),
    places: (usize, usize),
    first: i64,
    scale: Option<f32>,
    output_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let (places_ptr, count) = places;
    call_or_note(py, count, move |count| {
        let places = (places_ptr, count);
        with_numbers!(
            dtype,
            copy_rows(table, places, (first, scale), output_ptr, threads)
        );
    })
}

/// # Safety
/// As `rows::look_up`.
unsafe fn copy_rows<E: Element>(
    (table, height, size): (usize, usize, usize),
    (places, count): (usize, usize),
    (first, scale): (i64, Option<f32>),
    output: usize,
    threads: u32,
) {
    let look_up = LookUp {
        table: table as *const E,
        height,
        places: places as *const i64,
        first,
        scale,
        output: output as *mut E,
        count,
        size,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::look_up(&look_up, threads) }
}

/// Adds up each token's rows.
#[pyfunction]
pub(crate) fn mix(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize, usize),
    rows_ptr: usize,
    weights_ptr: usize,
    output_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let at = (rows_ptr, weights_ptr, output_ptr);
    py.detach(|| with_numbers!(dtype, mix_rows(shape, at, threads)));
    Ok(())
}

/// # Safety
/// As `rows::mix`.
unsafe fn mix_rows<E: Element>(
    (count, picks, size): (usize, usize, usize),
    (rows, weights, output): (usize, usize, usize),
    threads: u32,
) {
    // Each token's lie where they are added.
    let places: Vec<u32> = (0..(count * picks) as u32).collect();
    let mix = Mix {
        rows: rows as *const E,
        places: places.as_ptr(),
        weights: weights as *const f32,
        output: output as *mut E,
        count,
        picks,
        size,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::mix(&mix, threads) }
}

/// Finds the largest number of each row, and says with it whose it is.
#[pyfunction]
pub(crate) fn candidates(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize),
    logits: (usize, usize),
    first: u32,
    candidates_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let (count, size) = shape;
    let target = (first, candidates_ptr);
    call_or_note(py, count, move |count| {
        let shape = (count, size);
        with_numbers!(dtype, find_candidates(shape, logits, target, threads));
    })
}

/// # Safety
/// As `rows::candidates`.
unsafe fn find_candidates<E: Element>(
    shape: (usize, usize),
    logits: (usize, usize),
    (first, candidates): (u32, usize),
    threads: u32,
) {
    let candidates = Candidates {
        logits: rows_of::<E>(shape, logits),
        first,
        candidates: candidates as *mut i64,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::candidates(&candidates, threads) }
}

/// Finds the tokens of each row's best candidate.
#[pyfunction]
pub(crate) fn likeliest_of(
    py: Python<'_>,
    shape: (usize, usize),
    candidates_ptr: usize,
    tokens_ptr: usize,
) -> PyResult<()> {
    let (count, each) = shape;
    call_or_note(py, count, move |count| {
        // SAFETY: the caller says that there are so many of both, other memory, and leaves them alone until the call
        // returns: the contract of `_core.pyi`.
        let (candidates, tokens) = unsafe {
            let candidates = view::<i64>(candidates_ptr, count * each);
            (&*candidates, view::<i64>(tokens_ptr, count))
        };
        rows::likeliest_of(candidates, tokens);
    })
}

/// Makes probabilities of logits.
#[pyfunction]
pub(crate) fn softmax(
    py: Python<'_>,
    dtype: &str,
    shape: (usize, usize),
    logits: (usize, usize),
    temperatures_ptr: usize,
    probabilities_ptr: usize,
    threads: u32,
) -> PyResult<()> {
    let dtype = Dtype::read(dtype)?;
    let pointers = (temperatures_ptr, probabilities_ptr);
    py.detach(|| with_numbers!(dtype, weigh(shape, logits, pointers, threads)));
    Ok(())
}

/// # Safety
/// As `rows::softmax`.
unsafe fn weigh<E: Element>(
    shape: (usize, usize),
    logits: (usize, usize),
    (temperatures, probabilities): (usize, usize),
    threads: u32,
) {
    let softmax = Softmax {
        logits: rows_of::<E>(shape, logits),
        temperatures: temperatures as *const f32,
        probabilities: probabilities as *mut f32,
    };
    // SAFETY: the caller's promise.
    unsafe { rows::softmax(&softmax, threads) }
}

fn rows_of<E>((count, size): (usize, usize), (numbers, stride): (usize, usize)) -> Logits<E> {
    Logits {
        numbers: numbers as *const E,
        stride,
        count,
        size,
    }
}

/// Draws a token from each row of probabilities.
#[pyfunction]
pub(crate) fn draw(
    py: Python<'_>,
    shape: (usize, usize),
    probabilities_ptr: usize,
    numbers_ptr: usize,
    tokens_ptr: usize,
    threads: u32,
) {
    py.detach(|| {
        let draw = Draw {
            probabilities: probabilities_ptr as *const f32,
            numbers: numbers_ptr as *const f64,
            tokens: tokens_ptr as *mut i64,
            count: shape.0,
            size: shape.1,
        };
        // SAFETY: the caller says that tensors of these shapes lie there, and leaves them alone until this returns.
        unsafe { rows::draw(&draw, threads) }
    });
}
