//! Why a collective, the making of a group, a message, or a kernel's call failed.

use orchestra_core::ErrorCode;
use thiserror::Error;

/// What can go wrong between the ranks of a group. After any of these from a collective the group is finished.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GroupError {
    /// A rank's process has ended.
    #[error("rank {0} is gone")]
    RankLost(usize),
    /// A rank did not come to a collective in time; it may hang.
    #[error("rank {rank} did not come within {timeout_ms} ms")]
    RankLate {
        /// Which.
        rank: usize,
        /// How long it was waited for.
        timeout_ms: u64,
    },
    /// Somebody called `abort`.
    #[error("the group was aborted")]
    Aborted,
    /// A rank came to another collective, or with a tensor of another size.
    #[error("rank {0} is in another collective")]
    Mismatch(usize),
    /// A setting of the group is wrong.
    #[error("{key}: {reason}")]
    InvalidConfig {
        /// Which.
        key: &'static str,
        /// What is wrong with it, with the limit.
        reason: String,
    },
    /// An argument of a collective is wrong; nothing was sent.
    #[error("{field}: {reason}")]
    InvalidArgument {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The group's memory cannot be had.
    #[error(transparent)]
    Memory(#[from] SharedMemoryError),
}

impl GroupError {
    /// The code that clients of the library see.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidConfig { .. } => ErrorCode::InvalidConfig,
            Self::InvalidArgument { .. } => ErrorCode::InvalidRequest,
            Self::RankLost(_)
            | Self::RankLate { .. }
            | Self::Aborted
            | Self::Mismatch(_)
            | Self::Memory(_) => ErrorCode::Internal,
        }
    }

    /// The setting or argument at fault, where one is.
    pub const fn key(&self) -> Option<&'static str> {
        match self {
            Self::InvalidConfig { key, .. } => Some(key),
            Self::InvalidArgument { field, .. } => Some(field),
            _ => None,
        }
    }
}

/// Memory that processes share cannot be made or opened.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SharedMemoryError {
    /// What was found at the address is something else.
    #[error("the shared memory cannot be used: {0}")]
    Unusable(&'static str),
    /// The operating system refused.
    #[error("{action}: {}", std::io::Error::from_raw_os_error(*.code))]
    Os {
        /// What was tried.
        action: &'static str,
        /// `errno`.
        code: i32,
    },
}

impl SharedMemoryError {
    pub(crate) const fn os(action: &'static str, errno: rustix::io::Errno) -> Self {
        Self::Os {
            action,
            code: errno.raw_os_error(),
        }
    }
}

/// Messages cannot go through a ring.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// A setting of the ring is wrong.
    #[error("{key}: {reason}")]
    InvalidConfig {
        /// Which.
        key: &'static str,
        /// What is wrong with it, with the limit.
        reason: String,
    },
    /// A position or a length in the ring cannot be: somebody has written over it.
    #[error("the ring is damaged: {0}")]
    Damaged(String),
    /// A message is longer than any may be; nothing was written.
    #[error("a message of {bytes} bytes, at most {most} go")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        most: usize,
    },
    /// The ring's memory cannot be had.
    #[error(transparent)]
    Memory(#[from] SharedMemoryError),
}

impl RingError {
    /// The code that clients of the library see.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidConfig { .. } => ErrorCode::InvalidConfig,
            Self::TooLong { .. } => ErrorCode::InvalidRequest,
            Self::Damaged(_) | Self::Memory(_) => ErrorCode::Internal,
        }
    }

    /// The setting or argument at fault, where one is.
    pub const fn key(&self) -> Option<&'static str> {
        match self {
            Self::InvalidConfig { key, .. } => Some(key),
            Self::TooLong { .. } => Some("message"),
            Self::Damaged(_) | Self::Memory(_) => None,
        }
    }
}

/// A setting of attention, or an array of a step, is wrong; nothing was computed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field} {reason}")]
pub struct AttentionError {
    /// Which.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl AttentionError {
    pub(crate) fn wrong(field: &'static str, reason: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
        }
    }
}

/// A linear layer cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LinearError {
    /// A size is out of range.
    #[error("{field} {reason}")]
    InvalidShape {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no room for the weights.
    #[error("no memory for {bytes} bytes of weights: {}", std::io::Error::from_raw_os_error(*.code))]
    NoMemory {
        /// How much was asked for.
        bytes: usize,
        /// `errno`.
        code: i32,
    },
}
