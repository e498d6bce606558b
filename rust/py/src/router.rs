//! The router inside the wheel.

use std::{ffi::OsString, iter};

use pyo3::prelude::*;

/// Runs a router with these command-line arguments until `SIGTERM` or `SIGINT` has stopped it; the exit status.
#[pyfunction]
pub(crate) fn run_router(py: Python<'_>, argv: Vec<OsString>) -> u8 {
    let program = OsString::from("orchestra router");
    py.detach(|| orchestra_router::exit_status(iter::once(program).chain(argv)))
}
