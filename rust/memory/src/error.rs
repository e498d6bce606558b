//! Why memory could not be had, used or moved. An error changes nothing.

use orchestra_core::ErrorCode;

use crate::tier::Tier;

/// Why the manager or a transport refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A setting or an argument is out of range.
    #[error("{field} must be {expected}")]
    InvalidField {
        /// The field.
        field: &'static str,
        /// Its range in words.
        expected: &'static str,
    },
    /// Not enough free blocks. Nothing was taken.
    #[error(
        "{requested} blocks were asked for, {free} are free (largest run {largest_run}, \
         {quarantined} quarantined)"
    )]
    Exhausted {
        /// Blocks asked for.
        requested: usize,
        /// Blocks that are free, whatever their place.
        free: usize,
        /// The longest run of neighbours among them.
        largest_run: usize,
        /// Blocks that wait for proof that no write reaches them any more.
        quarantined: usize,
    },
    /// The block that the handle named has been freed, moved or invalidated since.
    #[error("the handle is stale: its block was freed, moved or invalidated")]
    StaleHandle,
    /// The handle belongs to another pool or to none.
    #[error("the handle does not belong to this pool")]
    ForeignHandle,
    /// The block is not in a state that allows the call.
    #[error("the block is {actual}, the call needs it {expected}")]
    WrongState {
        /// The state it is in.
        actual: &'static str,
        /// The states that would do, in words.
        expected: &'static str,
    },
    /// The block is pinned, granted or part of a transfer.
    #[error("the block is in use")]
    InUse,
    /// As many pins, grants, transfers, slabs or peers as there may be.
    #[error("there are {limit} {what} already, which is the limit")]
    LimitReached {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A range does not lie inside its memory.
    #[error("{len} bytes at {offset} do not fit in {limit}")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Size of the memory.
        limit: u64,
    },
    /// The slab is not registered here.
    #[error("slab {0} is not registered")]
    UnknownSlab(u32),
    /// The peer is not connected.
    #[error("the peer is not connected")]
    UnknownPeer,
    /// A peer of this name is, or was, connected: names are not used twice.
    #[error("a peer of this id was connected before")]
    DuplicatePeer,
    /// The lease has ended or was revoked, or never existed.
    #[error("the grant has ended")]
    GrantEnded,
    /// The process may not lock as much memory as registration needs.
    #[error("locking {need} bytes needs a higher memlock limit than {have} bytes")]
    MemlockTooLow {
        /// Bytes to lock in all.
        need: u64,
        /// The limit of the process.
        have: u64,
    },
    /// What a peer sent as its metadata cannot be read.
    #[error("the peer's metadata is malformed: {0}")]
    BadMetadata(&'static str),
    /// The library of a transport is missing, too old or a stub.
    #[error("transport {transport} is not available: {reason}")]
    Unavailable {
        /// The transport.
        transport: &'static str,
        /// What was tried and found.
        reason: String,
    },
    /// The driver of a tier's memory is missing or too old, or there is no such device.
    #[error("{tier} memory is not available: {reason}")]
    TierUnavailable {
        /// The tier.
        tier: Tier,
        /// What was tried and found.
        reason: String,
    },
    /// A transport cannot reach memory of this tier.
    #[error("transport {transport} cannot reach {tier} memory: {reason}")]
    TierUnsupported {
        /// The transport.
        transport: &'static str,
        /// The tier.
        tier: Tier,
        /// Why it cannot.
        reason: &'static str,
    },
    /// The bytes lie where the processor cannot reach them.
    #[error("the bytes lie on device {device}, where the processor cannot reach them")]
    NotInHostMemory {
        /// The device.
        device: u32,
    },
    /// A device has not as much memory left.
    #[error("device {device} has no {need} bytes of memory left")]
    DeviceExhausted {
        /// The device.
        device: u32,
        /// Bytes that were asked for.
        need: u64,
    },
    /// A device or its driver refused.
    #[error("device {device}: {action}: {name} ({code})")]
    Device {
        /// The device.
        device: u32,
        /// What was tried.
        action: &'static str,
        /// The driver's name for its code.
        name: String,
        /// The driver's code.
        code: i32,
    },
    /// The operating system refused.
    #[error("{action}: {}", std::io::Error::from_raw_os_error(*.code))]
    Os {
        /// What was tried.
        action: &'static str,
        /// `errno`.
        code: i32,
    },
    /// A transport refused, in its own words.
    #[error("transport {transport} failed with {code}: {message}")]
    Transport {
        /// The transport.
        transport: &'static str,
        /// Its code.
        code: i32,
        /// Its words; never bytes of a block.
        message: String,
    },
}

impl MemoryError {
    /// The refusal of a system call.
    pub const fn os(action: &'static str, errno: rustix::io::Errno) -> Self {
        Self::Os {
            action,
            code: errno.raw_os_error(),
        }
    }

    /// The code by which clients and callers of other languages know it.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Exhausted { .. } | Self::LimitReached { .. } | Self::DeviceExhausted { .. } => {
                ErrorCode::QueueFull
            }
            Self::InvalidField { .. }
            | Self::StaleHandle
            | Self::ForeignHandle
            | Self::WrongState { .. }
            | Self::InUse
            | Self::OutOfBounds { .. }
            | Self::UnknownSlab(_)
            | Self::UnknownPeer
            | Self::DuplicatePeer
            | Self::GrantEnded
            | Self::NotInHostMemory { .. }
            | Self::BadMetadata(_) => ErrorCode::InvalidRequest,
            Self::MemlockTooLow { .. } => ErrorCode::InvalidConfig,
            Self::Unavailable { .. }
            | Self::TierUnavailable { .. }
            | Self::TierUnsupported { .. } => ErrorCode::Unsupported,
            Self::Os { .. } | Self::Transport { .. } | Self::Device { .. } => ErrorCode::Internal,
        }
    }
}

/// How a transfer failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The peer died or closed the connection.
    #[error("the peer is gone")]
    PeerGone,
    /// The deadline passed, or the caller gave up, before the transfer was known to be over.
    #[error("the transfer did not end in time; {quarantined} blocks are quarantined")]
    Timeout {
        /// Local blocks that cannot be used again until the transfer is known to be quiet.
        quarantined: usize,
    },
    /// A block at either end is not what the handle or the grant named.
    #[error("a block was freed, moved or invalidated before the transfer")]
    StaleHandle,
    /// The grant does not allow it, or has ended.
    #[error("the grant does not allow this transfer")]
    Denied,
    /// A segment does not lie inside a registered slab, or straddles two.
    #[error("a segment does not lie inside one registered slab")]
    OutOfBounds,
    /// The transport failed, in its own words.
    #[error("the transport failed with {code}: {message}")]
    Transport {
        /// Its code.
        code: i32,
        /// Its words; never bytes of a block.
        message: String,
    },
}

impl TransferError {
    /// The code by which clients and callers of other languages know it.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::PeerGone | Self::Transport { .. } => ErrorCode::WorkerFailed,
            Self::Timeout { .. } => ErrorCode::DeadlineExceeded,
            Self::StaleHandle | Self::Denied | Self::OutOfBounds => ErrorCode::InvalidRequest,
        }
    }
}

/// An error with what lies beneath it, which many libraries leave out of their own words.
pub(crate) fn in_full(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(
        || error.to_string(),
        |cause| format!("{error}: {}", in_full(cause)),
    )
}
