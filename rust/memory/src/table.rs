//! What one slot of a pool is, in one word that changes by compare-and-swap.
//!
//! ```text
//!            take              seal             begin_move
//!   Free ──────────▶ Writing ────────▶ Sealed ◀───────────▶ Migrating     a pin that comes first ends the move
//!    ▲ ▲                 │ retire         │ retire                │ commit_move, retire
//!    │ └─ nobody holds ──┴────────────────┴───────────────────────┤
//!    └─── the last hold ends ─── Limbo, Quarantined ◀─ somebody ──┘
//!   Free ──reserve──▶ Reserved ──publish──▶ Sealed                        the target of a move
//! ```
//!
//! *Holds* are pins (somebody here reads or writes the bytes, or a transfer may) and leases (a peer may). A slot
//! that was retired while held waits: in `Limbo` where the end of the hold is certain, in `Quarantined` where it
//! needs proof. Whoever ends the last hold gives the slot back. Nobody can hold a retired slot anew, because
//! retiring raises the generation and every hold names one.

use crate::{
    error::MemoryError,
    sync::{AtomicU64, Ordering},
};

/// What a slot is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockState {
    /// In the index of free runs.
    Free = 0,
    /// Taken by the pool itself as the target of a move; no handle names it.
    Reserved,
    /// Its owner fills it. Nobody reads it.
    Writing,
    /// Complete and never written again: may be read here and by peers.
    Sealed,
    /// Still readable, while its bytes are copied elsewhere.
    Migrating,
    /// Retired; a reader with a known end still holds it.
    Limbo,
    /// Retired; bytes may still land in it or leave it until the opposite is proven.
    Quarantined,
}

impl BlockState {
    /// Every state, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Free,
        Self::Reserved,
        Self::Writing,
        Self::Sealed,
        Self::Migrating,
        Self::Limbo,
        Self::Quarantined,
    ];

    /// Its name in errors and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Reserved => "reserved",
            Self::Writing => "writing",
            Self::Sealed => "sealed",
            Self::Migrating => "migrating",
            Self::Limbo => "limbo",
            Self::Quarantined => "quarantined",
        }
    }

    const fn is_retired(self) -> bool {
        matches!(self, Self::Limbo | Self::Quarantined)
    }

    /// Whether a handle can name a slot in this state.
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Writing | Self::Sealed | Self::Migrating)
    }
}

// state: 4 bits │ leases: 12 bits │ pins: 16 bits │ generation: 32 bits
const STATE_MASK: u64 = 0xF;
const LEASE: u64 = 1 << 4;
const LEASES_MAX: u64 = (1 << 12) - 1;
const PIN: u64 = 1 << 16;
const PINS_MAX: u64 = (1 << 16) - 1;
const GENERATION: u64 = 1 << 32;

/// A slot's word as it was at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWord(u64);

impl SlotWord {
    /// What the slot is used for.
    pub const fn state(self) -> BlockState {
        BlockState::ALL[(self.0 & STATE_MASK) as usize]
    }

    /// Times the slot was retired or moved away from. It wraps after 2^32: a handle would have to be kept while
    /// its slot is used that often.
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Local readers, writers and transfers.
    pub const fn pins(self) -> u64 {
        (self.0 / PIN) & PINS_MAX
    }

    /// Peers that may read or write it, and epochs that may still name it.
    pub const fn leases(self) -> u64 {
        (self.0 / LEASE) & LEASES_MAX
    }

    /// Whether anybody reads or writes it, or may.
    pub const fn is_held(self) -> bool {
        self.pins() + self.leases() > 0
    }

    const fn with_state(self, state: BlockState) -> Self {
        Self((self.0 & !STATE_MASK) | state as u64)
    }

    const fn next_generation(self) -> Self {
        Self(self.0.wrapping_add(GENERATION))
    }

    /// The word if its handle has not gone stale and the state is one of `allowed`.
    fn named(
        self,
        generation: u32,
        allowed: &[BlockState],
        expected: &'static str,
    ) -> Result<Self, MemoryError> {
        let state = self.state();
        if self.generation() != generation || !state.is_live() {
            return Err(MemoryError::StaleHandle);
        }
        if allowed.contains(&state) {
            return Ok(self);
        }
        let actual = state.as_str();
        Err(MemoryError::WrongState { actual, expected })
    }

