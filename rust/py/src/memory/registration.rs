//! Memory that Python code has made, for transfers.

#![expect(unsafe_code, reason = "promises that an object's bytes stay")]

use std::sync::Arc;

use orchestra_memory::{ForeignMemory, MemoryError, Region, RegistrationGuard, Tier};
use parking_lot::Mutex;
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::{PyDict, PyMemoryView, PyTuple},
};

use super::{dlpack, hub::Hub};
use crate::errors::Failure;

/// The bytes of an object.
pub(super) struct Lent {
    region: Region,
    is_writable: bool,
    /// A capsule of `DLPack`, or an array of `ctypes`: keeps the bytes where they are. Where the last reference goes
    /// without the interpreter, as on the thread that drives a manager, it is given up when somebody next has that.
    #[expect(dead_code, reason = "keeps the bytes by being held")]
    hold: Py<PyAny>,
}

// SAFETY: a capsule of `DLPack` keeps its tensor, and an array of `ctypes` the buffer that it was made from, in one place
// until it goes. Letting go of either waits for nobody.
unsafe impl ForeignMemory for Lent {
    fn region(&self) -> Region {
        self.region
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }
}

impl Lent {
    /// Borrows from what speaks `DLPack`, else from a writable buffer.
    pub(super) fn new(memory: &Bound<'_, PyAny>) -> PyResult<Self> {
        if memory.hasattr("__dlpack__")? {
            Self::tensor(memory)
        } else {
            Self::buffer(memory)
        }
    }

    fn tensor(memory: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = memory.py();
        let newest = PyDict::new(py);
        newest.set_item("max_version", (1, 0))?;
        let capsule = match memory.call_method("__dlpack__", (), Some(&newest)) {
            // Older libraries do not know the argument.
            Err(error) if error.is_instance_of::<PyTypeError>(py) => {
                memory.call_method0("__dlpack__")?
            }
            capsule => capsule?,
        };
        let (region, is_writable) = dlpack::describe(&capsule).map_err(Failure::from)?;
        let hold = capsule.unbind();
        Ok(Self {
            region,
            is_writable,
            hold,
        })
    }

    /// By way of `ctypes`, because the buffer protocol is no part of the interface that one wheel for all interpreters
    /// from 3.10 on can use.
    fn buffer(memory: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = memory.py();
        let len: usize = PyMemoryView::from(memory)?.getattr("nbytes")?.extract()?;
        let ctypes = py.import("ctypes")?;
        let class = ctypes.getattr("c_ubyte")?.mul(len)?;
        let array = class.call_method1("from_buffer", (memory,)).map_err(|_| {
            let expected = "a tensor, or a writable buffer without gaps";
            PyErr::from(Failure::invalid(
                "memory",
                format!("memory must be {expected}"),
            ))
        })?;
        let address: u64 = ctypes.call_method1("addressof", (&array,))?.extract()?;
        Ok(Self {
            region: Region {
                tier: Tier::Dram,
                address,
                len: len as u64,
            },
            is_writable: true,
            hold: array.unbind(),
        })
    }
}

/// Memory that is registered while this lives.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Registration {
    hub: Arc<Hub>,
    region: Region,
    guard: Mutex<Option<Arc<RegistrationGuard>>>,
}

impl Registration {
    pub(super) fn new(hub: &Arc<Hub>, lent: Lent) -> Result<Self, Failure> {
        let guard = hub.manager()?.register_external(Arc::new(lent))?;
        Ok(Self {
            hub: Arc::clone(hub),
            region: guard.region(),
            guard: Mutex::new(Some(Arc::new(guard))),
        })
    }

    /// Whether it is one of this manager's.
    pub(super) fn check_hub(&self, hub: &Arc<Hub>) -> Result<(), MemoryError> {
        let is_ours = Arc::ptr_eq(&self.hub, hub);
        is_ours.then_some(()).ok_or(MemoryError::ForeignHandle)
    }

    pub(super) fn guard(&self) -> Result<Arc<RegistrationGuard>, MemoryError> {
        let guard = self.guard.lock();
        guard
            .as_ref()
            .map(Arc::clone)
            .ok_or(MemoryError::StaleHandle)
    }
}

#[pymethods]
impl Registration {
    #[getter]
    const fn nbytes(&self) -> u64 {
        self.region.len
    }

    #[getter]
    fn readonly(&self) -> PyResult<bool> {
        let guard = self.guard();
        let guard = guard.map_err(|_| PyValueError::new_err("the registration was released"))?;
        Ok(!guard.is_writable())
    }

    /// Ends it. Transfers under way keep the memory, and the manager may for the next time.
    fn release(&self, py: Python<'_>) {
        py.detach(|| drop(self.guard.lock().take()));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.release(py);
    }
}
