//! Attention over the paged KV cache.

#![expect(
    unsafe_code,
    reason = "sees the memory of tensors, whose addresses Python gives"
)]

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use orchestra_kernels::{
    Attention, AttentionConfig, AttentionError, Element, Processor, Rule, StepArrays,
    attention::Tensors,
};
use pyo3::prelude::*;

use super::{Dtype, recording::call_or_note_prepared};
use crate::errors::Failure;

impl From<AttentionError> for Failure {
    fn from(error: AttentionError) -> Self {
        Self::invalid(error.field, error.to_string())
    }
}

/// One layer: where its cache lies, and its rule: window, scale, soft cap.
type LayerRow = (usize, Option<usize>, Option<f32>, Option<f32>);

/// Paged attention of one rank, on the CPU.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct PagedAttention {
    inner: Arc<Inner>,
}

enum Numbers {
    Float32(Attention<f32>),
    Bfloat16(Attention<u16>),
}

struct Inner {
    attention: Numbers,
    layers: Vec<(usize, Rule)>,
    threads: AtomicU32,
}

#[pymethods]
impl PagedAttention {
    #[new]
    #[pyo3(signature = (shape, dtype, layers, *, portable = false))]
    fn new(
        shape: (usize, usize, usize, usize, usize),
        dtype: &str,
        layers: Vec<LayerRow>,
        portable: bool,
    ) -> PyResult<Self> {
        let (num_heads, num_kv_heads, head_dim, block_size, num_blocks) = shape;
        let config = AttentionConfig {
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            num_blocks,
        };
        let attention = match Dtype::read(dtype)? {
            Dtype::Float32 => Numbers::Float32(make(config, portable)?),
            Dtype::Bfloat16 => Numbers::Bfloat16(make(config, portable)?),
        };
        let layer = |(cache, window, scale, soft_cap)| {
            let rule = Rule {
                window,
                scale,
                soft_cap,
            };
            (cache, rule)
        };
        let inner = Inner {
            attention,
            layers: layers.into_iter().map(layer).collect(),
            threads: AtomicU32::new(1),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Lays out the next step.
    fn prepare(
        &self,
        slot_mapping: &[u8],
        query_start: &[u8],
        context_lens: &[u8],
        block_tables: &[u8],
        threads: u32,
    ) -> PyResult<()> {
        self.inner.threads.store(threads, Ordering::Relaxed);
        let arrays = [slot_mapping, query_start, context_lens, block_tables].map(int32);
        let [slot_mapping, query_start, context_lens, block_tables] = &arrays;
        let arrays = StepArrays {
            slot_mapping,
            query_start,
            context_lens,
            block_tables,
        };
        let prepared = match &self.inner.attention {
            Numbers::Float32(attention) => attention.prepare(&arrays, threads),
            Numbers::Bfloat16(attention) => attention.prepare(&arrays, threads),
        };
        Ok(prepared.map_err(Failure::from)?)
    }

    /// Writes a layer's new KV to the cache and attends over it.
    #[expect(
        clippy::too_many_arguments,
        reason = "three tensors, each an address; a call for each layer of each step"
    )]
    fn forward(
        &self,
        py: Python<'_>,
        layer: usize,
        query_ptr: usize,
        query_stride: usize,
        key_value_ptr: usize,
        key_value_stride: usize,
        output_ptr: usize,
    ) -> PyResult<()> {
        let Some((cache, _)) = self.inner.layers.get(layer) else {
            let message = format!("layer: {layer} of {}", self.inner.layers.len());
            return Err(Failure::invalid("layer", message).into());
        };
        let tensors = [
            query_ptr,
            query_stride,
            key_value_ptr,
            key_value_stride,
            *cache,
            output_ptr,
        ];
        let inner = Arc::clone(&self.inner);
        call_or_note_prepared(py, move || {
            let threads = inner.threads.load(Ordering::Relaxed);
            let (_, rule) = &inner.layers[layer];
            // SAFETY: the caller says that tensors of these shapes lie there, and leaves them alone until the call
            // returns: the contract of `_core.pyi`.
            unsafe {
                match &inner.attention {
                    Numbers::Float32(attention) => attend(attention, rule, tensors, threads),
                    Numbers::Bfloat16(attention) => attend(attention, rule, tensors, threads),
                }
            }
        })
    }
}

fn make<E: Element>(config: AttentionConfig, portable: bool) -> PyResult<Attention<E>> {
    let attention = Attention::new(config).map_err(Failure::from)?;
    Ok(if portable {
        attention.on(Processor::PORTABLE)
    } else {
        attention
    })
}

/// # Safety
/// As `Attention::forward`.
unsafe fn attend<E: Element>(
    attention: &Attention<E>,
    rule: &Rule,
    tensors: [usize; 6],
    threads: u32,
) {
    let [
        query,
        query_stride,
        key_value,
        key_value_stride,
        cache,
        output,
    ] = tensors;
    let tensors = Tensors {
        query: query as *const E,
        query_stride,
        key_value: key_value as *const E,
        key_value_stride,
        cache: cache as *mut E,
        output: output as *mut E,
    };
    // SAFETY: the caller's promise.
    unsafe { attention.forward(rule, &tensors, threads) }
}

/// The numbers of a plan's array; what is left over at the end of a damaged one is for `prepare` to miss.
fn int32(bytes: &[u8]) -> Vec<i32> {
    let (numbers, _) = bytes.as_chunks::<4>();
    numbers
        .iter()
        .map(|&number| i32::from_le_bytes(number))
        .collect()
}
