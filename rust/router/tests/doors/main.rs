//! The doors from outside: a whole router on its own ports, bytes on sockets, and a worker that does what each test
//! says.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "a test's runtime ends with it, and its tasks too"
)]

mod admin;
mod binary;
mod grpc;
mod http;
mod limits;
mod observe;
mod process;
mod settings;
mod shutdown;
mod support;
mod tenants;
mod traces;

#[path = "../shared/http_client.rs"]
mod http_client;

#[expect(dead_code, reason = "shared with the unit tests, which use more of it")]
#[path = "../../src/text/fixtures.rs"]
mod fixtures;
