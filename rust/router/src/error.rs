//! A refused or failed request, as the corridor hands it to a door. `respond.rs` renders it for each door.

use orchestra_core::{ErrorCode, RejectReason, sampling::SamplingError};

/// Who has to act: decides the log level, and whether a worker is blamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The request itself is wrong, or the caller left.
    Client,
    /// A worker failed.
    Worker,
    /// Orchestra itself: a limit of ours, or a bug.
    Orchestra,
}

/// Why a request got no (further) tokens. The message may name fields and limits, never what a client wrote.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// The closed set of reasons.
    pub code: ErrorCode,
    /// One sentence for the caller.
    pub message: String,
    /// The offending field as clients spell it, where there is one.
    pub param: Option<String>,
    /// When to try again, milliseconds.
    pub retry_after_ms: Option<u64>,
}

impl ApiError {
    /// An error without a field.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after_ms: None,
        }
    }

    /// A bad value in `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(field.into()),
            ..Self::new(ErrorCode::InvalidRequest, message)
        }
    }

    /// Adds when to try again.
    #[must_use]
    pub fn retry_after_ms(self, milliseconds: u64) -> Self {
        Self {
            retry_after_ms: Some(milliseconds),
            ..self
        }
    }

    /// Who has to act.
    pub fn origin(&self) -> Origin {
        match self.code {
            ErrorCode::InvalidRequest
            | ErrorCode::ContextTooLong
            | ErrorCode::Unauthenticated
            | ErrorCode::ModelNotFound
            | ErrorCode::Cancelled
            | ErrorCode::Unsupported => Origin::Client,
            ErrorCode::NoWorkers | ErrorCode::WorkerFailed => Origin::Worker,
            ErrorCode::QueueFull
            | ErrorCode::DeadlineExceeded
            | ErrorCode::PreemptedOut
            | ErrorCode::ShuttingDown
            | ErrorCode::InvalidConfig
            | ErrorCode::Internal => Origin::Orchestra,
        }
    }
}

impl From<SamplingError> for ApiError {
    fn from(error: SamplingError) -> Self {
        Self::invalid(error.field, error.to_string())
    }
}

impl From<RejectReason> for ApiError {
    fn from(reason: RejectReason) -> Self {
        let error = Self::new(reason.code(), reason.to_string());
        if error.code.retryable() {
            error.retry_after_ms(1000)
        } else {
            error
        }
    }
}
