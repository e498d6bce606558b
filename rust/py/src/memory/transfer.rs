//! Transfers under way.

use std::{ops::Range, sync::Arc, time::Instant};

use orchestra_memory::{
    self as memory, Chime as Bell, MemoryError, RegistrationGuard, TransferResult, TransferStats,
};
use pyo3::prelude::*;

use super::{
    blocks::BlockSet,
    events::{Chime, wait_until},
    grants::RemoteGrant,
    hub::{Hub, seconds},
    registration::Registration,
};
use crate::errors::Failure;

/// The number of the only wait of a chime that waits for one transfer.
const THE_END: u64 = 1;

/// A notification that nobody asked for.
const EMPTY: &[u8] = b"";

/// How a transfer is made; may be used again.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct TransferOptions {
    /// The first local block, and how many; all from there on where `None`.
    start: usize,
    count: Option<usize>,
    options: memory::TransferOptions,
}

#[pymethods]
impl TransferOptions {
    #[new]
    #[pyo3(
        signature = (
            *, notify = EMPTY, timeout = 5.0, start = 0, count = None, first = 0, part = None, ends_grant = true
        ),
        text_signature = "(*, notify=b\"\", timeout=5.0, start=0, count=None, first=0, part=None, ends_grant=True)"
    )]
    #[expect(
        clippy::too_many_arguments,
        reason = "a transfer's options, by keyword"
    )]
    fn new(
        notify: &[u8],
        timeout: f64,
        start: usize,
        count: Option<usize>,
        first: usize,
        part: Option<(u64, u64)>,
        ends_grant: bool,
    ) -> PyResult<Self> {
        let options = memory::TransferOptions {
            timeout: seconds("timeout", timeout)?,
            part: part.map(|(start, end)| Range { start, end }),
            first,
            payload: notify.to_vec(),
            ends_grant,
        };
        Ok(Self {
            start,
            count,
            options,
        })
    }
}

/// A transfer. It is given up when the last reference to it goes before its end.
#[pyclass(frozen, name = "Transfer", module = "orchestra._core")]
pub(crate) struct MemoryTransfer {
    hub: Arc<Hub>,
    transfer: memory::Transfer,
}

/// What a transfer did, as a dictionary.
#[derive(IntoPyObject)]
struct TransferRow {
    blocks: usize,
    bytes: u64,
    descriptors: usize,
    seconds: f64,
}

impl From<TransferStats> for TransferRow {
    fn from(stats: TransferStats) -> Self {
        let TransferStats {
            blocks,
            bytes,
            segments,
            took,
        } = stats;
        Self {
            blocks,
            bytes,
            descriptors: segments,
            seconds: took.as_secs_f64(),
        }
    }
}

/// The names that callers have for what the manager refuses.
fn renamed(refused: MemoryError) -> Failure {
    match refused {
        MemoryError::InvalidField {
            field: "payload",
            expected,
        } => Failure::invalid("notify", format!("notify must be {expected}")),
        refused => refused.into(),
    }
}

impl MemoryTransfer {
    pub(super) fn put(
        hub: &Arc<Hub>,
        blocks: &BlockSet,
        grant: &RemoteGrant,
        options: &TransferOptions,
    ) -> Result<Self, Failure> {
        let (manager, handles) = prepare(hub, blocks, grant, options)?;
        let (options, now) = (&options.options, hub.driver.now());
        let put = manager.put(blocks.pool(), &handles, grant.grant(), options, now);
        Ok(Self::started(hub, put.map_err(renamed)?))
    }

    pub(super) fn get(
        hub: &Arc<Hub>,
        grant: &RemoteGrant,
        blocks: &BlockSet,
        options: &TransferOptions,
    ) -> Result<Self, Failure> {
        let (manager, handles) = prepare(hub, blocks, grant, options)?;
        let (options, now) = (&options.options, hub.driver.now());
        let get = manager.get(grant.grant(), blocks.pool(), &handles, options, now);
        Ok(Self::started(hub, get.map_err(renamed)?))
    }

