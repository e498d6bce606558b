//! `orchestra_memory` for Python: a manager with a thread that drives it, and what it gives out.
//!
//! No Python code runs while a lock of ours is held, and the driving thread never needs the interpreter.

mod blocks;
mod config;
mod dlpack;
mod events;
mod grants;
mod hub;
mod pool;
mod registration;
mod transfer;
mod view;

use std::{sync::Arc, time::Instant};

use orchestra_memory::{BufferManager as Manager, ForeignMemory as _, PeerId, Pool, Quiet};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};

pub(crate) use self::{
    blocks::BlockSet,
    events::Chime,
    grants::{Grant, RemoteGrant},
    pool::BlockPool,
    registration::Registration,
    transfer::{MemoryTransfer, TransferOptions},
    view::BlockView,
};
use self::{
    config::{OpenConfig, PoolSettings},
    events::{EventRow, wait_until},
    hub::{Hub, seconds},
    registration::Lent,
};
use crate::{errors::Failure, values::config_from};

/// Registered memory, who may touch it, and what moves; driven by a thread of its own.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct BufferManager {
    hub: Arc<Hub>,
}

#[pymethods]
impl BufferManager {
    #[new]
    fn new(py: Python<'_>, config: &Bound<'_, PyDict>) -> PyResult<Self> {
        let config: OpenConfig = config_from(config)?;
        let hub = py.detach(|| {
            let (limits, transports) = (config.limits()?, config.open_transports()?);
            let manager = Manager::new(PeerId(hub::LOCAL), limits, transports);
            Hub::new(manager.map_err(config::issue)?, limits)
        })?;
        Ok(Self { hub: Arc::new(hub) })
    }

    fn create_pool(&self, py: Python<'_>, settings: &Bound<'_, PyDict>) -> PyResult<BlockPool> {
        let settings: PoolSettings = config_from(settings)?;
        let pool = py.detach(|| -> Result<Arc<Pool>, Failure> {
            let created = self.hub.manager()?.create_pool(settings.pool()?);
            let pool = created.map_err(config::issue)?;
            if let Some(defragmenter) = settings.defragmenter(&pool)? {
                self.hub.driver.defragment(defragmenter);
            }
            Ok(pool)
        })?;
        Ok(BlockPool::new(&self.hub, pool))
    }

    // === peers ===

    /// The transports' names, in the order in which they were given.
    #[getter]
    fn transports(&self) -> Vec<&'static str> {
        let transports = self.hub.driver.manager().transports();
        transports.iter().map(|one| one.name()).collect()
    }

    fn metadata<'py>(&self, py: Python<'py>, transport: &str) -> PyResult<Bound<'py, PyBytes>> {
        let metadata = py.detach(|| -> Result<_, Failure> {
            Ok(self.hub.manager()?.local_metadata(transport)?)
        })?;
        Ok(PyBytes::new(py, &metadata))
    }

    fn connect(
        &self,
        py: Python<'_>,
        peer: &str,
        transport: &str,
        metadata: &[u8],
    ) -> PyResult<()> {
        Ok(py.detach(|| self.hub.connect(peer, transport, metadata))?)
    }

    /// Whether it is proven that nothing of the peer's touches memory here any more.
    fn disconnect(&self, py: Python<'_>, peer: &str) -> PyResult<bool> {
        let quiet = py.detach(|| self.hub.disconnect(peer))?;
        Ok(quiet == Quiet::Proven)
    }

    fn confirm_gone(&self, py: Python<'_>, peer: &str) -> PyResult<()> {
        Ok(py.detach(|| self.hub.confirm_gone(peer))?)
    }

    // === grants and transfers ===

    fn grant(
        &self,
        py: Python<'_>,
        blocks: &BlockSet,
        to: &str,
        rights: &str,
        ttl_s: f64,
    ) -> PyResult<Grant> {
        Ok(py.detach(|| Grant::give(&self.hub, blocks, to, rights, ttl_s))?)
    }

    fn open_grant(&self, data: &[u8], owner: &str, age_s: f64) -> PyResult<RemoteGrant> {
        Ok(RemoteGrant::open(&self.hub, data, owner, age_s)?)
    }

    fn put(
        &self,
        py: Python<'_>,
        blocks: &BlockSet,
        grant: &RemoteGrant,
        options: &TransferOptions,
    ) -> PyResult<MemoryTransfer> {
        Ok(py.detach(|| MemoryTransfer::put(&self.hub, blocks, grant, options))?)
    }

    fn get(
        &self,
        py: Python<'_>,
        grant: &RemoteGrant,
        blocks: &BlockSet,
        options: &TransferOptions,
    ) -> PyResult<MemoryTransfer> {
        Ok(py.detach(|| MemoryTransfer::get(&self.hub, grant, blocks, options))?)
    }

    // === memory of others ===

    /// Registers the bytes of an object for transfers.
    fn register(&self, py: Python<'_>, memory: &Bound<'_, PyAny>) -> PyResult<Registration> {
        let lent = Lent::new(memory)?;
        Ok(py.detach(|| Registration::new(&self.hub, lent))?)
    }

    /// Ends the registrations of what overlaps the bytes of an object; how many there were.
    fn invalidate(&self, py: Python<'_>, memory: &Bound<'_, PyAny>) -> PyResult<usize> {
        let region = Lent::new(memory)?.region();
        Ok(py.detach(|| -> Result<_, Failure> { Ok(self.hub.manager()?.invalidate(region)) })?)
    }

    fn put_from(
        &self,
        py: Python<'_>,
        memory: &Registration,
        grant: &RemoteGrant,
        options: &TransferOptions,
    ) -> PyResult<MemoryTransfer> {
        Ok(py.detach(|| MemoryTransfer::put_from(&self.hub, memory, grant, options))?)
    }

    fn get_into(
        &self,
        py: Python<'_>,
        grant: &RemoteGrant,
        memory: &Registration,
        options: &TransferOptions,
    ) -> PyResult<MemoryTransfer> {
        Ok(py.detach(|| MemoryTransfer::get_into(&self.hub, grant, memory, options))?)
    }

    // === events ===

    /// The next event, or `None` where there is none now.
    fn take_event(&self) -> Option<EventRow> {
        let event = self.hub.driver.manager().take_event();
        event.map(|event| EventRow::new(event, &self.hub))
    }

    /// Has the chime rung when there are events; `True` where there are some, or where none will come any more.
    fn listen(&self, chime: &Chime) -> bool {
        self.hub.driver.listen(chime.inner())
    }

    /// Waits until there is an event, none will come any more, or the time is over.
    fn wait_event(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<()> {
        let deadline = timeout_s
            .map(|timeout| seconds("timeout", timeout))
            .transpose()?
            .map(|timeout| Instant::now() + timeout);
        let chime = orchestra_memory::Chime::new().map_err(Failure::from)?;
        let driver = &self.hub.driver;
        wait_until(py, &chime, deadline, || driver.listen(&chime)).map(drop)
    }

    // === state ===

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = self.hub.driver.manager().stats();
        hub::StatsRow::from(stats)
            .into_pyobject(py)
            .map(Bound::into_any)
    }

    #[getter]
    fn is_closed(&self) -> bool {
        self.hub.driver.is_closed()
    }

    /// Ends every transfer and every connection, and the thread. Again does nothing.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.hub.driver.close());
    }
}
