//! Linear layers on the CPU: `y = x · Wᵀ + b`, for a row or for thousands.
//!
//! The weights are laid out once: panels of 16 outputs, and in each, input after input, the 16 weights of that input. A
//! call is cut into blocks of rows and panels, each computed by one thread, which takes the next one when it is done
//! (the blocking of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, less the copy of
//! the rows: they are few).
//!
//! An output is a sum over the inputs in their order, with one fused multiply-add each, in `f32`. Neither the other rows
//! of the step nor the threads change a bit of it: one row alone gives what it gives among thousands.

#![expect(unsafe_code, reason = "sees the memory of tensors")]

mod cut;
mod tile;

pub(crate) use self::cut::Cut;
use self::tile::Scratch;
use crate::{
    element::Element,
    error::LinearError,
    pages::Pages,
    pool::share_all,
    simd::{Kind, Portable, Processor},
};

/// Outputs of a panel.
const PANEL: usize = 16;
/// Panels of a block, at most: their sums stay in the first cache.
const PANELS: usize = 4;
/// Rows of a block, at most: their inputs stay in the second cache.
const ROWS: usize = 48;
/// Most inputs or outputs of a layer.
const SIZE_MAX: usize = 1 << 24;

/// Rows to compute: `n` of them.
#[derive(Clone, Copy, Debug)]
pub struct Rows<E> {
    /// `[n, inputs]`
    pub input: *const E,
    /// Numbers from one row's inputs to the next one's.
    pub input_stride: usize,
    /// `[n, outputs]`, without gaps.
    pub output: *mut E,
    /// `n`.
    pub count: usize,
}

/// A linear layer, its weights laid out for the kernel.
pub struct Linear<E> {
    outputs: usize,
    inputs: usize,
    /// `[panels, inputs, PANEL]`; what is left of the last panel is zeros.
    weights: Pages<E>,
    /// `[panels * PANEL]`
    bias: Vec<f32>,
    processor: Processor,
}

/// Linear layers of which several are computed at once, each with rows of its own: threads wait for each other once.
pub trait Together: Send + Sync {
    /// What inputs and outputs are.
    type Number: Element;

    /// Outputs and inputs.
    fn shape(&self) -> (usize, usize);

    /// Computes some rows by each layer, on up to `threads` threads. A row has the bits that it has in a call of its own.
    ///
    /// # Safety
    /// As [`Linear::forward`], of each of them; no two write the same outputs.
    unsafe fn forward_together(calls: &[(&Self, Rows<Self::Number>)], threads: u32);
}

/// What the threads of one call share.
struct Call<'a, E> {
    layer: &'a Linear<E>,
    rows: Rows<E>,
}

// SAFETY: threads read the same inputs and weights, and each writes its own blocks of the output.
unsafe impl<E: Element> Sync for Call<'_, E> {}

/// What one thread computes at a time.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Its rows: the first, and how many.
    rows: (usize, usize),
    /// Its panels: the first, and how many.
    panels: (usize, usize),
}

/// Refuses sizes out of range.
pub(crate) fn check_shape(outputs: usize, inputs: usize) -> Result<(), LinearError> {
    for (field, size) in [("outputs", outputs), ("inputs", inputs)] {
        if size == 0 || size > SIZE_MAX {
            let reason = "is not from 1 to 16777216";
            return Err(LinearError::InvalidShape { field, reason });
        }
    }
    Ok(())
}

impl<E: Element> Linear<E> {
    /// Copies the weights.
    ///
    /// # Safety
    /// `weight` is the address of `outputs * inputs` numbers, output after output, and `bias` of `outputs`; nobody writes
    /// them before this returns.
    pub unsafe fn new(
        (outputs, inputs): (usize, usize),
        weight: *const E,
        bias: Option<*const E>,
    ) -> Result<Self, LinearError> {
        check_shape(outputs, inputs)?;
        let panels = outputs.div_ceil(PANEL);
        let mut weights = Pages::zeroed(panels * inputs * PANEL)?;
        for (panel, target) in weights
            .as_mut_slice()
            .chunks_exact_mut(inputs * PANEL)
            .enumerate()
        {
            for column in 0..PANEL.min(outputs - panel * PANEL) {
                for input in 0..inputs {
                    let from = (panel * PANEL + column) * inputs + input;
                    // SAFETY: the caller's promise.
                    target[input * PANEL + column] = unsafe { weight.add(from).read() };
                }
            }
        }
        let mut sums = vec![0.0; panels * PANEL];
        if let Some(bias) = bias {
            for (at, sum) in sums[..outputs].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *sum = unsafe { bias.add(at).read() }.widen();
            }
        }
        Ok(Self {
            outputs,
            inputs,
            weights,
            bias: sums,
            processor: Processor::here(),
        })
    }

    /// The same by the twin for another kind of processor.
    #[must_use]
    pub fn on(self, processor: Processor) -> Self {
        Self { processor, ..self }
    }

    /// Computes some rows, on up to `threads` threads.
    ///
    /// # Safety
    /// The addresses are of tensors of the shapes that [`Rows`] says, aligned for their numbers. Until the call returns
    /// nobody writes the inputs, and nobody reads or writes the outputs.
    pub unsafe fn forward(&self, rows: &Rows<E>, threads: u32) {
        // SAFETY: the caller's promise.
        unsafe { Self::forward_together(&[(self, *rows)], threads) }
    }

    /// Computes one block, which no other thread does.
    fn compute(&self, call: &Call<'_, E>, block: &Block, scratch: &mut Scratch) {
        // SAFETY: the processor is of that kind; the rest is the promise of who called `forward`.
        unsafe {
            match self.processor.kind() {
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => compute_avx512(call, block, scratch),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => compute_avx2(call, block, scratch),
                Kind::Portable => tile::compute::<[Portable; 2], E>(call, block, scratch),
            }
        }
    }
}

impl<E: Element> Together for Linear<E> {
    type Number = E;

    fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    unsafe fn forward_together(calls: &[(&Self, Rows<E>)], threads: u32) {
        let calls: Vec<_> = calls
            .iter()
            .map(|(layer, rows)| {
                let (panels, blocks) = (layer.outputs.div_ceil(PANEL), rows.count.div_ceil(ROWS));
                let cut = Cut::new(panels, blocks, PANELS, threads);
                (Call { layer, rows: *rows }, cut)
            })
            .collect();
        let counts = calls.iter().map(|(_, cut)| cut.count());
        share_all(counts, threads, Scratch::new, |scratch, (at, piece)| {
            let (call, cut) = &calls[at];
            let (panels, blocks) = cut.piece(piece);
            let (count, down) = (call.rows.count, call.rows.count.div_ceil(ROWS));
            for block in blocks {
                let first = count * block / down;
                let rows = (first, count * (block + 1) / down - first);
                let panels = (panels.start, panels.len());
                call.layer.compute(call, &Block { rows, panels }, scratch);
            }
        });
    }
}

/// # Safety
/// As `tile::compute`, on a processor with AVX2 and fused multiply-add.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn compute_avx2<E: Element>(call: &Call<'_, E>, block: &Block, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { tile::compute::<[crate::simd::Avx2; 2], E>(call, block, scratch) }
}

/// # Safety
/// As `tile::compute`, on a processor with AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn compute_avx512<E: Element>(call: &Call<'_, E>, block: &Block, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { tile::compute::<crate::simd::Avx512, E>(call, block, scratch) }
}
