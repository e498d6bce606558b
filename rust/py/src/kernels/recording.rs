//! Kernel calls that a thread notes instead of making them, to be made again and again without Python between them.
//!
//! What CUDA graphs are to a GPU: a decode step of a small model takes Python as long as it takes the kernels. Rows of a
//! tensor lie one behind the other, so calls noted for many rows serve for fewer of them too.

use std::cell::RefCell;

use pyo3::prelude::*;

use crate::errors::Failure;

/// A call for so many rows, at addresses that it knows.
type Call = Box<dyn Fn(usize) + Send + Sync>;

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

struct Recording {
    rows: usize,
    calls: Vec<Call>,
}

/// Makes a call for so many rows, without Python's lock; or, while this thread records, notes it.
pub(super) fn call_or_note(
    py: Python<'_>,
    rows: usize,
    call: impl Fn(usize) + Send + Sync + 'static,
) -> PyResult<()> {
    RECORDING.with_borrow_mut(|recording| match recording {
        None => {
            py.detach(|| call(rows));
            Ok(())
        }
        Some(recording) if recording.rows == rows => {
            recording.calls.push(Box::new(call));
            Ok(())
        }
        Some(recording) => {
            let message = format!("rows: {rows}, while calls of {} are noted", recording.rows);
            Err(Failure::invalid("rows", message).into())
        }
    })
}

/// As `call_or_note`, of a kernel that knows its rows by itself; `rows` are those of a recording.
pub(super) fn call_or_note_prepared(
    py: Python<'_>,
    call: impl Fn() + Send + Sync + 'static,
) -> PyResult<()> {
    let rows = RECORDING.with_borrow(|recording| recording.as_ref().map_or(0, |it| it.rows));
    call_or_note(py, rows, move |_| call())
}

/// From now on this thread notes kernel calls.
#[pyfunction]
pub(crate) fn begin_recording(rows: usize) -> PyResult<()> {
    RECORDING.with_borrow_mut(|recording| {
        if recording.is_some() {
            let message = "rows: this thread records already";
            return Err(Failure::invalid("rows", message.to_owned()).into());
        }
        let calls = Vec::new();
        *recording = Some(Recording { rows, calls });
        Ok(())
    })
}

/// Ends that; what was noted is the program.
#[pyfunction]
pub(crate) fn end_recording() -> KernelProgram {
    let Recording { rows, calls } = RECORDING.take().unwrap_or(Recording {
        rows: 0,
        calls: Vec::new(),
    });
    KernelProgram { rows, calls }
}

/// Kernel calls, in the order in which they were noted.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct KernelProgram {
    rows: usize,
    calls: Vec<Call>,
}

#[pymethods]
impl KernelProgram {
    /// Makes the calls, for the first rows of their tensors.
    fn run(&self, py: Python<'_>, rows: usize) -> PyResult<()> {
        if rows > self.rows {
            let message = format!("rows: {rows}, the calls were noted for {}", self.rows);
            return Err(Failure::invalid("rows", message).into());
        }
        py.detach(|| self.calls.iter().for_each(|call| call(rows)));
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.calls.len()
    }
}
