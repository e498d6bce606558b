//! Attention over the paged KV cache, on the CPU.
//!
//! The cache of a layer is `[blocks, 2, kv_heads, block_size, head_dim]`, keys before values. A call writes the new keys
//! and values of a step there, then attends: each tile, some tokens of a sequence and the query heads of one KV head, is
//! computed by one thread, which takes the next one when it is done. [`tile`] says why neither the threads nor the rest
//! of the step change a bit of the result. `pairs` does the same in bf16 where the processor multiplies tiles (AMX).

#![expect(unsafe_code, reason = "sees the memory of tensors")]

#[cfg(target_arch = "x86_64")]
mod pairs;
mod step;
mod tile;

#[cfg(target_arch = "x86_64")]
use std::any::TypeId;
use std::{marker::PhantomData, ptr};

use parking_lot::RwLock;

pub use self::step::StepArrays;
use self::{
    step::{Cut, Step, Tile},
    tile::Scratch,
};
use crate::{
    element::Element,
    error::AttentionError,
    pool::share,
    simd::{Kind, LANES, Portable, Processor},
    spares::Spares,
};

/// Cached tokens that a row takes at a time, at multiples of it.
const CHUNK: usize = 64;
/// So many tiles for each thread, before what could be several becomes one: they are not equally long.
const TILES_PER_THREAD: usize = 4;
/// Longest head.
pub const HEAD_DIM_MAX: usize = 1024;
/// New KV of a step that is written by the caller alone, bytes: waking others costs more.
const WRITE_ALONE_BYTES: usize = 256 << 10;

/// Shapes of a rank's attention and its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionConfig {
    /// Query heads, a multiple of the KV heads.
    pub num_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Size of a head, a multiple of 8.
    pub head_dim: usize,
    /// Tokens per block, a multiple of 8.
    pub block_size: usize,
    /// Blocks of the cache.
    pub num_blocks: usize,
}

impl AttentionConfig {
    /// Query heads that share a KV head.
    const fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    const fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    fn check(&self) -> Result<(), AttentionError> {
        let wrong = |field, reason| Err(AttentionError::wrong(field, reason));
        if self.num_kv_heads == 0 || self.num_heads == 0 {
            return wrong("num_heads", "is zero");
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return wrong("num_heads", "is no multiple of num_kv_heads");
        }
        let is_whole = |size: usize| size > 0 && size.is_multiple_of(LANES);
        if !is_whole(self.head_dim) || self.head_dim > HEAD_DIM_MAX {
            return wrong("head_dim", "is not a multiple of 8 up to 1024");
        }
        if !is_whole(self.block_size) {
            return wrong("block_size", "is not a multiple of 8");
        }
        // What places in the cache are computed from fits 32 bits, as the plan's arrays do.
        if self.num_blocks == 0 || self.num_slots() > i32::MAX as usize {
            return wrong(
                "num_blocks",
                "is zero, or more than the plan's arrays can name",
            );
        }
        Ok(())
    }
}

/// What a layer's tokens see of what came before, and how scores are made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rule {
    /// Tokens that each token sees, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Multiplies the scores; `None`: one by the root of the head's size.
    pub scale: Option<f32>,
    /// Bends every score `x` to `cap * tanh(x / cap)`.
    pub soft_cap: Option<f32>,
}

impl Rule {
    /// The first position that a token sees which has `seen` tokens up to itself.
    fn first_seen(&self, seen: usize) -> usize {
        self.window.map_or(0, |window| seen.saturating_sub(window))
    }
}

/// Addresses of one layer's call; `T` tokens in the step.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<E> {
    /// `[T, num_heads, head_dim]`
    pub query: *const E,
    /// Numbers from one token's queries to the next one's.
    pub query_stride: usize,
    /// `[T, 2 * num_kv_heads, head_dim]`, the keys, then the values.
    pub key_value: *const E,
    /// Numbers from one token's keys to the next one's.
    pub key_value_stride: usize,
    /// `[num_blocks, 2, num_kv_heads, block_size, head_dim]`
    pub cache: *mut E,
    /// `[T, num_heads * head_dim]`
    pub output: *mut E,
}

/// What the threads of one call share.
struct Layer<'a, E> {
    config: AttentionConfig,
    rule: Rule,
    scale: f32,
    step: &'a Step,
    tensors: Tensors<E>,
}

// SAFETY: threads read the same queries and the same cache, and each writes what no other touches: its tiles' rows of
// the output; and before that, with nobody reading, its tokens' places of the cache.
unsafe impl<E: Element> Sync for Layer<'_, E> {}

impl<E: Element> Layer<'_, E> {
    /// The same, where its numbers are bf16.
    #[cfg(target_arch = "x86_64")]
    fn as_bf16(&self) -> Option<&Layer<'_, u16>> {
        let is_bf16 = TypeId::of::<E>() == TypeId::of::<u16>();
        // SAFETY: it is a layer of these numbers.
        is_bf16.then(|| unsafe { &*ptr::from_ref(self).cast::<Layer<'_, u16>>() })
    }
}

/// Paged attention of one rank, in one kind of number: remembers the step between its layers.
pub struct Attention<E> {
    config: AttentionConfig,
    processor: Processor,
    /// Whether it is computed in pairs: bf16 alone.
    in_pairs: bool,
    step: RwLock<Step>,
    scratch: Spares<Scratch>,
    #[cfg(target_arch = "x86_64")]
    pair_scratch: Spares<pairs::Scratch>,
    numbers: PhantomData<fn(E)>,
}

