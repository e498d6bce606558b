//! Memory that somebody else has made: the cache of its registrations against a naive model, and transfers from and into
//! it over every transport.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

#[path = "../../peer/rig.rs"]
#[allow(
    dead_code,
    reason = "shared with the transport tests, which use more of it"
)]
mod rig;

mod cache;
mod model;
mod owners;
mod recorder;
mod transfers;
