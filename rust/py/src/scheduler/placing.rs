//! GPUs, and the gangs that take their memory.

use std::time::Duration;

use orchestra_core::{
    Time,
    scheduler::{self as core, GpuSpec, Layout, NodeLimits, SchedulerError, Shares, Wait},
};
use pyo3::{IntoPyObjectExt, prelude::*};

use super::{
    Scheduler,
    held::{HeldPlacement, Placement, Ticket},
    shared::State,
};
use crate::errors::Failure;

/// The attributes of a GPU, from any object that has them.
#[derive(FromPyObject)]
struct GpuSpecArg {
    name: String,
    domain: String,
    node: String,
    rack: Option<String>,
    memory_bytes: u64,
}

/// A gang that wants memory; may be used again.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct PlaceRequest {
    request: core::PlaceRequest,
    expires_in: Option<Duration>,
}

#[pymethods]
impl PlaceRequest {
    #[new]
    #[pyo3(signature = (
        *, num_gpus, bytes_per_gpu, num_stages=1, layout="contiguous", paged_bytes_per_gpu=0, priority=0,
        replay_cost=0, expires_in_us=None, cpu_milli=0, host_memory_bytes=0, nic_mbps=0, power_watts=0
    ))]
    #[expect(clippy::too_many_arguments, reason = "a request's fields, by keyword")]
    fn new(
        num_gpus: u32,
        bytes_per_gpu: u64,
        num_stages: u32,
        layout: &str,
        paged_bytes_per_gpu: u64,
        priority: u8,
        replay_cost: u64,
        expires_in_us: Option<u64>,
        cpu_milli: u64,
        host_memory_bytes: u64,
        nic_mbps: u64,
        power_watts: u64,
    ) -> PyResult<Self> {
        let layout = match layout {
            "contiguous" => Layout::Contiguous,
            "paged" => Layout::Paged,
            _ => {
                let message = "layout is \"contiguous\" or \"paged\"";
                return Err(Failure::invalid("layout", message).into());
            }
        };
        let request = core::PlaceRequest {
            num_gpus,
            num_stages,
            bytes_per_gpu,
            priority,
            layout,
            paged_bytes_per_gpu,
            shares_per_gpu: Shares {
                cpu_milli,
                host_memory_bytes,
                nic_mbps,
                power_watts,
            },
            replay_cost,
            expires_at: None,
        };
        Ok(Self {
            request,
            expires_in: expires_in_us.map(Duration::from_micros),
        })
    }
}

impl PlaceRequest {
    fn at(&self, now: Time) -> core::PlaceRequest {
        core::PlaceRequest {
            expires_at: self.expires_in.map(|after| now + after),
            ..self.request
        }
    }
}

/// How a domain's memory is used, as a dictionary.
#[derive(IntoPyObject)]
pub(crate) struct DomainRow {
    num_gpus: u32,
    num_gpus_out_of_use: u32,
    num_gpus_empty: u32,
    bytes_total: u64,
    bytes_free: u64,
    bytes_stranded: u64,
    unusable_p50_ratio: f64,
    unusable_p90_ratio: f64,
    emptiable_ratio: f64,
}

#[pymethods]
impl Scheduler {
    /// Registers a GPU, all of its memory free.
    fn add_gpu(&self, py: Python<'_>, spec: GpuSpecArg) -> PyResult<()> {
        let spec = GpuSpec {
            name: spec.name,
            domain: spec.domain,
            node: spec.node,
            rack: spec.rack,
            memory_bytes: spec.memory_bytes,
        };
        let added = self
            .shared
            .change(py, |state| state.scheduler.add_gpu(spec));
        added.map_err(Failure::from)?;
        Ok(())
    }

    /// Forgets a GPU and every placement that it was part of. `False` where it is not registered.
    fn remove_gpu(&self, py: Python<'_>, name: &str) -> bool {
        self.shared.change(py, |state| {
            let id = state.scheduler.gpu_by_name(name);
            id.is_some_and(|id| state.scheduler.remove_gpu(id).is_some())
        })
    }

    /// Takes a GPU out of use; the ids of the placements that it was part of, which are released.
    fn fail_gpu(&self, py: Python<'_>, name: &str) -> PyResult<Vec<u64>> {
        let lost = self.shared.change(py, |State { scheduler, .. }| {
            let id = scheduler.gpu_by_name(name);
            id.and_then(|id| scheduler.fail_gpu(id))
        });
        let lost = lost.ok_or_else(|| unknown("name", "GPU"))?;
        Ok(lost.iter().map(|id| id.number()).collect())
    }

    /// Puts a failed GPU back into use, all of its memory free.
    fn restore_gpu(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let is_known = self.shared.change(py, |State { scheduler, .. }| {
            let id = scheduler.gpu_by_name(name);
            id.is_some_and(|id| scheduler.restore_gpu(id))
        });
        Ok(is_known
            .then_some(())
            .ok_or_else(|| unknown("name", "GPU"))?)
    }

    /// A draining domain takes no new gangs; the ids of those that it has.
    fn set_domain_draining(
        &self,
        py: Python<'_>,
        domain: &str,
        is_draining: bool,
    ) -> PyResult<Vec<u64>> {
        let held = self.shared.change(py, |State { scheduler, .. }| {
            scheduler.set_domain_draining(domain, is_draining)
        });
        let held = held.ok_or_else(|| unknown("domain", "domain"))?;
        Ok(held.iter().map(|id| id.number()).collect())
    }

