//! The collectives of ranks on one machine.

#![expect(
    unsafe_code,
    reason = "sees the memory of tensors, whose addresses Python gives"
)]

use std::{sync::Arc, time::Duration};

use orchestra_kernels::GroupConfig;
use pyo3::prelude::*;

use super::{
    Dtype,
    recording::{try_call_or_note, try_call_or_note_shares},
    view,
};
use crate::errors::Failure;

/// One rank's end of a group that speaks over shared memory.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct SharedGroup {
    inner: Arc<orchestra_kernels::SharedGroup>,
}

#[pymethods]
impl SharedGroup {
    /// Makes the group's memory where there is no address, else joins it.
    #[new]
    #[pyo3(signature = (rank, size, generation, timeout_ms, address = None))]
    fn new(
        rank: usize,
        size: usize,
        generation: u64,
        timeout_ms: u64,
        address: Option<&str>,
    ) -> PyResult<Self> {
        let config = GroupConfig {
            rank,
            size,
            generation,
            timeout: Duration::from_millis(timeout_ms),
            ..GroupConfig::default()
        };
        let made = match address {
            Some(address) => orchestra_kernels::SharedGroup::join(config, address),
            None => orchestra_kernels::SharedGroup::create(config),
        };
        let inner = Arc::new(made.map_err(Failure::from)?);
        Ok(Self { inner })
    }

    /// Where the other ranks find the memory.
    #[getter]
    fn address(&self) -> &str {
        self.inner.address()
    }

    /// Waits until every rank is there.
    fn meet(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.inner.meet()).map_err(Failure::from)?)
    }

    /// Replaces the numbers of a tensor by their sums over all ranks.
    fn all_reduce(
        &self,
        py: Python<'_>,
        data_ptr: usize,
        numel: usize,
        dtype: &str,
    ) -> PyResult<()> {
        let dtype = Dtype::read(dtype)?;
        let group = Arc::clone(&self.inner);
        try_call_or_note_shares(py, numel, move |numel| {
            let ended = match dtype {
                // SAFETY: the caller says that there are `numel` numbers of this kind at `data_ptr`, and leaves them
                // alone until the call returns: the contract of `_core.pyi`.
                Dtype::Float32 => group.all_reduce(unsafe { view::<f32>(data_ptr, numel) }),
                // SAFETY: as above.
                Dtype::Bfloat16 => group.all_reduce(unsafe { view::<u16>(data_ptr, numel) }),
            };
            ended.map_err(Failure::from)
        })
    }

    /// Joins the ranks' matrices side by side, on rank 0.
    #[pyo3(signature = (data_ptr, num_bytes, rows, joined_ptr = None))]
    fn gather_columns(
        &self,
        py: Python<'_>,
        data_ptr: usize,
        num_bytes: usize,
        rows: usize,
        joined_ptr: Option<usize>,
    ) -> PyResult<()> {
        let each = num_bytes.checked_div(rows).unwrap_or(0);
        let group = Arc::clone(&self.inner);
        try_call_or_note(py, rows, move |rows| {
            let num_bytes = rows * each;
            // SAFETY: the caller says that there are `num_bytes` bytes at `data_ptr`, and as many for each rank at
            // `joined_ptr`, other memory; and leaves both alone until the call returns: the contract of `_core.pyi`.
            let (part, joined) = unsafe {
                let joined = joined_ptr.map(|at| view::<u8>(at, num_bytes * group.size()));
                (&*view::<u8>(data_ptr, num_bytes), joined)
            };
            let ended = group.gather_columns(part, rows, joined);
            ended.map_err(Failure::from)
        })
    }

    /// Adds up the numbers of a tensor over all ranks, each of which takes its share of the sums.
    fn reduce_scatter(
        &self,
        py: Python<'_>,
        data_ptr: usize,
        numel: usize,
        dtype: &str,
        share_ptr: usize,
    ) -> PyResult<()> {
        let dtype = Dtype::read(dtype)?;
        let share = numel / self.inner.size();
        let ended = py.detach(|| match dtype {
            // SAFETY: the caller says that there are `numel` numbers of this kind at `data_ptr` and one for each rank of
            // them at `share_ptr`, other memory; and leaves both alone until the call returns: the contract of
            // `_core.pyi`.
            Dtype::Float32 => unsafe {
                let numbers = &*view::<f32>(data_ptr, numel);
                self.inner
                    .reduce_scatter(numbers, view::<f32>(share_ptr, share))
            },
            // SAFETY: as above.
            Dtype::Bfloat16 => unsafe {
                let numbers = &*view::<u16>(data_ptr, numel);
                self.inner
                    .reduce_scatter(numbers, view::<u16>(share_ptr, share))
            },
        });
        Ok(ended.map_err(Failure::from)?)
    }

    /// Puts the bytes of all ranks one behind the other, on every rank.
    fn all_gather(
        &self,
        py: Python<'_>,
        data_ptr: usize,
        num_bytes: usize,
        joined_ptr: usize,
    ) -> PyResult<()> {
        let joined_bytes = num_bytes * self.inner.size();
        let ended = py.detach(|| {
            // SAFETY: as in `gather_columns`, but that every rank has memory for all.
            let (part, joined) = unsafe {
                let joined = view::<u8>(joined_ptr, joined_bytes);
                (&*view::<u8>(data_ptr, num_bytes), joined)
            };
            self.inner.all_gather(part, joined)
        });
        Ok(ended.map_err(Failure::from)?)
    }

    /// A step begins.
    fn begin_step(&self) {
        self.inner.meter().begin_step();
    }

    /// Collectives entered, whether it is in one, and seconds of the step's longest time between two of them.
    fn progress(&self) -> (u64, bool, f64) {
        let progress = self.inner.meter().progress();
        let slowest_s = progress.slowest_round.as_secs_f64();
        (progress.entered, progress.is_waiting, slowest_s)
    }

    /// Ends every collective of every rank, now and from now on.
    fn abort(&self) {
        self.inner.abort();
    }
}
