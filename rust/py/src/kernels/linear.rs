//! Linear layers.

#![expect(
    unsafe_code,
    reason = "sees the memory of tensors, whose addresses Python gives"
)]

use std::sync::Arc;

use orchestra_kernels::{PairLinear, Processor, linear::Rows, pairs::Unit};
use pyo3::prelude::*;

use super::{Dtype, recording::call_or_note};
use crate::errors::Failure;

/// A linear layer on the CPU, its weights laid out for the kernel.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Linear {
    layer: Layer,
}

/// What computes it.
#[derive(Clone)]
pub(super) enum Layer {
    Float32(Arc<orchestra_kernels::Linear<f32>>),
    Bfloat16(Arc<orchestra_kernels::Linear<u16>>),
    Pairs(Arc<PairLinear>),
}

#[pymethods]
impl Linear {
    #[new]
    #[pyo3(signature = (shape, dtype, weight_ptr, bias_ptr = None, *, portable = false))]
    fn new(
        py: Python<'_>,
        shape: (usize, usize),
        dtype: &str,
        weight_ptr: usize,
        bias_ptr: Option<usize>,
        portable: bool,
    ) -> PyResult<Self> {
        let dtype = Dtype::read(dtype)?;
        let layer = py.detach(|| match dtype {
            // SAFETY: the caller says that a weight of this shape lies there, and a bias: the contract of `_core.pyi`.
            Dtype::Float32 => {
                unsafe { load(shape, (weight_ptr, bias_ptr), portable) }.map(Layer::Float32)
            }
            // SAFETY: as above.
            Dtype::Bfloat16 => match Unit::here().filter(|_| !portable) {
                Some(unit) => {
                    let bias = bias_ptr.map(|address| address as *const u16);
                    let made =
                        unsafe { PairLinear::new(unit, shape, weight_ptr as *const u16, bias) };
                    made.map(|it| Layer::Pairs(Arc::new(it)))
                        .map_err(Failure::from)
                }
                None => {
                    unsafe { load(shape, (weight_ptr, bias_ptr), portable) }.map(Layer::Bfloat16)
                }
            },
        })?;
        Ok(Self { layer })
    }

    /// Computes some rows.
    fn forward(
        &self,
        py: Python<'_>,
        count: usize,
        input: (usize, usize),
        output_ptr: usize,
        threads: u32,
    ) -> PyResult<()> {
        let layer = self.layer.clone();
        call_or_note(py, count, move |count| {
            // SAFETY: the caller says that these are tensors of these rows, in the layer's numbers, and leaves them alone
            // until the call returns: the contract of `_core.pyi`.
            unsafe { layer.forward(count, input, output_ptr, threads) }
        })
    }
}

impl Linear {
    pub(super) const fn layer(&self) -> &Layer {
        &self.layer
    }
}

impl Layer {
    /// # Safety
    /// As `orchestra_kernels::Linear::forward`.
    unsafe fn forward(&self, count: usize, input: (usize, usize), output: usize, threads: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Float32(layer) => layer.forward(&rows(count, input, output), threads),
                Self::Bfloat16(layer) => layer.forward(&rows(count, input, output), threads),
                Self::Pairs(layer) => layer.forward(&rows(count, input, output), threads),
            }
        }
    }
}

/// # Safety
/// As `orchestra_kernels::Linear::new`.
unsafe fn load<E: orchestra_kernels::Element>(
    shape: (usize, usize),
    (weight, bias): (usize, Option<usize>),
    is_portable: bool,
) -> Result<Arc<orchestra_kernels::Linear<E>>, Failure> {
    let bias = bias.map(|address| address as *const E);
    // SAFETY: the caller's promise.
    let layer = unsafe { orchestra_kernels::Linear::new(shape, weight as *const E, bias) }?;
    Ok(Arc::new(if is_portable {
        layer.on(Processor::PORTABLE)
    } else {
        layer
    }))
}

fn rows<E>(count: usize, (input, input_stride): (usize, usize), output: usize) -> Rows<E> {
    Rows {
        input: input as *const E,
        input_stride,
        output: output as *mut E,
        count,
    }
}
