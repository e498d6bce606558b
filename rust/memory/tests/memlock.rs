//! A process that may lock little memory: refused with both numbers before a library tries, and told in so many words
//! where one does.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and its child answers by printing"
)]

#[path = "../peer/rig.rs"]
#[allow(
    dead_code,
    reason = "shared with the transport tests, which use more of it"
)]
mod rig;

use std::{env, process::Command, sync::Arc};

use orchestra_memory::{
    BufferManager, ManagerConfig, MemlockPolicy, MemoryError, PeerId, PoolConfig, Transport,
    transport::nixl::NixlTransport,
};
use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{CapabilitySet, capabilities, set_capabilities},
};

/// Set in the process that is made poor: what it shall try.
const CHILD: &str = "ORCHESTRA_TEST_MEMLOCK";
/// Set where NIXL has nothing but verbs, which lock what they register.
const VERBS: &str = "ORCHESTRA_TEST_VERBS";
const POOL_BYTES: u64 = 256 << 20;

/// Bytes that the poor process may lock. UCX locks some 50 MiB of its own for verbs, which is not what is tried here.
fn may_lock() -> u64 {
    if env::var_os(VERBS).is_some() {
        128 << 20
    } else {
        4 << 20
    }
}

/// Runs a test of this file in a process of its own; what it printed.
fn in_a_poor_process(test: &str, shall_try: &str) -> String {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, shall_try)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}: {printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    printed
}

fn become_poor() {
    let limit = Rlimit {
        current: Some(may_lock()),
        maximum: Some(may_lock()),
    };
    setrlimit(Resource::Memlock, limit).unwrap();
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    sets.permitted.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).unwrap();
}

fn make_pool(transport: Arc<dyn Transport>, memlock: MemlockPolicy) -> Result<(), MemoryError> {
    let config = ManagerConfig {
        memlock,
        ..ManagerConfig::default()
    };
    let manager = BufferManager::new(PeerId(0), config, vec![transport]).unwrap();
    let pool = PoolConfig {
        slab_bytes: POOL_BYTES,
        huge_pages: false,
        ..PoolConfig::default()
    };
    manager.create_pool(pool).map(drop)
}

#[test]
fn a_pool_that_may_not_be_locked_is_refused_with_both_numbers() {
    if env::var_os(CHILD).is_some() {
        become_poor();
        let shm = rig::open("shm").into();
        println!("{:?}", make_pool(shm, MemlockPolicy::Require));
        return;
    }
    let test = "a_pool_that_may_not_be_locked_is_refused_with_both_numbers";
    let printed = in_a_poor_process(test, "shm");
    let refused: Result<(), _> = Err(MemoryError::MemlockTooLow {
        need: POOL_BYTES,
        have: may_lock(),
    });
    assert!(printed.contains(&format!("{refused:?}")), "{printed}");
}

#[test]
fn a_library_that_may_not_lock_refuses_and_does_not_end_the_process() {
    if env::var_os(CHILD).is_some() {
        become_poor();
        let opened = NixlTransport::open(&rig::nixl_config());
        let made = opened.and_then(|nixl| make_pool(Arc::new(nixl), MemlockPolicy::Ignore));
        println!("made: {made:?}");
        return;
    }
    if !rig::is_installed("nixl") {
        println!("skipped: nixl is not installed");
        return;
    }
    let test = "a_library_that_may_not_lock_refuses_and_does_not_end_the_process";
    let printed = in_a_poor_process(test, "nixl");
    let Some(made) = printed.lines().find_map(|line| line.split_once("made: ")) else {
        panic!("{printed}");
    };
    if env::var_os(VERBS).is_some() {
        assert!(made.1.contains("register a slab"), "{printed}");
    } else {
        // Sockets and the kernel's copies lock nothing.
        assert_eq!(made.1, "Ok(())");
    }
}
