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
mod pauses;
mod replay;
mod shares;
mod support;

#[expect(
    dead_code,
    reason = "shared with the doors' tests, which use more of it"
)]
#[path = "../shared/http_client.rs"]
mod http_client;
