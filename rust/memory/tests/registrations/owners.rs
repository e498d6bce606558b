//! Owners of memory, as a caller has them.

#![expect(unsafe_code, reason = "promises that memory stays")]

use std::{
    cell::UnsafeCell,
    sync::{Arc, Weak},
};

use orchestra_memory::{ForeignMemory, Region, Tier};

/// Addresses that nobody touches.
pub(crate) struct Nowhere(pub(crate) Region);

// SAFETY: the transport of these tests looks at no byte.
unsafe impl ForeignMemory for Nowhere {
    fn region(&self) -> Region {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }
}

/// Bytes on the heap.
pub(crate) struct Heap {
    bytes: Box<[UnsafeCell<u8>]>,
    is_writable: bool,
}

// SAFETY: bytes are reached through raw pointers, and by the test alone while no transfer runs.
unsafe impl Sync for Heap {}

// SAFETY: a box stays where it is until it is dropped.
unsafe impl ForeignMemory for Heap {
    fn region(&self) -> Region {
        Region {
            tier: Tier::Dram,
            address: self.bytes.as_ptr().expose_provenance() as u64,
            len: self.bytes.len() as u64,
        }
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }
}

impl Heap {
    pub(crate) fn new(bytes: &[u8], is_writable: bool) -> (Arc<Self>, Weak<Self>) {
        let bytes = bytes.iter().map(|byte| UnsafeCell::new(*byte)).collect();
        let heap = Arc::new(Self { bytes, is_writable });
        let weak = Arc::downgrade(&heap);
        (heap, weak)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        // SAFETY: no transfer runs while the test looks.
        self.bytes
            .iter()
            .map(|byte| unsafe { *byte.get() })
            .collect()
    }
}

/// Some bytes of memory that another owner keeps.
pub(crate) struct Part(pub(crate) Arc<Heap>, pub(crate) Region);

// SAFETY: the owner is kept, and the tests ask for parts of it alone.
unsafe impl ForeignMemory for Part {
    fn region(&self) -> Region {
        self.1
    }

    fn is_writable(&self) -> bool {
        self.0.is_writable()
    }
}
