//! The atomics of the block table. The loom model builds the table with loom's in their place.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
