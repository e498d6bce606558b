//! The bytes of a block where they lie, for Python.

use std::sync::Arc;

use orchestra_memory::{
    self as memory,
    dlpack::{device_of, export},
};
use parking_lot::Mutex;
use pyo3::{
    exceptions::{PyBufferError, PyValueError},
    prelude::*,
    types::{PyCapsule, PyMemoryView, PyTuple},
};

use super::dlpack;

/// A block that stays where it is, and is used for nothing else, while this or a tensor of it lives.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct BlockView {
    view: Mutex<Option<Arc<memory::BlockView>>>,
}

impl BlockView {
    pub(super) fn new(view: memory::BlockView) -> Self {
        Self::of(Arc::new(view))
    }

    const fn of(view: Arc<memory::BlockView>) -> Self {
        let view = Mutex::new(Some(view));
        Self { view }
    }

    fn held(&self) -> PyResult<Arc<memory::BlockView>> {
        let view = self.view.lock().clone();
        view.ok_or_else(|| PyValueError::new_err("operation forbidden on a released view"))
    }
}

#[pymethods]
impl BlockView {
    #[getter]
    fn nbytes(&self) -> PyResult<usize> {
        Ok(self.held()?.len())
    }

    #[getter]
    fn readonly(&self) -> PyResult<bool> {
        Ok(!self.held()?.is_writable())
    }

    /// The bytes as a memoryview. It and its slices hold the block, also after this view is released.
    ///
    /// An array of `ctypes` lends them, because the buffer protocol is no part of the interface that one wheel for all
    /// interpreters from 3.10 on can use.
    pub(super) fn memoryview<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let view = self.held()?;
        view.check_host()
            .map_err(|refused| PyBufferError::new_err(refused.to_string()))?;
        let class = py.import("ctypes")?.getattr("c_ubyte")?.mul(view.len())?;
        let array = class.call_method1("from_address", (view.as_ptr().addr(),))?;
        let is_writable = view.is_writable();
        array.setattr("hold", Py::new(py, Self::of(view))?)?;
        let bytes = PyMemoryView::from(&array)?.call_method1("cast", ("B",))?;
        if is_writable {
            return Ok(bytes);
        }
        bytes.call_method0("toreadonly")
    }

    /// Where the bytes lie: `"dram"`, `"pinned"`, or `"vram:"` and the number of the device.
    #[getter]
    fn tier(&self) -> PyResult<String> {
        Ok(self.held()?.tier().to_string())
    }

    fn __dlpack_device__(&self) -> PyResult<(i32, i32)> {
        Ok(device_of(self.held()?.tier()))
    }

    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let refuse = |why| Err(PyBufferError::new_err(why));
        let view = self.held()?;
        let tier = view.tier();
        // Nothing of ours is under way on a device, so there is nothing that a stream would have to wait for.
        if tier.is_host() && stream.is_some_and(|stream| stream != -1) {
            return refuse("host memory has no streams");
        }
        if dl_device.is_some_and(|device| device != device_of(tier)) {
            return Err(PyBufferError::new_err(format!(
                "the block lies in {tier} memory and is not copied elsewhere"
            )));
        }
        if copy == Some(true) {
            return refuse("a view is never a copy");
        }
        let is_versioned = max_version.is_some_and(|(major, _)| major >= 1);
        match export(view, is_versioned) {
            Some(managed) => dlpack::capsule(py, managed),
            None => refuse("a sealed block is read-only, which DLPack says from version 1.0 on"),
        }
    }

    /// Ends this view. Memoryviews and tensors that came from it hold the block on.
    fn release(&self, py: Python<'_>) {
        py.detach(|| drop(self.view.lock().take()));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.release(py);
    }
}
