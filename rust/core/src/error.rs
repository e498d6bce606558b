//! The closed set of ways a request can fail, and the reasons for refusing one.
//!
//! Each code has one row in the HTTP table, one in the gRPC table and one Python exception; the three places
//! match without a wildcard, so that a new code does not compile until all of them know it.

use std::fmt;

/// Why something failed, in the words of `docs/errors.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The request is malformed or a value is out of range.
    InvalidRequest,
    /// Prompt and output do not fit in the model's context.
    ContextTooLong,
    /// Credentials are missing or wrong.
    Unauthenticated,
    /// No such model is served here.
    ModelNotFound,
    /// A queue is full; the same request may succeed later.
    QueueFull,
    /// The time given for the request has passed.
    DeadlineExceeded,
    /// No worker could take the request.
    NoWorkers,
    /// The worker failed and no other could continue.
    WorkerFailed,
    /// The request lost its place to one of higher priority.
    PreemptedOut,
    /// The caller went away.
    Cancelled,
    /// The service is stopping.
    ShuttingDown,
    /// A setting is wrong.
    InvalidConfig,
    /// Understood, and not offered.
    Unsupported,
    /// A fault of ours.
    Internal,
}

impl ErrorCode {
    /// Every code, in the order of `docs/errors.md`.
    pub const ALL: [Self; 14] = [
        Self::InvalidRequest,
        Self::ContextTooLong,
        Self::Unauthenticated,
        Self::ModelNotFound,
        Self::QueueFull,
        Self::DeadlineExceeded,
        Self::NoWorkers,
        Self::WorkerFailed,
        Self::PreemptedOut,
        Self::Cancelled,
        Self::ShuttingDown,
        Self::InvalidConfig,
        Self::Unsupported,
        Self::Internal,
    ];

    /// The code as clients and metrics see it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::ContextTooLong => "context_too_long",
            Self::Unauthenticated => "unauthenticated",
            Self::ModelNotFound => "model_not_found",
            Self::QueueFull => "queue_full",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NoWorkers => "no_workers",
            Self::WorkerFailed => "worker_failed",
            Self::PreemptedOut => "preempted_out",
            Self::Cancelled => "cancelled",
            Self::ShuttingDown => "shutting_down",
            Self::InvalidConfig => "invalid_config",
            Self::Unsupported => "unsupported",
            Self::Internal => "internal",
        }
    }

    /// The code with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }

    /// Whether the same request may succeed when it is sent again.
    pub const fn retryable(self) -> bool {
        matches!(
            self,
            Self::QueueFull | Self::NoWorkers | Self::PreemptedOut | Self::ShuttingDown
        )
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a request was not admitted. A refusal changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RejectReason {
    /// As many requests wait as may.
    #[error("the queue holds {current} requests, its limit is {limit}")]
    QueueFull {
        /// Requests waiting now.
        current: usize,
        /// The most that may wait.
        limit: usize,
    },
    /// The deadline passed before the request could start.
    #[error("the deadline passed while the request waited")]
    DeadlineExceeded,
    /// Prompt and requested output exceed the model's context length.
    #[error("{requested} tokens were asked for, the context holds {limit}")]
    TooLong {
        /// Prompt plus output tokens.
        requested: usize,
        /// `max_model_len`.
        limit: usize,
    },
    /// The KV that the request needs exceeds what the replica has in all.
    #[error("{requested} KV blocks are needed, there are {limit} in all")]
    NoCapacity {
        /// Blocks needed to finish the request.
        requested: usize,
        /// Blocks that exist.
        limit: usize,
    },
    /// There is nothing to continue: a prompt has at least one token.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A request with this id is still waiting or running.
    #[error("a request with this id is being generated")]
    DuplicateId,
    /// No new work is taken.
    #[error("no new requests are taken: shutting down")]
    ShuttingDown,
}

impl RejectReason {
    /// The code under which clients see this refusal.
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::QueueFull { .. } => ErrorCode::QueueFull,
            Self::DeadlineExceeded => ErrorCode::DeadlineExceeded,
            Self::TooLong { .. } => ErrorCode::ContextTooLong,
            Self::NoCapacity { .. } => ErrorCode::NoWorkers,
            Self::EmptyPrompt => ErrorCode::InvalidRequest,
            Self::DuplicateId => ErrorCode::Internal,
            Self::ShuttingDown => ErrorCode::ShuttingDown,
        }
    }
}
