//! Why the scheduler refused. A refusal changes nothing.

use std::time::Duration;

use crate::error::ErrorCode;

/// Why the scheduler refused. Messages name limits and fields, never what a client wrote.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchedulerError {
    /// A field of the request or of a spec is out of range.
    #[error("{field} must be {expected}")]
    InvalidField {
        /// The field.
        field: &'static str,
        /// Its range in words.
        expected: &'static str,
    },
    /// A worker or GPU of this name is registered already.
    #[error("a {kind} of this name is registered already")]
    DuplicateName {
        /// `worker` or `gpu`.
        kind: &'static str,
    },
    /// The worker is not, or no longer, registered.
    #[error("the worker is not registered")]
    UnknownWorker,
    /// No registered worker serves the model.
    #[error("no worker serves this model")]
    ModelNotFound,
    /// Prompt and output exceed the context of every worker that could take the request.
    #[error("{requested} tokens were asked for, the longest context holds {limit}")]
    ContextTooLong {
        /// Prompt plus output tokens.
        requested: u64,
        /// The largest `max_model_len` among the workers that could take the request.
        limit: u64,
    },
    /// The request's KV exceeds all the KV memory of every worker that could take it.
    #[error("{requested} KV blocks are needed, the largest worker has {limit} in all")]
    KvTooLarge {
        /// Blocks needed, in the block size of the worker that `limit` is about.
        requested: u64,
        /// Blocks of the worker that came closest.
        limit: u64,
    },
    /// Workers serve the model, and none of them on the request's terms.
    #[error("no worker of this model takes requests with this {field}")]
    NotServed {
        /// The field of the request that none of them meets.
        field: &'static str,
    },
    /// Workers serve the model, and every one is draining, excluded or kept for other requests.
    #[error("all {registered} workers of this model are draining, excluded or kept for others")]
    NoWorkers {
        /// Workers that serve the model.
        registered: u32,
    },
    /// A limit of [`SchedulerConfig`](super::SchedulerConfig) is reached.
    #[error("there are {current} {kind}, the limit is {limit}")]
    LimitReached {
        /// What there would be too many of.
        kind: &'static str,
        /// How many there are.
        current: u32,
        /// How many there may be.
        limit: u32,
    },
    /// As many requests wait as may.
    #[error("there are {current} {kind}, the limit is {limit}")]
    QueueFull {
        /// Whose requests are counted.
        kind: &'static str,
        /// How many wait.
        current: u32,
        /// How many may.
        limit: u32,
        /// How long the request would have waited for a worker, where that can be predicted.
        retry_after: Option<Duration>,
    },
    /// The request waited, and had to leave for one of a higher class when as many waited as may.
    #[error("the queue is full, and a request of a higher class took this one's place")]
    Displaced {
        /// How long those that waited with it will wait, where that can be predicted.
        retry_after: Option<Duration>,
    },
    /// The deadline passed before a worker had room.
    #[error("the deadline passed before a worker had room")]
    DeadlineExceeded,
    /// The first token would come after the deadline.
    #[error(
        "the first token is predicted in {} ms, the deadline is in {} ms",
        .predicted.as_millis(), .left.as_millis()
    )]
    DeadlineHopeless {
        /// Predicted time to the first token.
        predicted: Duration,
        /// Time to the deadline.
        left: Duration,
    },
    /// The gang could not be placed on these GPUs even if all their memory were free.
    #[error(
        "{num_gpus} GPUs with {bytes_per_gpu} bytes each were asked for; \
         the widest domain has {num_gpus_max} GPUs of that size"
    )]
    GangTooLarge {
        /// GPUs asked for.
        num_gpus: u32,
        /// Bytes asked for on each.
        bytes_per_gpu: u64,
        /// GPUs with that much memory in the domain that has most of them.
        num_gpus_max: u32,
    },
    /// The gang does not fit now.
    #[error(
        "{num_gpus} GPUs with room for {bytes_per_gpu} bytes each were asked for; \
         the best domain has {num_gpus_max} now"
    )]
    NoGpuRoom {
        /// GPUs asked for.
        num_gpus: u32,
        /// Bytes asked for on each.
        bytes_per_gpu: u64,
        /// GPUs with such room, shares of node and domain counted, in the domain that has most of them.
        num_gpus_max: u32,
    },
    /// The pipeline could not be placed on these GPUs even if all their memory were free.
    #[error(
        "{num_stages} stages of {num_gpus} GPUs with {bytes_per_gpu} bytes each were asked for; \
         all domains together can hold {num_stages_max}"
    )]
    PipelineTooLarge {
        /// Stages asked for.
        num_stages: u32,
        /// GPUs of each.
        num_gpus: u32,
        /// Bytes asked for on each GPU.
        bytes_per_gpu: u64,
        /// Stages that all domains together could hold.
        num_stages_max: u32,
    },
    /// The pipeline does not fit now.
    #[error(
        "{num_stages} stages of {num_gpus} GPUs with room for {bytes_per_gpu} bytes each were \
         asked for; there is room for {num_stages_max} now"
    )]
    NoStageRoom {
        /// Stages asked for.
        num_stages: u32,
        /// GPUs of each.
        num_gpus: u32,
        /// Bytes asked for on each GPU.
        bytes_per_gpu: u64,
        /// Stages that there is room for.
        num_stages_max: u32,
    },
    /// A worker reported more cached blocks than it has.
    #[error("worker {worker} reported more cached blocks than the {limit} it has")]
    TooManyBlocks {
        /// The worker's name.
        worker: String,
        /// Its blocks.
        limit: u32,
    },
}

