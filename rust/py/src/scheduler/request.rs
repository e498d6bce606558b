//! What goes in and out of a routing decision.

use orchestra_core::{
    TokenId,
    scheduler::{self as core, Candidate, Ineligible, Scheduler, WorkerId},
};
use pyo3::{exceptions::PyOverflowError, prelude::*, types::PyBytes};

use crate::errors::Failure;

/// A request that wants a worker; may be used again.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct RouteRequest {
    model: String,
    token_ids: Vec<TokenId>,
    max_tokens: u32,
    salt: String,
    exclude: Vec<String>,
}

#[pymethods]
impl RouteRequest {
    #[new]
    fn new(
        model: String,
        token_ids: TokenIds,
        max_tokens: u32,
        salt: String,
        exclude: Vec<String>,
    ) -> Self {
        Self {
            model,
            token_ids: token_ids.0,
            max_tokens,
            salt,
            exclude,
        }
    }
}

impl RouteRequest {
    /// The ids of the excluded workers; a name that is not registered excludes nobody.
    pub(super) fn exclude(&self, scheduler: &Scheduler) -> Vec<WorkerId> {
        let names = self.exclude.iter();
        names
            .filter_map(|name| scheduler.worker_by_name(name))
            .collect()
    }

    pub(super) fn as_core<'a>(&'a self, exclude: &'a [WorkerId]) -> core::RouteRequest<'a> {
        core::RouteRequest {
            model: &self.model,
            token_ids: &self.token_ids,
            max_tokens: self.max_tokens,
            salt: &self.salt,
            exclude,
            ..core::RouteRequest::default()
        }
    }
}

/// Token ids from a sequence of integers, or from the bytes of little-endian 32-bit integers.
pub(super) struct TokenIds(pub(super) Vec<TokenId>);

impl<'py> FromPyObject<'_, 'py> for TokenIds {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let invalid = || PyErr::from(Failure::invalid("token_ids", "token ids are 0 to 2^31 - 1"));
        let token_ids: Vec<TokenId> = if let Ok(bytes) = object.cast::<PyBytes>() {
            let (words, rest) = bytes.as_bytes().as_chunks::<4>();
            if !rest.is_empty() {
                let message = "token_ids must hold whole 32-bit integers";
                return Err(Failure::invalid("token_ids", message).into());
            }
            words.iter().copied().map(u32::from_le_bytes).collect()
        } else {
            object.extract().map_err(|error: PyErr| {
                let is_range = error.is_instance_of::<PyOverflowError>(object.py());
                if is_range { invalid() } else { error }
            })?
        };
        // A negative int32 is above this as well.
        if token_ids.iter().any(|&id| id > i32::MAX as u32) {
            return Err(invalid());
        }
        Ok(Self(token_ids))
    }
}

/// A candidate as a dictionary.
#[derive(IntoPyObject)]
pub(crate) struct CandidateRow {
    worker: String,
    cost: u64,
    has_room: bool,
    num_cached_tokens: u32,
    queued_prefill_tokens: u64,
    batch: u32,
    num_blocks: u32,
    kv_blocks_free: u64,
}

impl CandidateRow {
    pub(super) fn new(scheduler: &Scheduler, candidate: &Candidate) -> Self {
        Self {
            worker: name_of(scheduler, candidate.worker),
            cost: candidate.cost,
            has_room: candidate.has_room,
            num_cached_tokens: candidate.num_cached_tokens,
            queued_prefill_tokens: candidate.queued_prefill_tokens,
            batch: candidate.batch,
            num_blocks: candidate.num_blocks,
            kv_blocks_free: candidate.kv_blocks_free,
        }
    }
}

/// A worker that may not take the request, as a dictionary.
#[derive(IntoPyObject)]
pub(crate) struct IneligibleRow {
    worker: String,
    reason: &'static str,
    requested: Option<u64>,
    limit: Option<u64>,
}

impl IneligibleRow {
    pub(super) fn new(scheduler: &Scheduler, worker: WorkerId, why: Ineligible) -> Self {
        let (requested, limit) = match why {
            Ineligible::Excluded | Ineligible::Draining => (None, None),
            Ineligible::ContextTooLong { requested, limit }
            | Ineligible::KvTooLarge { requested, limit } => (Some(requested), Some(limit)),
        };
        Self {
            worker: name_of(scheduler, worker),
            reason: why.as_str(),
            requested,
            limit,
        }
    }
}

fn name_of(scheduler: &Scheduler, worker: WorkerId) -> String {
    scheduler
        .worker_spec(worker)
        .map(|spec| spec.name.clone())
        .unwrap_or_default()
}
