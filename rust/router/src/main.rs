//! `orchestra-router`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    orchestra_router::main_from_args(std::env::args_os())
}
