//! The doors from outside: a whole router on its own ports, bytes on sockets, and a worker that does what each test
//! says.

mod grpc;
mod http;
mod limits;
mod process;
mod shutdown;
mod support;

#[expect(dead_code, reason = "shared with the unit tests, which use more of it")]
#[path = "../../src/text/fixtures.rs"]
mod fixtures;
