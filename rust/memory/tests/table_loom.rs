//! The interleavings of a reader, a mover and an owner on one slot, with loom's atomics under the real module.
//! The bytes of a block are an atomic with no order of its own: only the slot's word orders them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(
    dead_code,
    unreachable_pub,
    reason = "the module's own users are elsewhere"
)]
#[path = "../src/error.rs"]
mod error;
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the module's own users are elsewhere"
)]
#[path = "../src/table.rs"]
mod table;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the module's own users are elsewhere"
)]
#[path = "../src/tier.rs"]
mod tier;

use loom::{sync::Arc, thread};
use sync::{AtomicU64, Ordering};
use table::{AfterHold, Retired, Slot};

const FIRST: u64 = 7;
const SECOND: u64 = 99;

/// Two slots with their bytes. The first holds a sealed block, the second is free.
#[derive(Default)]
struct Blocks {
    words: [Slot; 2],
    bytes: [AtomicU64; 2],
}

impl Blocks {
    fn new() -> Arc<Self> {
        let blocks = Self::default();
        blocks.words[0].take();
        blocks.bytes[0].store(FIRST, Ordering::Relaxed);
        blocks.words[0].seal(0).unwrap();
        Arc::new(blocks)
    }

    fn read(&self, slot: usize) -> u64 {
        self.bytes[slot].load(Ordering::Relaxed)
    }

    /// What the next owner does with a slot as soon as it may. Fails where two of them get it.
    fn reuse(&self, slot: usize) {
        assert_eq!(self.words[slot].take(), 1);
        self.bytes[slot].store(SECOND, Ordering::Relaxed);
    }

    fn after(&self, hold: AfterHold) {
        if hold == AfterHold::GiveBack {
            self.words[0].give_back();
            self.reuse(0);
        }
    }

    /// Copies the first block to the second slot. Whether it lies there now.
    fn move_first(&self) -> bool {
        if self.words[0].begin_move(0).is_err() {
            return false;
        }
        self.words[1].reserve();
        self.bytes[1].store(self.read(0), Ordering::Relaxed);
        if self.words[0].commit_move(0).is_err() {
            self.words[1].unreserve();
            return false;
        }
        self.words[1].publish();
        // Nobody keeps the old number: the epoch ends at once.
        self.after(self.words[0].unlease());
        true
    }

    /// Reads the block where the handle says, or where it lies now if that is known already.
    fn read_pinned(&self) {
        if self.words[0].pin(0).is_ok() {
            assert_eq!(self.read(0), FIRST, "a pinned block was used again");
            self.after(self.words[0].unpin());
        } else if self.words[1].pin(0).is_ok() {
            assert_eq!(self.read(1), FIRST, "a copy was published before its bytes");
            assert_eq!(self.words[1].unpin(), AfterHold::InUse);
        }
    }
}

/// All interleavings with at most three preemptions, which is where bugs of this kind show: without the bound, it takes too long for every run.
fn model(check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

#[test]
fn a_pin_and_a_move_never_both_win() {
    model(|| {
        let blocks = Blocks::new();
        let reader = Arc::clone(&blocks);
        let reader = thread::spawn(move || reader.read_pinned());
        let has_moved = blocks.move_first();
        reader.join().unwrap();
        // Moved: the old slot has its next owner. Not moved: the block is where it was, and the target is free.
        let expected = if has_moved {
            (SECOND, FIRST)
        } else {
            (FIRST, 0)
        };
        let found = (blocks.read(0), if has_moved { blocks.read(1) } else { 0 });
        assert_eq!(found, expected);
        assert_eq!(blocks.words[0].pin(0).is_ok(), !has_moved);
    });
}

#[test]
fn a_freed_block_is_used_again_once_and_after_its_reader() {
    model(|| {
        let blocks = Blocks::new();
        let reader = Arc::clone(&blocks);
        let reader = thread::spawn(move || reader.read_pinned());
        if blocks.words[0].retire(0).unwrap() == Retired::Free {
            blocks.reuse(0);
        }
        reader.join().unwrap();
        assert_eq!(blocks.read(0), SECOND);
        assert_eq!(blocks.words[0].load().generation(), 1);
    });
}

#[test]
fn an_owner_that_frees_ends_a_move() {
    model(|| {
        let blocks = Blocks::new();
        let mover = Arc::clone(&blocks);
        let mover = thread::spawn(move || mover.move_first());
        let freed = blocks.words[0].retire(0);
        let has_moved = mover.join().unwrap();
        assert_ne!(
            freed.is_ok(),
            has_moved,
            "the handle names the block or its copy"
        );
    });
}
