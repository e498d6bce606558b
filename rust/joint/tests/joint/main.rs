//! KV that moves between real agents because a real router says so. Their model computes nothing of use, but each token that
//! it draws depends on every byte of KV that the sequence sees: one wrong block, and an answer differs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod keeper_faults;
mod keeping;
mod moves;
mod process;
mod proxy;
mod support;
