//! The mocks: built with the C compiler that links everything else, and looked into.

#![expect(unsafe_code, reason = "calls the mock driver")]

use std::{env, path::PathBuf, process::Command, sync::OnceLock};

use libloading::Library;
use orchestra_memory::{
    cuda::LIBRARY_VARIABLE, transport::nixl::library::LIBRARY_VARIABLE as NIXL_VARIABLE,
};

/// Set in the process that has the mocks.
const CHILD: &str = "ORCHESTRA_TEST_DEVICES";

/// The mock driver and the mock of NIXL, built once.
fn mocks() -> &'static [PathBuf; 2] {
    static MOCKS: OnceLock<[PathBuf; 2]> = OnceLock::new();
    MOCKS.get_or_init(|| ["mock_driver", "mock_nixl"].map(|name| build(name, name, &[])))
}

/// Builds a library from its C file; where it lies.
pub(crate) fn build(source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let built = folder.join(format!("lib{name}.so"));
    if env::var_os(CHILD).is_some() {
        return built;
    }
    // Tests run beside each other: each process builds its own, and puts it in place whole.
    let mine = folder.join(format!("lib{name}.{}.so", std::process::id()));
    let source = format!("{}/tests/devices/{source}.c", env!("CARGO_MANIFEST_DIR"));
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let compiled = Command::new(compiler)
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread"])
        .args(flags)
        .arg("-o")
        .args([&mine, &PathBuf::from(source)])
        .status()
        .unwrap();
    assert!(compiled.success());
    std::fs::rename(mine, &built).unwrap();
    built
}

/// Runs the body of a test in a process of its own, where the mocks are the libraries.
pub(crate) fn run(test: &str, env: &[(&str, &str)], body: impl FnOnce()) {
    if env::var_os(CHILD).is_some() {
        return body();
    }
    let [driver, nixl] = mocks();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .env(LIBRARY_VARIABLE, driver)
        .env(NIXL_VARIABLE, nixl)
        .env("UCX_MODULES", "^ib")
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let is_run = printed.contains("1 passed");
    assert!(
        output.status.success() && is_run,
        "{}: {printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What the mock driver has given out and not got back.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) allocated_bytes: i64,
    pub(crate) registered_bytes: i64,
    pub(crate) contexts: i64,
    /// Contexts that this thread has entered.
    pub(crate) depth: i64,
}

fn driver() -> Library {
    // SAFETY: the mock has no initialisers.
    unsafe { Library::new(env::var_os(LIBRARY_VARIABLE).unwrap()) }.unwrap()
}

pub(crate) fn counts() -> Counts {
    let driver = driver();
    let count = |name: &str| {
        // SAFETY: the mock's counters take nothing and answer with a long.
        unsafe {
            let counter = driver.get::<unsafe extern "C" fn() -> i64>(name.as_bytes());
            counter.unwrap()()
        }
    };
    Counts {
        allocated_bytes: count("mock_allocated_bytes"),
        registered_bytes: count("mock_registered_bytes"),
        contexts: count("mock_contexts"),
        depth: count("mock_depth"),
    }
}

/// Reads memory of a device as a network card would.
pub(crate) fn peek(address: u64, bytes: &mut [u8]) {
    let driver = driver();
    // SAFETY: the type is the mock's, and `bytes` are as long as is said.
    unsafe {
        let copy = driver.get::<unsafe extern "C" fn(u64, u64, usize)>(b"mock_move");
        copy.unwrap()(bytes.as_mut_ptr().addr() as u64, address, bytes.len());
    }
}