    fn with_pin(self) -> Result<Self, MemoryError> {
        let limit = PINS_MAX as usize;
        let what = "pins";
        if self.pins() == PINS_MAX {
            return Err(MemoryError::LimitReached { what, limit });
        }
        Ok(Self(self.0 + PIN))
    }

    fn with_lease(self) -> Result<Self, MemoryError> {
        let limit = LEASES_MAX as usize;
        let what = "leases";
        if self.leases() == LEASES_MAX {
            return Err(MemoryError::LimitReached { what, limit });
        }
        Ok(Self(self.0 + LEASE))
    }
}

/// What the end of a hold means for the slot.
#[must_use = "a slot that nobody holds any more has to be given back"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterHold {
    /// It has an owner, or other holds.
    InUse,
    /// It was retired and this was the last hold: give it back.
    GiveBack,
}

/// What retiring a block did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retired {
    /// The slot is free.
    Free,
    /// Somebody holds it; it is given back when the last hold ends.
    Held,
}

const WRITING: &[BlockState] = &[BlockState::Writing];
const SEALED: &[BlockState] = &[BlockState::Sealed];
const READABLE: &[BlockState] = &[BlockState::Sealed, BlockState::Migrating];
const LIVE: &[BlockState] = &[
    BlockState::Writing,
    BlockState::Sealed,
    BlockState::Migrating,
];

/// One slot of a pool.
#[derive(Debug)]
pub struct Slot(AtomicU64);

impl Default for Slot {
    fn default() -> Self {
        Self(AtomicU64::new(BlockState::Free as u64))
    }
}

impl Slot {
    /// The word now.
    pub fn load(&self) -> SlotWord {
        SlotWord(self.0.load(Ordering::Acquire))
    }

    /// Replaces the word by what `change` makes of it, or leaves it where `change` refuses. Both orders are needed:
    /// a hold that ends publishes its reads to whoever gives the slot back, a seal its bytes to whoever reads.
    fn change(
        &self,
        change: impl Fn(SlotWord) -> Result<SlotWord, MemoryError>,
    ) -> Result<SlotWord, MemoryError> {
        let mut seen = self.load();
        loop {
            let next = change(seen)?;
            let swapped =
                self.0
                    .compare_exchange_weak(seen.0, next.0, Ordering::AcqRel, Ordering::Acquire);
            match swapped {
                Ok(_) => return Ok(next),
                Err(actual) => seen = SlotWord(actual),
            }
        }
    }

    /// The pool's own step from one exact state to another; `false` where the slot is not in it.
    fn step(&self, from: BlockState, to: BlockState) -> bool {
        let changed = self.change(|word| {
            if word.state() == from && !word.is_held() {
                Ok(word.with_state(to))
            } else {
                Err(MemoryError::StaleHandle)
            }
        });
        changed.is_ok()
    }

    /// Free → Writing. The caller took the slot out of the index of free runs, so nobody else can.
    pub fn take(&self) -> u32 {
        let was_free = self.step(BlockState::Free, BlockState::Writing);
        debug_assert!(was_free, "the index of free runs names free slots only");
        self.load().generation()
    }

    /// Free → Reserved, as [`Self::take`].
    pub fn reserve(&self) {
        let was_free = self.step(BlockState::Free, BlockState::Reserved);
        debug_assert!(was_free, "the index of free runs names free slots only");
    }

    /// Reserved → Sealed: the bytes have been copied here. Returns the generation to name it by.
    pub fn publish(&self) -> u32 {
        let was_reserved = self.step(BlockState::Reserved, BlockState::Sealed);
        debug_assert!(was_reserved, "only its mover knows a reserved slot");
        self.load().generation()
    }

    /// Reserved → Free: the move did not happen.
    pub fn unreserve(&self) {
        let was_reserved = self.step(BlockState::Reserved, BlockState::Free);
        debug_assert!(was_reserved, "only its mover knows a reserved slot");
    }

