//! Mixtures of experts.

#![expect(
    unsafe_code,
    reason = "sees the memory of tensors, whose addresses Python gives"
)]

use std::{slice, sync::Arc};

use orchestra_kernels::{
    Element, PairLinear,
    experts::{self, Choice, Expert, Picks, Router, Tokens},
    linear::Together,
    rows::Activation,
};
use pyo3::prelude::*;

use super::{
    Dtype,
    linear::{Layer, Linear},
    recording::call_or_note,
    rows::read_activation,
    with_numbers,
};
use crate::errors::Failure;

/// Chooses experts for tokens.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct ExpertRouter {
    inner: Arc<Router>,
}

#[pymethods]
impl ExpertRouter {
    #[new]
    #[pyo3(signature = (linear, bias_ptr, picks, *, is_sigmoid, groups, is_normalised, scale))]
    #[expect(
        clippy::too_many_arguments,
        reason = "what models differ in, each by its name"
    )]
    fn new(
        linear: &Bound<'_, Linear>,
        bias_ptr: Option<usize>,
        picks: usize,
        is_sigmoid: bool,
        groups: (usize, usize),
        is_normalised: bool,
        scale: f32,
    ) -> PyResult<Self> {
        let Layer::Float32(linear) = linear.get().layer() else {
            let message = "linear: does not compute in float32".to_owned();
            return Err(Failure::invalid("linear", message).into());
        };
        let bias = bias_ptr.map(|address| {
            // SAFETY: the caller says that a number for each expert lies there: the contract of `_core.pyi`.
            unsafe { slice::from_raw_parts(address as *const f32, linear.shape().0) }.to_vec()
        });
        let choice = Choice {
            picks,
            is_sigmoid,
            groups: groups.0,
            groups_kept: groups.1,
            is_normalised,
            scale,
        };
        let made = Router::new(Arc::clone(linear), bias, choice).map_err(Failure::from)?;
        Ok(Self {
            inner: Arc::new(made),
        })
    }

    /// Chooses for some tokens.
    #[expect(
        clippy::too_many_arguments,
        reason = "tensors, each an address and where its rows lie"
    )]
    fn forward(
        &self,
        py: Python<'_>,
        dtype: &str,
        count: usize,
        input: (usize, usize),
        weights_ptr: usize,
        chosen_ptr: usize,
        threads: u32,
    ) -> PyResult<()> {
        let dtype = Dtype::read(dtype)?;
        let router = Arc::clone(&self.inner);
        call_or_note(py, count, move |count| {
            let picks = (weights_ptr, chosen_ptr);
            with_numbers!(dtype, choose(&router, count, input, picks, threads));
        })
    }
}

/// # Safety
/// As `Router::forward`.
unsafe fn choose<E: Element>(
    router: &Router,
    count: usize,
    (input, input_stride): (usize, usize),
    (weights, chosen): (usize, usize),
    threads: u32,
) {
    let picks = Picks {
        input: input as *const E,
        input_stride,
        weights: weights as *mut f32,
        chosen: chosen as *mut i32,
        count,
    };
    // SAFETY: the caller's promise.
    unsafe { router.forward(&picks, threads) }
}

/// Some experts of a model.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Experts {
    inner: Kind,
}

/// Experts by what computes their layers.
#[derive(Clone)]
enum Kind {
    Float32(Arc<experts::Experts<orchestra_kernels::Linear<f32>>>),
    Bfloat16(Arc<experts::Experts<orchestra_kernels::Linear<u16>>>),
    Pairs(Arc<experts::Experts<PairLinear>>),
}

type Pair = (Py<Linear>, Py<Linear>);

#[pymethods]
impl Experts {
    #[new]
    fn new(first: usize, activation: &str, layers: Vec<Pair>) -> PyResult<Self> {
        let activation = read_activation(activation)?;
        let layer = |it: &Py<Linear>| it.get().layer().clone();
        let layers: Vec<_> = layers
            .into_iter()
            .map(|(gate_up, down)| (layer(&gate_up), layer(&down)))
            .collect();
        macro_rules! of_kind {
            ($kind:ident) => {{
                let of = |it: &Layer| match it {
                    Layer::$kind(layer) => Some(Arc::clone(layer)),
                    _ => None,
                };
                Kind::$kind(gather(first, activation, &layers, of)?)
            }};
        }
        let inner = match layers.first() {
            Some((Layer::Pairs(_), _)) => of_kind!(Pairs),
            Some((Layer::Bfloat16(_), _)) => of_kind!(Bfloat16),
            Some((Layer::Float32(_), _)) | None => of_kind!(Float32),
        };
        Ok(Self { inner })
    }

    /// Computes some tokens.
    #[expect(clippy::too_many_arguments, reason = "tensors, each an address")]
    fn forward(
        &self,
        py: Python<'_>,
        count: usize,
        input_ptr: usize,
        picks: (usize, usize, usize),
        output_ptr: usize,
        threads: u32,
    ) -> PyResult<()> {
        let kind = self.inner.clone();
        call_or_note(py, count, move |count| {
            let addresses = (input_ptr, output_ptr);
            // SAFETY: the caller says that tensors of these shapes lie there, in the layers' numbers, and leaves them
            // alone until the call returns: the contract of `_core.pyi`.
            unsafe {
                match &kind {
                    Kind::Float32(it) => it.forward(&tokens(count, addresses, picks), threads),
                    Kind::Bfloat16(it) => it.forward(&tokens(count, addresses, picks), threads),
                    Kind::Pairs(it) => it.forward(&tokens(count, addresses, picks), threads),
                }
            }
        })
    }
}

/// The experts, where `of` finds that all layers are of one kind.
fn gather<L: Together>(
    first: usize,
    activation: Activation,
    layers: &[(Layer, Layer)],
    of: impl Fn(&Layer) -> Option<Arc<L>>,
) -> Result<Arc<experts::Experts<L>>, Failure> {
    let experts = layers.iter().map(|(gate_up, down)| {
        Some(Expert {
            gate_up: of(gate_up)?,
            down: of(down)?,
        })
    });
    let experts = experts.collect::<Option<_>>().ok_or_else(|| {
        let message = "layers: are not all of the same numbers".to_owned();
        Failure::invalid("layers", message)
    })?;
    Ok(Arc::new(experts::Experts::new(first, activation, experts)?))
}

fn tokens<E>(
    count: usize,
    (input, output): (usize, usize),
    (chosen, weights, picks): (usize, usize, usize),
) -> Tokens<E> {
    Tokens {
        input: input as *const E,
        chosen: chosen as *const i32,
        weights: weights as *const f32,
        picks,
        output: output as *mut E,
        count,
    }
}
