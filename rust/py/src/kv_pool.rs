//! The memory of a worker's KV cache, for `orchestra.worker`.

use std::sync::Arc;

use orchestra_core::ErrorCode;
use pyo3::{prelude::*, types::PyDict};

use crate::{errors::Failure, values::config_from};

/// Memory of a KV cache that other workers can reach.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct KvPool {
    inner: Arc<orchestra_agent::KvPool>,
}

impl KvPool {
    pub(crate) fn inner(&self) -> Arc<orchestra_agent::KvPool> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl KvPool {
    #[new]
    fn new(py: Python<'_>, config: &Bound<'_, PyDict>) -> PyResult<Self> {
        let config: orchestra_agent::KvPoolConfig = config_from(config)?;
        let inner = py
            .detach(|| orchestra_agent::KvPool::new(config))
            .map_err(Failure::from)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Where other processes of this machine and user find the memory.
    #[getter]
    fn address(&self) -> PyResult<String> {
        let missing = || Failure::new(ErrorCode::Internal, "the memory has no file");
        Ok(self.inner.address().ok_or_else(missing)?)
    }

    /// Where the bytes lie, as numpy asks for it. Whoever looks at them that way keeps the pool.
    #[getter]
    #[pyo3(name = "__array_interface__")]
    fn array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("shape", (self.inner.len(),))?;
        let is_read_only = false;
        interface.set_item("data", (self.inner.as_ptr().addr(), is_read_only))?;
        Ok(interface)
    }
}