    /// Writing → Sealed, once nothing can write it any more.
    pub fn seal(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, WRITING, BlockState::Writing.as_str())?;
            if word.is_held() {
                return Err(MemoryError::InUse);
            }
            Ok(word.with_state(BlockState::Sealed))
        })
        .map(drop)
    }

    /// Holds a sealed block for reading. Ends a move that has not been committed: readers never wait for one.
    pub fn pin(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, READABLE, BlockState::Sealed.as_str())?;
            word.with_state(BlockState::Sealed).with_pin()
        })
        .map(drop)
    }

    /// Holds a block that is being filled, alone.
    pub fn pin_for_write(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, WRITING, BlockState::Writing.as_str())?;
            if word.is_held() {
                return Err(MemoryError::InUse);
            }
            word.with_pin()
        })
        .map(drop)
    }

    /// Lets a peer read a sealed block. Ends a move, as [`Self::pin`] does.
    pub fn lease(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, READABLE, BlockState::Sealed.as_str())?;
            word.with_state(BlockState::Sealed).with_lease()
        })
        .map(drop)
    }

    /// Lets a peer fill a block, alone.
    pub fn lease_for_write(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, WRITING, BlockState::Writing.as_str())?;
            if word.is_held() {
                return Err(MemoryError::InUse);
            }
            word.with_lease()
        })
        .map(drop)
    }

    /// Ends a pin. Needs no generation: the block may have been retired since.
    pub fn unpin(&self) -> AfterHold {
        self.end_hold(PIN, SlotWord::pins)
    }

    /// Ends a lease, as [`Self::unpin`].
    pub fn unlease(&self) -> AfterHold {
        self.end_hold(LEASE, SlotWord::leases)
    }

    fn end_hold(&self, one: u64, count: impl Fn(SlotWord) -> u64) -> AfterHold {
        let ended = self.change(|word| {
            debug_assert!(count(word) > 0, "a hold ends once");
            if count(word) == 0 {
                return Err(MemoryError::StaleHandle);
            }
            Ok(SlotWord(word.0 - one))
        });
        match ended {
            Ok(word) if word.state().is_retired() && !word.is_held() => AfterHold::GiveBack,
            _ => AfterHold::InUse,
        }
    }

    /// Gives the block a new life without taking it from its owner, who fills it anew: its handles go stale.
    pub fn renew(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, LIVE, "live")?;
            if word.is_held() {
                return Err(MemoryError::InUse);
            }
            Ok(word.with_state(BlockState::Writing).next_generation())
        })
        .map(drop)
    }

    /// Takes the block from its owner: its handles go stale.
    pub fn retire(&self, generation: u32) -> Result<Retired, MemoryError> {
        let word = self.change(|word| {
            let word = word.named(generation, LIVE, "live")?;
            let state = if word.is_held() {
                BlockState::Limbo
            } else {
                BlockState::Free
            };
            Ok(word.with_state(state).next_generation())
        })?;
        Ok(match word.state() {
            BlockState::Free => Retired::Free,
            _ => Retired::Held,
        })
    }

    /// Notes that a retired slot waits for proof. `true` where it did not already.
    pub fn quarantine(&self) -> bool {
        let changed = self.change(|word| {
            if word.state() == BlockState::Limbo && word.is_held() {
                Ok(word.with_state(BlockState::Quarantined))
            } else {
                Err(MemoryError::StaleHandle)
            }
        });
        changed.is_ok()
    }

    /// Limbo or Quarantined → Free, by the one who ended the last hold. Returns what it was.
    pub fn give_back(&self) -> BlockState {
        let was = self.load().state();
        let changed = self.step(was, BlockState::Free);
        debug_assert!(
            was.is_retired() && changed,
            "a slot comes back once, when nobody holds it"
        );
        was
    }

    // === moves ===

    /// Sealed → Migrating, where nobody holds it.
    pub fn begin_move(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let word = word.named(generation, SEALED, BlockState::Sealed.as_str())?;
            if word.is_held() {
                return Err(MemoryError::InUse);
            }
            Ok(word.with_state(BlockState::Migrating))
        })
        .map(drop)
    }

    /// Migrating → Limbo with one lease, which is the epoch's. Fails where a pin, a lease or an owner came first.
    pub fn commit_move(&self, generation: u32) -> Result<(), MemoryError> {
        self.change(|word| {
            let state = BlockState::Migrating;
            let word = word.named(generation, &[state], state.as_str())?;
            debug_assert!(!word.is_held(), "holding a block ends its move");
            word.with_state(BlockState::Limbo)
                .next_generation()
                .with_lease()
        })
        .map(drop)
    }

    /// Migrating → Sealed, where the move has not been ended by somebody else.
    pub fn cancel_move(&self, generation: u32) {
        let cancelled = self.change(|word| {
            let state = BlockState::Migrating;
            let word = word.named(generation, &[state], state.as_str())?;
            Ok(word.with_state(BlockState::Sealed))
        });
        // A pin or its owner came first: then there is nothing to undo.
        drop(cancelled);
    }
}
