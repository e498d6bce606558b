//! The plans of rank 0 to the other ranks of its machine.

use std::time::Duration;

use orchestra_kernels::{RingConfig, RingReader, RingWriter};
use pyo3::{prelude::*, types::PyBytes};

use crate::errors::Failure;

/// Signals wait for a call to end.
const PATIENCE_MS_MAX: u32 = 500;

fn config(readers: usize, key: u64, message_bytes_max: usize) -> RingConfig {
    RingConfig {
        readers,
        key,
        message_bytes_max,
        ..RingConfig::default()
    }
}

/// The end of a ring of messages that writes.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct MessageRingWriter {
    inner: RingWriter,
}

#[pymethods]
impl MessageRingWriter {
    #[new]
    fn new(readers: usize, key: u64, message_bytes_max: usize) -> PyResult<Self> {
        let config = config(readers, key, message_bytes_max);
        let inner = RingWriter::create(config).map_err(Failure::from)?;
        Ok(Self { inner })
    }

    /// Where readers of this machine find the memory.
    #[getter]
    fn address(&self) -> String {
        self.inner.address()
    }

    /// Takes a reader in.
    fn admit(&self, reader: usize) -> PyResult<()> {
        Ok(self.inner.admit(reader).map_err(Failure::from)?)
    }

    /// Writes as much of a message as there is room for.
    #[pyo3(signature = (message, start = 0))]
    fn write(&self, message: &[u8], start: usize) -> PyResult<(usize, bool, Vec<usize>)> {
        let written = self.inner.write(message, start).map_err(Failure::from)?;
        Ok((written.upto, written.is_whole, written.sleepers))
    }

    /// Waits some milliseconds for room.
    fn await_room(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        let late = py.detach(|| self.inner.await_room());
        Ok(late.map_err(Failure::from)?)
    }
}

/// An end of a ring of messages that reads.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct MessageRingReader {
    inner: RingReader,
}

#[pymethods]
impl MessageRingReader {
    #[new]
    fn new(
        address: &str,
        reader: usize,
        readers: usize,
        key: u64,
        message_bytes_max: usize,
    ) -> PyResult<Self> {
        let config = config(readers, key, message_bytes_max);
        let inner = RingReader::open(config, address, reader).map_err(Failure::from)?;
        Ok(Self { inner })
    }

    /// The next message, where one comes soon.
    fn take<'py>(
        &self,
        py: Python<'py>,
        patience_ms: u32,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let patience = Duration::from_millis(u64::from(patience_ms.min(PATIENCE_MS_MAX)));
        let message = py.detach(|| self.inner.take(patience));
        let message = message.map_err(Failure::from)?;
        Ok(message.map(|message| PyBytes::new(py, &message)))
    }
}
