//! Pinned memory and memory of devices: against a mock of the driver, each test in a process of its own, and against a
//! real one where there is an NVIDIA GPU (`make gpu`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod mock;
mod pools;

use std::fs;

use orchestra_memory::{MemoryError, Slab, SlabConfig, SlabId, Tier};

const SLAB_BYTES: u64 = 2 << 20;

fn slab(id: u32, tier: Tier) -> Result<Slab, MemoryError> {
    let config = SlabConfig {
        tier,
        len: SLAB_BYTES,
        huge_pages: false,
        ..SlabConfig::default()
    };
    Slab::create(SlabId(id), &config)
}

const fn on(device: u32) -> Tier {
    Tier::Vram { device }
}

fn bytes_of(slab: &Slab, offset: u64) -> [u8; 8] {
    let mut bytes = [0xee; 8];
    slab.read(offset, &mut bytes).unwrap();
    bytes
}

/// What a slab on a device does, whatever the driver.
fn bytes_go_to_a_device_and_back() {
    let slab = slab(0, on(0)).unwrap();
    assert_eq!((slab.tier(), slab.len()), (on(0), SLAB_BYTES));
    assert!(slab.file().is_none() && slab.pages().is_none());
    assert_eq!(
        bytes_of(&slab, SLAB_BYTES - 8),
        [0; 8],
        "a new slab is zero"
    );
    slab.write(SLAB_BYTES - 8, b"on there").unwrap();
    slab.copy_to(SLAB_BYTES - 8, &slab, 0, 8).unwrap();
    assert_eq!(&bytes_of(&slab, 0), b"on there");
    let host = self::slab(1, Tier::Dram).unwrap();
    slab.copy_to(0, &host, 100, 8).unwrap();
    assert_eq!(&bytes_of(&host, 100), b"on there");
    host.write(100, b"and back").unwrap();
    host.copy_to(100, &slab, 64, 8).unwrap();
    assert_eq!(&bytes_of(&slab, 64), b"and back");
    let (offset, len, limit) = (SLAB_BYTES - 1, 2, SLAB_BYTES);
    let outside = Err(MemoryError::OutOfBounds { offset, len, limit });
    assert_eq!(slab.write(offset, &[1, 2]), outside);
    assert_eq!(slab.read(offset, &mut [1, 2]), outside);
    assert_eq!(slab.write(limit, &[]), Ok(()));
    let refused = slab.copy_to(0, &slab, 7, 8);
    assert!(matches!(refused, Err(MemoryError::InvalidField { field, .. }) if field == "to"));
}

fn pinned_memory_is_host_memory() {
    let slab = slab(0, Tier::Pinned).unwrap();
    assert!(slab.file().is_some() && slab.pages().is_some());
    slab.write(5, b"pinned").unwrap();
    let mut through_file = [0; 6];
    rustix::io::pread(slab.file().unwrap(), &mut through_file, 5).unwrap();
    assert_eq!(&through_file, b"pinned");
}

#[test]
fn a_device_keeps_what_was_written_and_no_pointer_of_ours_reaches_it() {
    let test = "a_device_keeps_what_was_written_and_no_pointer_of_ours_reaches_it";
    mock::run(test, &[], || {
        bytes_go_to_a_device_and_back();
        let slab = slab(0, on(1)).unwrap();
        // What a network card would find: the copies are not under way any more when the calls return.
        slab.write(9, b"here").unwrap();
        let mut seen = [0; 4];
        mock::peek(slab.as_ptr().addr() as u64 + 9, &mut seen);
        assert_eq!(&seen, b"here");
        slab.copy_to(9, &slab, 99, 4).unwrap();
        mock::peek(slab.as_ptr().addr() as u64 + 99, &mut seen);
        assert_eq!(&seen, b"here");
        let start = format!("{:x}-", slab.as_ptr().addr());
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.contains(" ---p "), "the mock's memory is out of reach");
        let other = self::slab(1, on(0)).unwrap();
        let refused = slab.copy_to(0, &other, 0, 8);
        assert!(matches!(refused, Err(MemoryError::InvalidField { field, .. }) if field == "to"));
        assert_eq!(mock::counts().allocated_bytes, 2 * SLAB_BYTES as i64);
        drop((slab, other));
        assert_eq!(mock::counts(), mock::Counts::default());
    });
}

#[test]
fn pinned_memory_is_registered_while_it_is_mapped() {
    let test = "pinned_memory_is_registered_while_it_is_mapped";
    mock::run(test, &[], || {
        pinned_memory_is_host_memory();
        let slab = slab(0, Tier::Pinned).unwrap();
        let counts = mock::counts();
        assert_eq!(counts.registered_bytes, SLAB_BYTES as i64);
        assert_eq!((counts.contexts, counts.depth), (1, 0));
        drop(slab);
        assert_eq!(mock::counts(), mock::Counts::default());
    });
}

#[test]
fn memory_that_the_driver_does_not_give_back_stays_mapped() {
    let test = "memory_that_the_driver_does_not_give_back_stays_mapped";
    let env = [("MOCK_CUDA_FAIL", "cuMemHostUnregister")];
    mock::run(test, &env, || {
        let slab = slab(0, Tier::Pinned).unwrap();
        let start = format!("{:x}-", slab.as_ptr().addr());
        drop(slab);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.lines().any(|line| line.starts_with(&start)));
    });
}