    /// Limits what the GPUs of a node share; 0 is no limit.
    fn set_node_limits(
        &self,
        py: Python<'_>,
        node: &str,
        cpu_milli: u64,
        host_memory_bytes: u64,
        nic_mbps: u64,
    ) -> PyResult<()> {
        let limits = NodeLimits {
            cpu_milli,
            host_memory_bytes,
            nic_mbps,
        };
        let set = self.shared.change(py, |State { scheduler, .. }| {
            scheduler.set_node_limits(node, &limits)
        });
        Ok(set.map_err(Failure::from)?)
    }

    /// Limits the power that the GPUs of a domain share, watts; 0 is no limit.
    fn set_domain_power(&self, py: Python<'_>, domain: &str, watts: u64) -> PyResult<()> {
        let is_known = self.shared.change(py, |State { scheduler, .. }| {
            scheduler.set_domain_power(domain, watts)
        });
        Ok(is_known
            .then_some(())
            .ok_or_else(|| unknown("domain", "domain"))?)
    }

    /// How a domain's memory is used, and how usable the rest is.
    fn domain_memory(&self, py: Python<'_>, domain: &str) -> PyResult<DomainRow> {
        let memory = py.detach(|| self.shared.lock().scheduler.domain_memory(domain));
        let memory = memory.ok_or_else(|| unknown("domain", "domain"))?;
        Ok(DomainRow {
            num_gpus: memory.num_gpus,
            num_gpus_out_of_use: memory.num_gpus_out_of_use,
            num_gpus_empty: memory.num_gpus_empty,
            bytes_total: memory.bytes_total,
            bytes_free: memory.bytes_free,
            bytes_stranded: memory.bytes_stranded,
            unusable_p50_ratio: memory.unusable_p50_ratio,
            unusable_p90_ratio: memory.unusable_p90_ratio,
            emptiable_ratio: memory.emptiable_ratio,
        })
    }

    /// Finds and takes memory for a gang.
    fn place(&self, py: Python<'_>, request: &Bound<'_, PlaceRequest>) -> PyResult<Placement> {
        let request = request.get();
        let held = self.change_gpus(py, |State { scheduler, .. }, now| {
            let placement = scheduler.place(&request.at(now))?;
            Ok(HeldPlacement::new(scheduler, &placement))
        })?;
        Placement::new(py, &self.shared, held)
    }

    /// Places gangs that arrived together, the largest first; each gets a placement or the exception that refuses it.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "extracted from Python by value"
    )]
    fn place_batch(
        &self,
        py: Python<'_>,
        requests: Vec<Py<PlaceRequest>>,
    ) -> PyResult<Vec<Py<PyAny>>> {
        let requests: Vec<&PlaceRequest> = requests.iter().map(Py::get).collect();
        let outcomes = self.change_gpus(py, |State { scheduler, .. }, now| {
            let requests: Vec<_> = requests.iter().map(|request| request.at(now)).collect();
            let placed = scheduler.place_batch(&requests).into_iter();
            let held = placed.map(|it| it.map(|it| HeldPlacement::new(scheduler, &it)));
            Ok(held.collect::<Vec<Result<_, SchedulerError>>>())
        })?;
        // All become leases before the first failure is looked at, so that nothing is held by nobody.
        let outcomes: Vec<_> = outcomes
            .into_iter()
            .map(|outcome| match outcome {
                Ok(held) => Placement::new(py, &self.shared, held)?.into_py_any(py),
                Err(error) => Failure::from(error).into_exception(py).into_py_any(py),
            })
            .collect();
        outcomes.into_iter().collect()
    }

    /// Memory for a gang, or a ticket; then `on_outcome` is called once, as by `acquire`.
    fn acquire_gpus(
        &self,
        py: Python<'_>,
        request: &Bound<'_, PlaceRequest>,
        on_outcome: Py<PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let request = request.get();
        let answer = self.change_gpus(py, |state, now| {
            Ok(match state.scheduler.acquire_gpus(&request.at(now))? {
                Wait::Granted(placement) => {
                    Wait::Granted(HeldPlacement::new(&state.scheduler, &placement))
                }
                Wait::Waiting(ticket) => {
                    state.callbacks.insert(ticket, on_outcome);
                    Wait::Waiting(ticket)
                }
            })
        })?;
        match answer {
            Wait::Granted(held) => Placement::new(py, &self.shared, held)?.into_py_any(py),
            Wait::Waiting(ticket) => Ticket::new(&self.shared, ticket).into_py_any(py),
        }
    }

    /// Releases the placements whose time has come; their ids.
    fn expire_placements(&self, py: Python<'_>) -> Vec<u64> {
        let now = self.shared.now();
        let expired = self.shared.change(py, |State { scheduler, .. }| {
            scheduler.expire_placements(now)
        });
        expired.iter().map(|id| id.number()).collect()
    }
}

impl Scheduler {
    /// Makes a change to what GPUs hold. Placements whose time has come make room for it first, and what is left of
    /// that serves those that wait.
    fn change_gpus<R: Send>(
        &self,
        py: Python<'_>,
        change: impl FnOnce(&mut State, Time) -> Result<R, SchedulerError> + Send,
    ) -> PyResult<R> {
        let now = self.shared.now();
        let changed = self.shared.change(py, |state| {
            state.scheduler.expire_placements(now);
            change(state, now)
        });
        Ok(changed.map_err(Failure::from)?)
    }
}

fn unknown(key: &str, kind: &str) -> Failure {
    Failure::invalid(key, format!("no {kind} of this name is registered"))
}
