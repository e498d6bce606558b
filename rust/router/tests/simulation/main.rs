//! The whole router in a simulated network: clients, router, workers and foreign engines on hosts of their own, one thread, simulated
//! time, and faults drawn from a seed. Every token of every request is checked.
//!
//! `cargo test -p orchestra-router --test simulation` runs a few hundred faults, `make simulate` 10⁵ of them;
//! `SEED` and `FAULTS` choose a run, and each run prints what it was.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it ran"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "a simulated host ends with its runtime, and its tasks too"
)]

mod chat;
mod client;
mod engine;
mod faults;
mod router;
mod run;
mod trace;
mod worker;

#[expect(dead_code, reason = "shared with the unit tests, which use more of it")]
#[path = "../../src/text/fixtures.rs"]
mod fixtures;
