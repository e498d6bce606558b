//! What moves bytes between the slabs of two processes, as the manager sees it.
//!
//! A transport moves, and reports what it knows. It is never asked to make a transfer safe: whether memory may
//! be used again is decided above, from the [`Quiet`] that it can or cannot prove.

mod ledger;
mod metadata;
pub mod nixl;
pub mod shm;
mod spans;
pub mod tcp;
mod watch;

use std::{os::fd::BorrowedFd, sync::Arc, time::Duration};

use crate::{
    error::{MemoryError, TransferError},
    slab::{SLAB_BYTES_MAX, Slab},
    tier::Tier,
};

/// A slab of this process; also the name by which its peers call it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabId(pub u32);

/// One life of another process. Chosen by the caller (worker id and epoch) and never used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

/// A posted transfer, unique within its transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub u64);

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Writes into the peer's slab.
    Put,
    /// Reads from the peer's slab.
    Get,
}

/// `len` bytes between an offset of a local slab and one of a peer's slab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Segment {
    /// The slab on this side.
    pub local_slab: SlabId,
    /// First byte in it.
    pub local_offset: u64,
    /// The slab on the peer's side.
    pub remote_slab: SlabId,
    /// First byte in it.
    pub remote_offset: u64,
    /// Bytes; at least one.
    pub len: u64,
}

/// Where a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Bytes may still move.
    Pending,
    /// All bytes are where they belong.
    Done,
    /// No more bytes move, and some may not have.
    Failed(TransferError),
}

/// Whether it is known that nothing touches the memory of a transfer or a connection any more.
#[must_use = "memory that is not proven quiet must not be used again"]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quiet {
    /// Nothing reads or writes it any more.
    Proven,
    /// The transport cannot tell: late bytes may still land.
    Unproven,
}

/// A few bytes that a peer sent along with a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Who sent it.
    pub peer: PeerId,
    /// What it sent.
    pub payload: Vec<u8>,
}

/// Moves bytes between registered slabs of two processes.
pub trait Transport: Send + Sync {
    /// Its name in settings, errors and metrics.
    fn name(&self) -> &'static str;

    /// Whether a peer's processor stays idle while its memory is read or written.
    fn is_one_sided(&self) -> bool;

    /// Makes a slab known to peers that connect from now on. Once per slab, never per request.
    fn register(&self, slab: &Arc<Slab>) -> Result<(), MemoryError>;

    /// Forgets a slab. Does not revoke: a peer's late write may still land in it.
    fn deregister(&self, slab: SlabId) -> Result<(), MemoryError>;

    /// What a peer needs to connect, opaque and at most 64 KiB; names the slabs registered so far.
    fn local_metadata(&self) -> Result<Vec<u8>, MemoryError>;

    /// Connects to the process that gave out `metadata`.
    fn connect(&self, peer: PeerId, metadata: &[u8]) -> Result<(), MemoryError>;

    /// Ends a connection. [`Quiet::Proven`] where nothing of ours touches the peer's memory any more, nor it ours
    /// through this connection.
    fn disconnect(&self, peer: PeerId) -> Result<Quiet, MemoryError>;

    /// Starts a transfer. All segments must lie inside registered slabs, which is checked before anything moves.
    /// The notification reaches the peer after the bytes.
    fn post(
        &self,
        direction: Direction,
        peer: PeerId,
        segments: &[Segment],
        notification: Option<&[u8]>,
    ) -> Result<TransferId, TransferError>;

    /// Where a transfer stands.
    fn poll(&self, transfer: TransferId) -> Progress;

    /// Forgets a transfer, and says whether it is known to be quiet. Releasing is not cancelling.
    fn release(&self, transfer: TransferId) -> Quiet;

    /// Does work for at most about `budget`; returns how many things moved. Called by the manager's own progress
    /// loop: no thread of a transport may spin.
    fn progress(&self, budget: Duration) -> usize;

    /// The largest slab that it should be given. Registering with a card sets the default.
    fn slab_bytes_max(&self) -> u64 {
        SLAB_BYTES_MAX
    }

    /// Refuses a kind of memory that it cannot reach.
    fn check_tier(&self, tier: Tier) -> Result<(), MemoryError> {
        host_memory_only(self.name(), tier, "it moves bytes with the processor")
    }

    /// Readable when [`progress`](Self::progress) has something to do that came from outside, for the caller's loop
    /// to sleep on; none where the transport cannot tell. Work of this side's own is not counted: after a
    /// [`post`](Self::post), call [`progress`](Self::progress) until it moves nothing.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The next notification that has arrived.
    fn take_notification(&self) -> Option<Notification>;
}

/// Refuses the memory of devices, with the reason of a transport that cannot reach it.
const fn host_memory_only(
    transport: &'static str,
    tier: Tier,
    reason: &'static str,
) -> Result<(), MemoryError> {
    if tier.is_host() {
        return Ok(());
    }
    Err(MemoryError::TierUnsupported {
        transport,
        tier,
        reason,
    })
}