impl SchedulerError {
    /// The code under which clients see this refusal.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidField { .. }
            | Self::DuplicateName { .. }
            | Self::UnknownWorker
            | Self::GangTooLarge { .. }
            | Self::PipelineTooLarge { .. } => ErrorCode::InvalidRequest,
            Self::ModelNotFound | Self::NotServed { .. } => ErrorCode::ModelNotFound,
            Self::ContextTooLong { .. } | Self::KvTooLarge { .. } => ErrorCode::ContextTooLong,
            Self::NoWorkers { .. } | Self::NoGpuRoom { .. } | Self::NoStageRoom { .. } => {
                ErrorCode::NoWorkers
            }
            Self::LimitReached { .. } | Self::QueueFull { .. } | Self::Displaced { .. } => {
                ErrorCode::QueueFull
            }
            Self::DeadlineExceeded | Self::DeadlineHopeless { .. } => ErrorCode::DeadlineExceeded,
            Self::TooManyBlocks { .. } => ErrorCode::WorkerFailed,
        }
    }

    /// The limit that was hit, where the refusal has one.
    pub fn limit(&self) -> Option<u64> {
        match *self {
            Self::ContextTooLong { limit, .. } | Self::KvTooLarge { limit, .. } => Some(limit),
            Self::LimitReached { limit, .. }
            | Self::QueueFull { limit, .. }
            | Self::TooManyBlocks { limit, .. } => Some(limit.into()),
            Self::GangTooLarge { num_gpus_max, .. } | Self::NoGpuRoom { num_gpus_max, .. } => {
                Some(num_gpus_max.into())
            }
            Self::PipelineTooLarge { num_stages_max, .. }
            | Self::NoStageRoom { num_stages_max, .. } => Some(num_stages_max.into()),
            Self::InvalidField { .. }
            | Self::DuplicateName { .. }
            | Self::UnknownWorker
            | Self::ModelNotFound
            | Self::NotServed { .. }
            | Self::NoWorkers { .. }
            | Self::Displaced { .. }
            | Self::DeadlineExceeded
            | Self::DeadlineHopeless { .. } => None,
        }
    }

    /// How much was there, or was asked for, where the refusal compares it with a limit.
    pub fn current(&self) -> Option<u64> {
        match *self {
            Self::ContextTooLong { requested, .. } | Self::KvTooLarge { requested, .. } => {
                Some(requested)
            }
            Self::LimitReached { current, .. } | Self::QueueFull { current, .. } => {
                Some(current.into())
            }
            Self::GangTooLarge { num_gpus, .. } | Self::NoGpuRoom { num_gpus, .. } => {
                Some(num_gpus.into())
            }
            Self::PipelineTooLarge { num_stages, .. } | Self::NoStageRoom { num_stages, .. } => {
                Some(num_stages.into())
            }
            Self::InvalidField { .. }
            | Self::DuplicateName { .. }
            | Self::UnknownWorker
            | Self::ModelNotFound
            | Self::NotServed { .. }
            | Self::NoWorkers { .. }
            | Self::Displaced { .. }
            | Self::DeadlineExceeded
            | Self::DeadlineHopeless { .. }
            | Self::TooManyBlocks { .. } => None,
        }
    }

    /// When to ask again, where that can be predicted.
    pub const fn retry_after(&self) -> Option<Duration> {
        match *self {
            Self::QueueFull { retry_after, .. } | Self::Displaced { retry_after } => retry_after,
            _ => None,
        }
    }
}
