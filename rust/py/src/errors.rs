//! From error codes to Python exceptions: the third rendering of `ErrorCode`, beside HTTP and gRPC.

use orchestra_agent::{AgentError, KvPoolError};
use orchestra_core::{ErrorCode, config::ConfigIssue, scheduler::SchedulerError};
use orchestra_memory::{MemoryError, TransferError};
use pyo3::{
    prelude::*,
    sync::PyOnceLock,
    types::{PyDict, PyType},
};

/// The class in `orchestra.errors` that stands for a code.
const fn class_name(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::InvalidRequest => "InvalidRequestError",
        ErrorCode::ContextTooLong => "ContextTooLongError",
        ErrorCode::Unauthenticated => "AuthenticationError",
        ErrorCode::ModelNotFound => "ModelNotFoundError",
        ErrorCode::QueueFull => "OverloadedError",
        ErrorCode::DeadlineExceeded => "DeadlineExceededError",
        ErrorCode::NoWorkers => "WorkerUnavailableError",
        ErrorCode::WorkerFailed => "WorkerFailedError",
        ErrorCode::PreemptedOut => "PreemptedError",
        ErrorCode::Cancelled => "RequestCancelledError",
        ErrorCode::ShuttingDown => "ShuttingDownError",
        ErrorCode::InvalidConfig => "ConfigError",
        ErrorCode::Unsupported => "UnsupportedError",
        ErrorCode::Internal => "InternalError",
    }
}

/// Every error code, with the name of its class and whether a retry may help.
#[pyfunction]
pub(crate) fn error_codes() -> Vec<(&'static str, &'static str, bool)> {
    let row = |code: ErrorCode| (code.as_str(), class_name(code), code.retryable());
    ErrorCode::ALL.into_iter().map(row).collect()
}

/// An error on its way to Python: the code chooses the class, the rest become attributes.
#[derive(Debug)]
pub(crate) struct Failure {
    code: ErrorCode,
    message: String,
    retry_after_ms: Option<u64>,
    limit: Option<u64>,
    current: Option<u64>,
    worker_id: Option<Box<str>>,
    key: Option<Box<str>>,
    finer: Option<Box<Finer>>,
}

/// A class below the code's own, and the attributes that only it has.
#[derive(Debug)]
struct Finer {
    class: &'static str,
    numbers: Vec<(&'static str, u64)>,
}

impl Failure {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retry_after_ms: None,
            limit: None,
            current: None,
            worker_id: None,
            key: None,
            finer: None,
        }
    }

    /// Chooses a class below the code's own.
    fn refine(&mut self, class: &'static str, numbers: &[(&'static str, usize)]) {
        let numbers = numbers.iter().map(|(name, number)| (*name, *number as u64));
        let numbers = numbers.collect();
        self.finer = Some(Box::new(Finer { class, numbers }));
    }

    /// A bad value in the field `key`.
    pub(crate) fn invalid(key: &str, message: impl Into<String>) -> Self {
        let key = Some(key.into());
        Self {
            key,
            ..Self::new(ErrorCode::InvalidRequest, message)
        }
    }

    /// Settings that cannot be used: all problems in the message, the first one's key.
    pub(crate) fn config(issues: &[ConfigIssue]) -> Self {
        let lines: Vec<String> = issues.iter().map(ToString::to_string).collect();
        let key = issues.first().map(|issue| issue.key.as_str().into());
        Self {
            key,
            ..Self::new(ErrorCode::InvalidConfig, lines.join("; "))
        }
    }

    /// The exception, for raising or for handing over.
    pub(crate) fn into_exception(self, py: Python<'_>) -> PyErr {
        self.instance(py)
            .map_or_else(|error| error, PyErr::from_value)
    }

    fn instance(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        let attributes = PyDict::new(py);
        attributes.set_item("retry_after_ms", self.retry_after_ms)?;
        attributes.set_item("limit", self.limit)?;
        attributes.set_item("current", self.current)?;
        attributes.set_item("worker_id", self.worker_id.as_deref())?;
        attributes.set_item("key", self.key.as_deref())?;
        let mut name = class_name(self.code);
        if let Some(finer) = self.finer {
            name = finer.class;
            for (name, number) in finer.numbers {
                attributes.set_item(name, number)?;
            }
        }
        class(py, name)?.call((self.message,), Some(&attributes))
    }
}

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyType>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let module = MODULE.get_or_try_init(py, || py.import("orchestra.errors").map(Bound::unbind))?;
    Ok(module.bind(py).getattr(name)?.cast_into::<PyType>()?)
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        Python::attach(|py| failure.into_exception(py))
    }
}