/// Tries pinned memory and a device's, which both need the driver; the reason, which is the same.
fn unavailable(device: u32) -> String {
    let mut reasons = [Tier::Pinned, on(device)].map(|tier| match slab(0, tier) {
        Err(MemoryError::TierUnavailable {
            tier: named,
            reason,
        }) if named == tier => reason,
        other => unreachable!("{other:?}"),
    });
    assert_eq!(reasons[0], reasons[1]);
    std::mem::take(&mut reasons[0])
}

#[test]
fn a_driver_that_is_not_there_is_named() {
    let test = "a_driver_that_is_not_there_is_named";
    mock::run(
        test,
        &[("ORCHESTRA_CUDA_LIB", "/nowhere/libcuda.so.1")],
        || {
            let reason = unavailable(0);
            assert!(reason.starts_with("/nowhere/libcuda.so.1: "), "{reason}");
            slab(0, Tier::Dram).unwrap();
        },
    );
}

#[test]
fn a_driver_that_lacks_a_function_is_refused_when_it_is_loaded() {
    let test = "a_driver_that_lacks_a_function_is_refused_when_it_is_loaded";
    let old = mock::build("mock_driver", "mock_driver_too_old", &["-DTOO_OLD"]);
    mock::run(
        test,
        &[("ORCHESTRA_CUDA_LIB", old.to_str().unwrap())],
        || {
            let reason = unavailable(0);
            assert!(reason.contains("cuMemFree_v2"), "{reason}");
        },
    );
}

#[test]
fn a_machine_without_a_device_says_so() {
    let test = "a_machine_without_a_device_says_so";
    mock::run(test, &[("MOCK_CUDA_DEVICES", "0")], || {
        let reason = unavailable(0);
        assert!(
            reason.ends_with("start the driver: CUDA_ERROR_NO_DEVICE (100)"),
            "{reason}"
        );
    });
}

#[test]
fn a_device_that_is_not_there_is_refused_and_no_other_taken() {
    let test = "a_device_that_is_not_there_is_refused_and_no_other_taken";
    mock::run(test, &[], || {
        for device in [2, u32::MAX] {
            let Err(MemoryError::TierUnavailable { tier, reason }) = slab(0, on(device)) else {
                unreachable!("there are two devices");
            };
            assert_eq!(tier, on(device));
            let expected = "find the device: CUDA_ERROR_INVALID_DEVICE (101)";
            assert!(reason.ends_with(expected), "{reason}");
        }
        assert_eq!(mock::counts(), mock::Counts::default());
    });
}

#[test]
fn a_full_device_says_how_much_was_asked_for_and_keeps_nothing() {
    let test = "a_full_device_says_how_much_was_asked_for_and_keeps_nothing";
    mock::run(test, &[("MOCK_CUDA_BYTES", "3000000")], || {
        let first = slab(0, on(1)).unwrap();
        let (device, need) = (1, SLAB_BYTES);
        let full = Err(MemoryError::DeviceExhausted { device, need });
        assert_eq!(slab(1, on(1)).map(drop), full);
        slab(2, on(0)).unwrap();
        drop(first);
        slab(3, on(1)).unwrap();
        assert_eq!(mock::counts(), mock::Counts::default());
    });
}

/// Has a function fail; what the driver said must come out, and nothing be kept.
fn refused_by(function: &str, test: &str, tier: Tier, action: &'static str) {
    mock::run(test, &[("MOCK_CUDA_FAIL", function)], || {
        let refused = slab(0, tier).and_then(|slab| {
            slab.write(0, b"x")?;
            slab.copy_to(0, &slab, 8, 1)?;
            slab.read(8, &mut [0])
        });
        let expected = MemoryError::Device {
            device: 0,
            action,
            name: "CUDA_ERROR_UNKNOWN".to_owned(),
            code: 999,
        };
        assert_eq!(refused, Err(expected));
        assert_eq!(mock::counts(), mock::Counts::default());
    });
}

macro_rules! refusals {
    ($($test:ident: $function:literal, $tier:expr, $action:literal;)*) => {
        $(
            #[test]
            fn $test() {
                refused_by($function, stringify!($test), $tier, $action);
            }
        )*
    };
}

refusals! {
    a_context_that_cannot_be_entered: "cuCtxPushCurrent_v2", on(0), "enter the device's context";
    memory_that_cannot_be_cleared: "cuMemsetD8_v2", on(0), "clear memory";
    a_copy_to_the_device_that_fails: "cuMemcpyHtoD_v2", on(0), "copy to the device";
    a_copy_on_the_device_that_fails: "cuMemcpyDtoD_v2", on(0), "copy on the device";
    a_copy_from_the_device_that_fails: "cuMemcpyDtoH_v2", on(0), "copy from the device";
    host_memory_that_cannot_be_registered: "cuMemHostRegister_v2", Tier::Pinned, "register host memory";
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_real_device_keeps_what_was_written() {
    bytes_go_to_a_device_and_back();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_real_driver_pins_host_memory() {
    pinned_memory_is_host_memory();
}
