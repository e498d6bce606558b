//! From error codes to Python exceptions: the third rendering of `ErrorCode`, beside HTTP and gRPC.

use orchestra_agent::{AgentError, KvPoolError};
use orchestra_core::{ErrorCode, config::ConfigIssue, scheduler::SchedulerError};
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
    worker_id: Option<String>,
    key: Option<String>,
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
        }
    }

    /// A bad value in the field `key`.
    pub(crate) fn invalid(key: &str, message: impl Into<String>) -> Self {
        let key = Some(key.to_owned());
        Self {
            key,
            ..Self::new(ErrorCode::InvalidRequest, message)
        }
    }

    /// Settings that cannot be used: all problems in the message, the first one's key.
    pub(crate) fn config(issues: &[ConfigIssue]) -> Self {
        let lines: Vec<String> = issues.iter().map(ToString::to_string).collect();
        let key = issues.first().map(|issue| issue.key.clone());
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
        attributes.set_item("worker_id", self.worker_id)?;
        attributes.set_item("key", self.key)?;
        class(py, self.code)?.call((self.message,), Some(&attributes))
    }
}

fn class(py: Python<'_>, code: ErrorCode) -> PyResult<Bound<'_, PyType>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let module = MODULE.get_or_try_init(py, || py.import("orchestra.errors").map(Bound::unbind))?;
    Ok(module
        .bind(py)
        .getattr(class_name(code))?
        .cast_into::<PyType>()?)
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
                failure.key = Some(field.to_owned());
            }
            SchedulerError::TooManyBlocks { worker, .. } => failure.worker_id = Some(worker),
            SchedulerError::DuplicateName { .. } => failure.key = Some("name".to_owned()),
            SchedulerError::UnknownWorker => failure.key = Some("worker".to_owned()),
            SchedulerError::ModelNotFound => failure.key = Some("model".to_owned()),
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