impl<E: Element> Attention<E> {
    /// For these shapes, on what this processor has.
    pub fn new(config: AttentionConfig) -> Result<Self, AttentionError> {
        config.check()?;
        Ok(Self {
            config,
            processor: Processor::here(),
            #[cfg(target_arch = "x86_64")]
            in_pairs: TypeId::of::<E>() == TypeId::of::<u16>() && pairs::fits(&config),
            #[cfg(not(target_arch = "x86_64"))]
            in_pairs: false,
            step: RwLock::default(),
            scratch: Spares::default(),
            #[cfg(target_arch = "x86_64")]
            pair_scratch: Spares::default(),
            numbers: PhantomData,
        })
    }

    /// The same by the twin for another kind of processor, without what multiplies pairs.
    #[must_use]
    pub fn on(self, processor: Processor) -> Self {
        Self {
            processor,
            in_pairs: false,
            ..self
        }
    }

    /// How a step is cut for so many threads.
    const fn cut(&self, threads: u32) -> Cut {
        let tiles = threads as usize * TILES_PER_THREAD;
        #[cfg(target_arch = "x86_64")]
        if self.in_pairs {
            return Cut {
                rows: (pairs::ROWS, pairs::ROWS),
                together: pairs::TOGETHER,
                tiles,
            };
        }
        Cut {
            rows: tile::ROWS,
            together: tile::TOGETHER,
            tiles,
        }
    }

    /// Checks a step's arrays and lays it out for up to `threads` threads; called once, before its first layer.
    pub fn prepare(&self, arrays: &StepArrays<'_>, threads: u32) -> Result<(), AttentionError> {
        *self.step.write() = Step::new(arrays, &self.config, &self.cut(threads))?;
        Ok(())
    }

    /// Writes the new KV of a layer into its cache, then attends, on up to `threads` threads.
    ///
    /// # Safety
    /// The addresses are of tensors of the shapes that [`Tensors`] says, with as many tokens as the prepared step,
    /// aligned for their numbers. Until the call returns nobody writes the queries, the new KV or the step's blocks, and
    /// nobody reads or writes the output. Others may write other blocks of the cache.
    pub unsafe fn forward(&self, rule: &Rule, tensors: &Tensors<E>, threads: u32) {
        let step = self.step.read();
        let layer = Layer {
            config: self.config,
            rule: *rule,
            scale: rule
                .scale
                .unwrap_or_else(|| 1.0 / (self.config.head_dim as f32).sqrt()),
            step: &step,
            tensors: *tensors,
        };
        let token_bytes = 2 * self.config.num_kv_heads * self.config.head_dim * size_of::<E>();
        let is_little = step.num_tokens * token_bytes <= WRITE_ALONE_BYTES;
        let writers = if is_little { 1 } else { threads };
        // SAFETY: the caller's promise; each token has a slot of its own.
        let write = |(): &mut (), token| unsafe { write_token(&layer, token) };
        share(step.num_tokens, writers, || (), write);
        let rows = self.cut(threads).rows.1.max(self.config.group());
        #[cfg(target_arch = "x86_64")]
        if self.in_pairs
            && let Some(layer) = layer.as_bf16()
        {
            let make = || pairs::Scratch::new(rows, self.config.head_dim);
            let begin = || self.pair_scratch.take(make);
            share(step.tiles.len(), threads, begin, |scratch, index| {
                let next = step.tiles.get(index + threads as usize);
                // SAFETY: the processor can; the rest is the caller's promise, and each tile is computed once.
                unsafe { pairs::attend(layer, (&step.tiles[index], next), scratch) }
            });
            return;
        }
        let make = || Scratch::new(rows, self.config.head_dim);
        let begin = || self.scratch.take(make);
        share(step.tiles.len(), threads, begin, |scratch, index| {
            let tile = &step.tiles[index];
            // SAFETY: the processor is of that kind; the rest is the caller's promise, and each tile is computed once.
            unsafe {
                match self.processor.kind() {
                    #[cfg(target_arch = "x86_64")]
                    Kind::Avx512 => attend_avx512(&layer, tile, scratch),
                    #[cfg(target_arch = "x86_64")]
                    Kind::Avx2 => attend_avx2(&layer, tile, scratch),
                    Kind::Portable => tile::attend::<[Portable; 2], E>(&layer, tile, scratch),
                }
            }
        });
    }
}

/// # Safety
/// As `tile::attend`, on a processor with AVX2 and fused multiply-add.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn attend_avx2<E: Element>(layer: &Layer<'_, E>, tile: &Tile, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { tile::attend::<[crate::simd::Avx2; 2], E>(layer, tile, scratch) }
}

/// # Safety
/// As `tile::attend`, on a processor with AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn attend_avx512<E: Element>(layer: &Layer<'_, E>, tile: &Tile, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { tile::attend::<crate::simd::Avx512, E>(layer, tile, scratch) }
}

/// Copies a token's keys and values to its slot.
///
/// # Safety
/// The addresses are as `forward` says, and nobody else writes or reads the slot now.
unsafe fn write_token<E: Element>(layer: &Layer<'_, E>, token: usize) {
    let (config, tensors) = (&layer.config, &layer.tensors);
    let (size, block_size) = (config.head_dim, config.block_size);
    let (block, place) = layer.step.slot(token, block_size);
    let runs = 2 * config.num_kv_heads;
    for run in 0..runs {
        // SAFETY: the token is one of the step's, and its slot was found to be inside the cache.
        unsafe {
            let from = tensors
                .key_value
                .add(token * tensors.key_value_stride + run * size);
            let to = tensors
                .cache
                .add(((block * runs + run) * block_size + place) * size);
            ptr::copy_nonoverlapping(from, to, size);
        }
    }
}
