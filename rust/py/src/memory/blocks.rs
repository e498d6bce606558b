//! The blocks of one owner.

use std::{ops::Range, sync::Arc};

use orchestra_memory::{self as memory, BlockHandle, MemoryError, Pool};
use parking_lot::Mutex;
use pyo3::{
    prelude::*,
    types::{PyBytes, PyTuple},
};

use super::{hub::Hub, view::BlockView};
use crate::errors::Failure;

/// Blocks that belong together, freed by hand, by `with`, or when the last reference goes.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct BlockSet {
    hub: Arc<Hub>,
    pool: Arc<Pool>,
    /// Locked by one who has the interpreter only for as long as takes no waiting: see [`Self::with`].
    set: Mutex<Option<memory::BlockSet>>,
}

impl BlockSet {
    pub(super) fn new(hub: &Arc<Hub>, set: memory::BlockSet) -> Self {
        Self {
            hub: Arc::clone(hub),
            pool: Arc::clone(set.pool()),
            set: Mutex::new(Some(set)),
        }
    }

    pub(super) const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Whether its blocks are of this manager's pools.
    pub(super) fn check_hub(&self, hub: &Arc<Hub>) -> Result<(), MemoryError> {
        let is_ours = Arc::ptr_eq(&self.hub, hub);
        is_ours.then_some(()).ok_or(MemoryError::ForeignHandle)
    }

    /// The blocks of these numbers; those to the end where `count` is none.
    pub(super) fn handles(
        &self,
        start: usize,
        count: Option<usize>,
    ) -> Result<Vec<BlockHandle>, MemoryError> {
        self.with(|set| {
            let len = set.len();
            let end = count.map_or(Some(len), |count| start.checked_add(count));
            match end {
                Some(end) if start < end && end <= len => set.handles_in(Range { start, end }),
                _ => Err(MemoryError::OutOfBounds {
                    offset: start as u64,
                    len: count.unwrap_or_else(|| len.saturating_sub(start)) as u64,
                    limit: len as u64,
                }),
            }
        })
    }

    fn with<T>(
        &self,
        act: impl FnOnce(&mut memory::BlockSet) -> Result<T, MemoryError>,
    ) -> Result<T, MemoryError> {
        let mut set = self.set.lock();
        act(set.as_mut().ok_or(MemoryError::StaleHandle)?)
    }

    fn handle(&self, at: usize) -> Result<BlockHandle, MemoryError> {
        let handles = self.handles(at, Some(1))?;
        handles.first().copied().ok_or(MemoryError::StaleHandle)
    }

    fn view_of(&self, at: usize) -> Result<BlockView, Failure> {
        Ok(BlockView::new(self.pool.view(self.handle(at)?)?))
    }
}

#[pymethods]
impl BlockSet {
    fn __len__(&self) -> PyResult<usize> {
        Ok(self.with(|set| Ok(set.len())).map_err(Failure::from)?)
    }

    #[getter]
    fn block_bytes(&self) -> u64 {
        self.pool.config().block_bytes
    }

    /// Runs of neighbours that the blocks lie in: descriptors that a transfer of all of them needs at least.
    #[getter]
    fn num_runs(&self) -> PyResult<usize> {
        Ok(self
            .with(|set| Ok(set.extents().len()))
            .map_err(Failure::from)?)
    }

    /// Takes `n` blocks more, behind the last where there is room.
    fn extend(&self, py: Python<'_>, n: u32) -> PyResult<()> {
        Ok(py.detach(|| -> Result<(), Failure> {
            let manager = self.hub.manager()?;
            Ok(self.with(|set| manager.extend(set, n))?)
        })?)
    }

    /// Frees the blocks from number `len` on.
    fn truncate(&self, py: Python<'_>, len: usize) -> PyResult<()> {
        let truncated = py.detach(|| {
            self.with(|set| {
                set.truncate(len);
                Ok(())
            })
        });
        Ok(truncated.map_err(Failure::from)?)
    }

    /// From now on its blocks may be read, and are never written.
    fn seal(&self, py: Python<'_>) -> PyResult<()> {
        let sealed = py.detach(|| self.with(|set| set.seal()));
        Ok(sealed.map_err(Failure::from)?)
    }

    /// The state of a block: `"writing"`, `"sealed"`, or `None` where it was lost.
    fn state(&self, at: usize) -> PyResult<Option<&'static str>> {
        let state = self.with(|set| {
            let handle = set.handle(at);
            Ok(handle.and_then(|handle| self.pool.state_of(handle)))
        });
        Ok(state.map_err(Failure::from)?.map(|state| match state {
            memory::BlockState::Migrating => memory::BlockState::Sealed.as_str(),
            state => state.as_str(),
        }))
    }

    /// Copies bytes into a block that is being filled, wherever it lies.
    #[pyo3(signature = (at, data, offset = 0))]
    fn write(&self, py: Python<'_>, at: usize, data: &[u8], offset: u64) -> PyResult<()> {
        Ok(py.detach(|| -> Result<(), Failure> {
            Ok(self.pool.write(self.handle(at)?, offset, data)?)
        })?)
    }

    /// Copies bytes out of a sealed block, wherever it lies.
    #[pyo3(signature = (at, offset = 0, length = None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        at: usize,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| -> Result<Vec<u8>, Failure> {
            let limit = self.pool.config().block_bytes;
            let len = length.unwrap_or_else(|| limit.saturating_sub(offset));
            if offset.checked_add(len).is_none_or(|end| end > limit) {
                return Err(MemoryError::OutOfBounds { offset, len, limit }.into());
            }
            let mut bytes = vec![0; len as usize];
            self.pool.pin(self.handle(at)?)?.read(offset, &mut bytes)?;
            Ok(bytes)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// A block as a tensor of bytes, held while the view or a tensor of it lives.
    fn view(&self, py: Python<'_>, at: usize) -> PyResult<BlockView> {
        Ok(py.detach(|| self.view_of(at))?)
    }

    /// A block as a memoryview, held while that or a slice of it lives.
    fn memoryview<'py>(&self, py: Python<'py>, at: usize) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, at)?.memoryview(py)
    }

    /// Frees the blocks. One that is viewed, granted or part of a transfer is used again when that is over.
    fn free(&self, py: Python<'_>) -> PyResult<()> {
        let freed = py.detach(|| self.set.lock().take().map(drop));
        Ok(freed.ok_or(Failure::from(MemoryError::StaleHandle))?)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        py.detach(|| drop(self.set.lock().take()));
    }
}
