//! Registering memory of others: found in the cache, beside a hash lookup; and registered anew by each transport.

use std::{hint::black_box, sync::Arc};

use orchestra_memory::{
    BufferManager, ForeignMemory, ManagerConfig, PeerId, Region, RegistrationGuard,
};
use rustc_hash::FxHashMap;

use crate::{owners::Heap, pools::nanoseconds, rig, transports};

/// Registrations that there are, so that a look-up has something to look through.
const KNOWN: usize = 256;
const BYTES: usize = 1 << 20;

fn heaps(n: usize, bytes: usize) -> Vec<Arc<dyn ForeignMemory>> {
    let heap = |_| Heap::new(&vec![1; bytes], true).0 as Arc<dyn ForeignMemory>;
    (0..n).map(heap).collect()
}

fn register(manager: &BufferManager, memory: &Arc<dyn ForeignMemory>) -> RegistrationGuard {
    manager.register_external(Arc::clone(memory)).unwrap()
}

pub(crate) fn measure() {
    let manager = BufferManager::new(PeerId(0), ManagerConfig::default(), Vec::new()).unwrap();
    let heaps = heaps(KNOWN, 4096);
    let table: FxHashMap<Region, usize> = heaps
        .iter()
        .enumerate()
        .map(|(at, heap)| (heap.region(), at))
        .collect();
    for heap in &heaps {
        drop(register(&manager, heap));
    }
    let middle = &heaps[KNOWN / 2];
    for threads in [1, 4] {
        let lookup = nanoseconds(threads, || {
            black_box(table.get(&black_box(middle.region())));
        });
        let hit = nanoseconds(threads, || drop(black_box(register(&manager, middle))));
        println!(
            "registrations: {threads} threads: hash lookup {lookup:.0} ns, find and release one of {KNOWN} {hit:.0} ns"
        );
    }
    for kind in transports() {
        let config = ManagerConfig {
            // So that each one is given up when it is released.
            idle_registration_bytes_max: 0,
            ..ManagerConfig::default()
        };
        let manager = BufferManager::new(PeerId(0), config, vec![rig::open(kind).into()]).unwrap();
        let memory = &self::heaps(1, BYTES)[0];
        let miss = nanoseconds(1, || drop(black_box(register(&manager, memory))));
        println!("registrations: {kind}: register and deregister 1 MiB {miss:.0} ns");
    }
}
