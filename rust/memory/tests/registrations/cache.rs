//! What the cache refuses, and what a transfer without end keeps.

use std::{sync::Arc, time::Duration};

use orchestra_core::Time;
use orchestra_memory::{
    BufferManager, ForeignMemory as _, ManagerConfig, MemoryError, PeerId, Quiet, Region,
    RegistrationStats, RemoteGrant, Rights, Tier, TransferError, TransferOptions, Transport,
    lease::GrantId, lease::RemoteBlock,
};

use crate::{
    owners::{Heap, Nowhere, Part},
    recorder::Recorder,
};

const PEER: PeerId = PeerId(1);
const BLOCK_BYTES: u64 = 64;

fn manager() -> (BufferManager, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let transports: Vec<Arc<dyn Transport>> = vec![Arc::clone(&recorder) as _];
    let manager = BufferManager::new(PeerId(0), ManagerConfig::default(), transports).unwrap();
    manager.connect(PEER, "recorder", &[]).unwrap();
    (manager, recorder)
}

fn grant(rights: Rights) -> RemoteGrant {
    let block = |at: u64| RemoteBlock {
        slab: orchestra_memory::SlabId(0),
        offset: at * BLOCK_BYTES,
        generation: 0,
    };
    RemoteGrant {
        owner: PEER,
        id: GrantId(1),
        rights,
        block_bytes: BLOCK_BYTES,
        expires: Time(u64::MAX),
        blocks: (0..4).map(block).collect(),
    }
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let (manager, recorder) = manager();
    let regions = [(0x1000, 0), (u64::MAX, 2), (0x1000, (4 << 30) + 1)];
    for (address, len) in regions {
        let tier = Tier::Dram;
        let refused = manager.register_external(Arc::new(Nowhere(Region { tier, address, len })));
        assert!(
            matches!(refused, Err(MemoryError::InvalidField { field, .. }) if field == "memory")
        );
    }
    let tier = Tier::Vram { device: 3 };
    let (address, len) = (0x1000, 64);
    let refused = manager.register_external(Arc::new(Nowhere(Region { tier, address, len })));
    assert!(
        matches!(refused, Err(MemoryError::TierUnsupported { tier: named, .. }) if named == tier)
    );
    *recorder.is_broken.lock() = true;
    let (heap, weak) = Heap::new(&[0; 64], true);
    let refused = manager.register_external(heap).map(drop);
    assert!(matches!(refused, Err(MemoryError::UnknownSlab(_))));
    assert_eq!(weak.strong_count(), 0);
    assert_eq!(manager.stats().registrations, RegistrationStats::default());
}

#[test]
fn a_transfer_needs_whole_blocks_its_own_manager_and_memory_that_is_current() {
    let (manager, _recorder) = manager();
    let (other, _) = self::manager();
    let (write, read) = (grant(Rights::Write), grant(Rights::Read));
    let options = TransferOptions::default();
    let put = |guard: &_, blocks| {
        let put = manager.put_from(guard, blocks, &write, &options, Time(1));
        put.map(drop)
    };
    let odd = manager
        .register_external(Heap::new(&[0; 65], true).0)
        .unwrap();
    assert!(
        matches!(put(&odd, 0..1), Err(MemoryError::InvalidField { field, .. }) if field == "memory")
    );
    let foreign = other
        .register_external(Heap::new(&[0; 64], true).0)
        .unwrap();
    assert_eq!(put(&foreign, 0..1), Err(MemoryError::ForeignHandle));
    let two = manager
        .register_external(Heap::new(&[0; 128], false).0)
        .unwrap();
    let (offset, len, limit) = (1, 2, 2);
    let outside = Err(MemoryError::OutOfBounds { offset, len, limit });
    assert_eq!(put(&two, 1..3), outside);
    assert!(matches!(
        put(&two, 1..1),
        Err(MemoryError::OutOfBounds { .. })
    ));
    let get = manager.get_into(&read, &two, 0..2, &options, Time(1));
    assert!(matches!(get, Err(MemoryError::InvalidField { field, .. }) if field == "memory"));
    assert_eq!(manager.invalidate(two.region()), 1);
    assert_eq!(put(&two, 0..2), Err(MemoryError::StaleHandle));
    assert_eq!(manager.stats().active_transfers, 0);
}

#[test]
fn memory_of_a_transfer_that_was_given_up_stays_until_it_is_proven_to_be_over() {
    let (manager, recorder) = manager();
    let (heap, weak) = Heap::new(&[7; 128], true);
    let guard = manager.register_external(heap).unwrap();
    let (read, options) = (grant(Rights::Read), TransferOptions::default());
    let get = manager
        .get_into(&read, &guard, 0..2, &options, Time(1))
        .unwrap();
    get.abort();
    manager.progress(Time(2), Duration::ZERO);
    let quarantined = 2;
    assert_eq!(
        get.result(),
        Some(Err(TransferError::Timeout { quarantined }))
    );
    let region = guard.region();
    drop(guard);
    assert_eq!(manager.invalidate(region), 1);
    let stats = manager.stats();
    assert_eq!((stats.quarantined_blocks, stats.registrations.held), (2, 1));
    assert_eq!(recorder.regions(), [region]);
    assert_eq!(weak.strong_count(), 1, "late bytes may still land in it");
    assert_eq!(manager.disconnect(PEER, Time(3)), Ok(Quiet::Unproven));
    manager.confirm_gone(PEER, Time(3)).unwrap();
    assert_eq!(weak.strong_count(), 0);
    assert!(recorder.regions().is_empty());
    assert_eq!(manager.stats().quarantined_blocks, 0);
}

#[test]
fn threads_that_ask_for_the_same_memory_leave_nothing_behind() {
    let (manager, recorder) = manager();
    let (heap, weak) = Heap::new(&[0; 4096], true);
    let whole = heap.region();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (manager, heap) = (&manager, &heap);
            scope.spawn(move || {
                for round in 0..300 {
                    let (at, len) = (64 * ((thread + round) % 8), 64 * (1 + round % 4));
                    let part = Region {
                        address: whole.address + at,
                        len,
                        ..whole
                    };
                    let memory = Part(Arc::clone(heap), part);
                    let guard = manager.register_external(Arc::new(memory)).unwrap();
                    assert_eq!(guard.region(), part);
                    if round % 50 == 0 {
                        manager.invalidate(part);
                    }
                }
            });
        }
    });
    manager.invalidate(whole);
    let stats = manager.stats().registrations;
    assert_eq!((stats.count, stats.held, stats.bytes), (0, 0, 0));
    assert!(recorder.regions().is_empty());
    drop(heap);
    assert_eq!(weak.strong_count(), 0);
}