    pub(super) fn put_from(
        hub: &Arc<Hub>,
        memory: &Registration,
        grant: &RemoteGrant,
        options: &TransferOptions,
    ) -> Result<Self, Failure> {
        let (manager, guard, blocks) = prepare_foreign(hub, memory, grant, options)?;
        let (options, now) = (&options.options, hub.driver.now());
        let put = manager.put_from(&guard, blocks, grant.grant(), options, now);
        Ok(Self::started(hub, put.map_err(renamed)?))
    }

    pub(super) fn get_into(
        hub: &Arc<Hub>,
        grant: &RemoteGrant,
        memory: &Registration,
        options: &TransferOptions,
    ) -> Result<Self, Failure> {
        let (manager, guard, blocks) = prepare_foreign(hub, memory, grant, options)?;
        let (options, now) = (&options.options, hub.driver.now());
        let get = manager.get_into(grant.grant(), &guard, blocks, options, now);
        Ok(Self::started(hub, get.map_err(renamed)?))
    }

    fn started(hub: &Arc<Hub>, transfer: memory::Transfer) -> Self {
        hub.driver.ring();
        Self {
            hub: Arc::clone(hub),
            transfer,
        }
    }

    fn give_up(&self) {
        if self.transfer.result().is_none() {
            self.transfer.abort();
            self.hub.driver.ring();
        }
    }
}

/// What both directions check and look up first.
fn prepare<'a>(
    hub: &'a Arc<Hub>,
    blocks: &BlockSet,
    grant: &RemoteGrant,
    options: &TransferOptions,
) -> Result<(&'a memory::BufferManager, Vec<memory::BlockHandle>), Failure> {
    let manager = hub.manager()?;
    blocks.check_hub(hub)?;
    grant.check_hub(hub)?;
    Ok((manager, blocks.handles(options.start, options.count)?))
}

/// The same for memory that Python code has made: the numbers of its blocks.
fn prepare_foreign<'a>(
    hub: &'a Arc<Hub>,
    memory: &Registration,
    grant: &RemoteGrant,
    options: &TransferOptions,
) -> Result<
    (
        &'a memory::BufferManager,
        Arc<RegistrationGuard>,
        Range<usize>,
    ),
    Failure,
> {
    let manager = hub.manager()?;
    memory.check_hub(hub)?;
    grant.check_hub(hub)?;
    let guard = memory.guard()?;
    let all = (guard.region().len / grant.grant().block_bytes.max(1)) as usize;
    let end = options
        .count
        .map_or(Some(all), |count| options.start.checked_add(count));
    // One that is too large is refused with the others that are.
    let blocks = options.start..end.unwrap_or(usize::MAX);
    Ok((manager, guard, blocks))
}

impl Drop for MemoryTransfer {
    fn drop(&mut self) {
        self.give_up();
    }
}

#[pymethods]
impl MemoryTransfer {
    #[getter]
    fn is_over(&self) -> bool {
        self.transfer.result().is_some()
    }

    /// Has the wait of this number of a chime ended when it is over; `True` where it is.
    fn wake(&self, chime: &Chime, number: u64) -> bool {
        self.transfer.wake(&chime.inner().waker(number))
    }

    /// Waits for the end; `False` where it did not come in time.
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let deadline = timeout_s
            .map(|timeout| seconds("timeout", timeout))
            .transpose()?
            .map(|timeout| Instant::now() + timeout);
        let chime = Bell::new().map_err(Failure::from)?;
        let waker = chime.waker(THE_END);
        wait_until(py, &chime, deadline, || self.transfer.wake(&waker))
    }

    /// What it did, or the exception for how it failed; `None` while it is not over.
    fn result(&self) -> PyResult<Option<TransferRow>> {
        let result: Option<TransferResult> = self.transfer.result();
        let row = result.map(|result| result.map(TransferRow::from));
        Ok(row.transpose().map_err(Failure::from)?)
    }

    /// Gives it up. It ends a moment later; bytes may still move, and blocks wait for proof that none do.
    fn abort(&self) {
        self.give_up();
    }
}
