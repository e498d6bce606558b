//! Every transport between two real processes: the same promises, kept or openly not kept.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../../peer/rig.rs"]
mod rig;

mod faults;
mod transfers;
mod two;
