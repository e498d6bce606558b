//! The router before foreign engines, over real sockets: engines that do exactly what each test says, and clients that
//! look at every byte.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod failures;
mod health;
mod observing;
mod passing;
mod replay;
mod support;
