//! What goes in and out of a routing decision.

use orchestra_core::{
    TokenId,
    scheduler::{self as core, AdmissionClass, Candidate, Ineligible, Lora, Scheduler, WorkerId},
};
use pyo3::{
    exceptions::{PyOverflowError, PyTypeError},
    prelude::*,
    types::{PyBytes, PyString},
};

use crate::errors::Failure;

/// A request that wants a worker; may be used again.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct RouteRequest {
    token_ids: Vec<TokenId>,
    options: RouteOptions,
}

/// Everything but the prompt.
pub(super) struct RouteOptions {
    model: String,
    max_tokens: u32,
    salt: String,
    lora: Option<String>,
    lora_version: u64,
    weights_epoch: Option<u64>,
    slo_class: String,
    tolerations: Vec<String>,
    exclude: Vec<String>,
    session_key: String,
    tenant: String,
    class: AdmissionClass,
}

#[pymethods]
impl RouteRequest {
    #[new]
    #[pyo3(signature = (
        token_ids, *, model, max_tokens=16, salt="", lora=None, lora_version=0, weights_epoch=None,
        slo_class="", tolerations=Names::default(), exclude=Names::default(), session_key="",
        tenant="", admission_class="standard"
    ))]
    #[expect(clippy::too_many_arguments, reason = "a request's fields, by keyword")]
    fn new(
        token_ids: TokenIds,
        model: String,
        max_tokens: u32,
        salt: &str,
        lora: Option<String>,
        lora_version: u64,
        weights_epoch: Option<u64>,
        slo_class: &str,
        tolerations: Names,
        exclude: Names,
        session_key: &str,
        tenant: &str,
        admission_class: &str,
    ) -> PyResult<Self> {
        let class = AdmissionClass::parse(admission_class).ok_or_else(|| {
            let message = "admission_class must be interactive, standard or batch";
            Failure::invalid("admission_class", message)
        })?;
        let options = RouteOptions {
            model,
            max_tokens,
            salt: salt.to_owned(),
            lora,
            lora_version,
            weights_epoch,
            slo_class: slo_class.to_owned(),
            tolerations: tolerations.0,
            exclude: exclude.0,
            session_key: session_key.to_owned(),
            tenant: tenant.to_owned(),
            class,
        };
        Ok(Self {
            token_ids: token_ids.0,
            options,
        })
    }
}

impl RouteRequest {
    /// Asks with the request as the core has it.
    pub(super) fn ask<R>(
        &self,
        scheduler: &mut Scheduler,
        ask: impl FnOnce(&mut Scheduler, &core::RouteRequest<'_>) -> R,
    ) -> R {
        self.options.ask(scheduler, |scheduler, request| {
            let token_ids = &self.token_ids;
            ask(
                scheduler,
                &core::RouteRequest {
                    token_ids,
                    ..*request
                },
            )
        })
    }

    /// For many prompts alike.
    pub(super) const fn options(&self) -> &RouteOptions {
        &self.options
    }
}

impl RouteOptions {
    /// Asks with a request that has everything but a prompt. A name that is not registered excludes nobody.
    pub(super) fn ask<R>(
        &self,
        scheduler: &mut Scheduler,
        ask: impl FnOnce(&mut Scheduler, &core::RouteRequest<'_>) -> R,
    ) -> R {
        let names = self.exclude.iter();
        let exclude: Vec<WorkerId> = names
            .filter_map(|name| scheduler.worker_by_name(name))
            .collect();
        let tolerations: Vec<&str> = self.tolerations.iter().map(String::as_str).collect();
        let request = core::RouteRequest {
            model: &self.model,
            max_tokens: self.max_tokens,
            salt: &self.salt,
            lora: self.lora.as_deref().map(|id| Lora {
                id,
                version: self.lora_version,
            }),
            weights_epoch: self.weights_epoch,
            slo_class: &self.slo_class,
            tolerations: &tolerations,
            exclude: &exclude,
            session_key: &self.session_key,
            tenant: &self.tenant,
            class: self.class,
            ..core::RouteRequest::default()
        };
        ask(scheduler, &request)
    }
}

/// Names from any iterable but a string, whose letters are no names.
#[derive(Default)]
pub(super) struct Names(pub(super) Vec<String>);

impl<'py> FromPyObject<'_, 'py> for Names {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("names come in a list, not as one str"));
        }
        let names = object.try_iter()?.map(|name| name?.extract());
        Ok(Self(names.collect::<PyResult<_>>()?))
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
    lora_load_tokens: u64,
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
            lora_load_tokens: candidate.lora_load_tokens,
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
            Ineligible::ContextTooLong { requested, limit }
            | Ineligible::KvTooLarge { requested, limit } => (Some(requested), Some(limit)),
            Ineligible::Excluded
            | Ineligible::Draining
            | Ineligible::OtherWeightsEpoch
            | Ineligible::Tainted
            | Ineligible::OtherSloClass
            | Ineligible::NoLoras
            | Ineligible::PrefillOnly => (None, None),
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