impl From<SchedulerError> for Failure {
    fn from(error: SchedulerError) -> Self {
        let mut failure = Self::new(error.code(), error.to_string());
        failure.limit = error.limit();
        failure.current = error.current();
        let retry_after = error.retry_after();
        failure.retry_after_ms = retry_after.map(|after| after.as_millis() as u64);
        match error {
            SchedulerError::InvalidField { field, .. } | SchedulerError::NotServed { field } => {
                failure.key = Some(field.into());
            }
            SchedulerError::TooManyBlocks { worker, .. } => failure.worker_id = Some(worker.into()),
            SchedulerError::DuplicateName { .. } => failure.key = Some("name".into()),
            SchedulerError::UnknownWorker => failure.key = Some("worker".into()),
            SchedulerError::ModelNotFound => failure.key = Some("model".into()),
            SchedulerError::ContextTooLong { .. }
            | SchedulerError::KvTooLarge { .. }
            | SchedulerError::NoWorkers { .. }
            | SchedulerError::LimitReached { .. }
            | SchedulerError::QueueFull { .. }
            | SchedulerError::Displaced { .. }
            | SchedulerError::DeadlineExceeded
            | SchedulerError::DeadlineHopeless { .. }
            | SchedulerError::GangTooLarge { .. }
            | SchedulerError::NoGpuRoom { .. }
            | SchedulerError::PipelineTooLarge { .. }
            | SchedulerError::NoStageRoom { .. } => {}
        }
        failure
    }
}

impl From<KvPoolError> for Failure {
    fn from(error: KvPoolError) -> Self {
        match error {
            KvPoolError::InvalidConfig(issues) => Self::config(&issues),
            KvPoolError::Memory(_) => Self::new(ErrorCode::Unsupported, error.to_string()),
        }
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::InvalidConfig(issues) => Self::config(&issues),
            error => Self::new(error.code(), error.to_string()),
        }
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        let mut failure = Self::new(error.code(), error.to_string());
        match error {
            MemoryError::InvalidField { field, .. } => failure.key = Some(field.into()),
            MemoryError::Exhausted {
                requested,
                free,
                largest_run,
                quarantined,
            } => {
                let numbers = [("largest_run", largest_run), ("quarantined", quarantined)];
                failure.refine("PoolExhaustedError", &numbers);
                failure.current = Some(requested as u64);
                failure.limit = Some(free as u64);
            }
            MemoryError::StaleHandle | MemoryError::ForeignHandle => {
                failure.refine("StaleHandleError", &[]);
            }
            MemoryError::WrongState { .. } | MemoryError::InUse => {
                failure.refine("BlockInUseError", &[]);
            }
            MemoryError::LimitReached { limit, .. } => failure.limit = Some(limit as u64),
            MemoryError::OutOfBounds { limit, .. } => failure.limit = Some(limit),
            MemoryError::UnknownPeer | MemoryError::DuplicatePeer => {
                failure.key = Some("peer".into());
            }
            MemoryError::GrantEnded => failure.refine("GrantEndedError", &[]),
            MemoryError::MemlockTooLow { need, have } => {
                failure.refine("MemlockTooLowError", &[]);
                failure.current = Some(need);
                failure.limit = Some(have);
            }
            MemoryError::BadMetadata(_) => failure.key = Some("metadata".into()),
            MemoryError::Unavailable { .. } => failure.refine("TransportUnavailableError", &[]),
            MemoryError::TierUnavailable { .. } => {
                failure.refine("TierUnavailableError", &[]);
                failure.key = Some("tier".into());
            }
            MemoryError::TierUnsupported { .. } => failure.key = Some("tier".into()),
            MemoryError::DeviceExhausted { need, .. } => failure.current = Some(need),
            MemoryError::UnknownSlab(_)
            | MemoryError::NotInHostMemory { .. }
            | MemoryError::Device { .. }
            | MemoryError::Os { .. }
            | MemoryError::Transport { .. } => {}
        }
        failure
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        let mut failure = Self::new(error.code(), error.to_string());
        match error {
            TransferError::PeerGone => failure.refine("PeerGoneError", &[]),
            TransferError::Timeout { quarantined } => {
                failure.refine("TransferTimeoutError", &[("quarantined", quarantined)]);
            }
            TransferError::StaleHandle => failure.refine("StaleHandleError", &[]),
            TransferError::Denied => failure.refine("GrantEndedError", &[]),
            TransferError::OutOfBounds => {}
            TransferError::Transport { .. } => failure.refine("TransferFailedError", &[]),
        }
        failure
    }
}
