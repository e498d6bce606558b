//! What the CPU ranks of a worker compute and say to each other, where torch is too slow.
//!
//! Reading order: [`error`] and [`bf16`] are shared words; [`group`] are the collectives of ranks on one machine, and
//! [`ring`] the messages of one to the others, over shared memory; [`attention`] is paged attention, [`linear`] and
//! [`pairs`] the layers with weights, [`experts`] mixtures of them and [`rows`] what comes between them and after them, over
//! [`simd`] for vectors and [`pool`] for threads and `spares` for what each of them computes in.
//!
//! Everything here gives the same bits on every call with the same numbers, whatever else runs: sums have a fixed
//! order, and no result depends on who came first.
//!
//! `unsafe` is denied by the workspace. The few modules that need it say so in an `#![expect(unsafe_code)]`
//! of their own, and each block carries its argument.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod attention;
pub mod bf16;
mod counter;
mod element;
pub mod error;
pub mod experts;
pub mod group;
pub mod linear;
mod memory_file;
mod pages;
pub mod pairs;
pub mod pool;
pub mod ring;
pub mod rows;
mod simd;
mod spares;

pub use attention::{Attention, AttentionConfig, Rule, StepArrays};
pub use element::Element;
pub use error::{AttentionError, GroupError, LinearError, RingError};
pub use group::{GroupConfig, SharedGroup};
pub use linear::Linear;
pub use pairs::PairLinear;
pub use ring::{RingConfig, RingReader, RingWriter};
pub use simd::Processor;
