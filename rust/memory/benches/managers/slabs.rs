//! Making and registering a slab, beside touching as much memory and pinning it.

use std::{num::NonZeroUsize, sync::Arc, time::Instant};

use orchestra_memory::{Slab, SlabConfig, SlabId};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, munmap},
};

use crate::{median, rig, transports};

const BYTES: usize = 1 << 30;
const ROUNDS: u32 = 5;

/// Seconds to map and touch a memory file by one call, and to pin it; none where it may not be pinned.
#[expect(unsafe_code, reason = "maps memory of its own and looks at none of it")]
fn touch_and_pin(huge_pages: bool) -> (f64, Option<f64>) {
    let started = Instant::now();
    let file = memfd_create("bench", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, BYTES as u64).unwrap();
    // SAFETY: a new mapping that nobody else knows of, unmapped below.
    unsafe {
        let (read_write, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let base = mmap(std::ptr::null_mut(), BYTES, read_write, shared, &file, 0).unwrap();
        if huge_pages {
            let _ = madvise(base, BYTES, Advice::LinuxHugepage);
        }
        madvise(base, BYTES, Advice::LinuxPopulateWrite).unwrap();
        let touched = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let pinned = mlock(base, BYTES).is_ok();
        let pin = started.elapsed().as_secs_f64();
        munmap(base, BYTES).unwrap();
        (touched, pinned.then_some(pin))
    }
}

pub(crate) fn measure() {
    let threads = NonZeroUsize::MIN.saturating_add(1);
    for huge_pages in [true, false] {
        let [mut touches, mut pins, mut makes] = [const { Vec::new() }; 3];
        let mut registers: Vec<(&str, Vec<f64>)> =
            transports().map(|kind| (kind, Vec::new())).collect();
        let mut pages = None;
        for round in 0..ROUNDS {
            let (touch, pin) = touch_and_pin(huge_pages);
            touches.push(touch);
            pins.extend(pin);
            let config = SlabConfig {
                len: BYTES as u64,
                huge_pages,
                prefault: true,
                prefault_threads: threads,
                ..SlabConfig::default()
            };
            let started = Instant::now();
            let slab = Arc::new(Slab::create(SlabId(round), &config).unwrap());
            makes.push(started.elapsed().as_secs_f64());
            pages = slab.pages();
            for (kind, taken) in &mut registers {
                let transport = rig::open(kind);
                let started = Instant::now();
                transport.register(&slab).unwrap();
                taken.push(started.elapsed().as_secs_f64());
            }
        }
        let pin = if pins.is_empty() {
            "may not be pinned here".to_owned()
        } else {
            format!("pin {:.1} ms", median(pins) * 1e3)
        };
        let registers = registers
            .into_iter()
            .map(|(kind, taken)| format!(", register with {kind} {:.3} ms", median(taken) * 1e3));
        println!(
            "slabs: 1 GiB of {:?} pages: touch on one thread {:.0} ms, {pin}; make on {threads} threads {:.0} ms{}",
            pages.unwrap(),
            median(touches) * 1e3,
            median(makes) * 1e3,
            registers.collect::<String>(),
        );
    }
}
