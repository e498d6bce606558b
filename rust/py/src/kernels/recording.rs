//! Kernel calls that a thread notes instead of making them, to be made again and again without Python between them.
//!
//! What CUDA graphs are to a GPU. Rows of a tensor lie one behind the other, so calls noted for many rows serve for fewer of
//! them too.

use std::cell::RefCell;

use pyo3::prelude::*;

use crate::errors::Failure;

/// A call for so many rows, at addresses that it knows.
type Call = Box<dyn Fn(usize) -> Result<(), Failure> + Send + Sync>;

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

struct Recording {
    rows: usize,
    calls: Vec<Call>,
}

/// Makes a call for so many rows, without Python's lock; or, while this thread records, notes it.
pub(super) fn try_call_or_note(
    py: Python<'_>,
    rows: usize,
    call: impl Fn(usize) -> Result<(), Failure> + Send + Sync + 'static,
) -> PyResult<()> {
    RECORDING.with_borrow_mut(|recording| match recording {
        None => Ok(py.detach(|| call(rows))?),
        Some(recording) if recording.rows == rows => {
            recording.calls.push(Box::new(call));
            Ok(())
        }
        Some(recording) => Err(recording.refusal(rows).into()),
    })
}

/// As `try_call_or_note`, of a kernel that cannot fail.
pub(super) fn call_or_note(
    py: Python<'_>,
    rows: usize,
    call: impl Fn(usize) + Send + Sync + 'static,
) -> PyResult<()> {
    try_call_or_note(py, rows, move |rows| {
        call(rows);
        Ok(())
    })
}

/// As `call_or_note`, of a kernel that knows its rows by itself.
pub(super) fn call_or_note_prepared(
    py: Python<'_>,
    call: impl Fn() + Send + Sync + 'static,
) -> PyResult<()> {
    call_or_note(py, noted_rows().unwrap_or(0), move |_| call())
}

/// As `try_call_or_note`, of one that takes all numbers of the rows.
pub(super) fn try_call_or_note_shares(
    py: Python<'_>,
    numbers: usize,
    call: impl Fn(usize) -> Result<(), Failure> + Send + Sync + 'static,
) -> PyResult<()> {
    // Numbers that are not of so many rows are refused as rows.
    let rows = noted_rows().filter(|rows| *rows > 0 && numbers.is_multiple_of(*rows));
    let each = rows.map_or(1, |rows| numbers / rows);
    try_call_or_note(py, numbers / each.max(1), move |rows| call(rows * each))
}

/// Of which calls are noted, while this thread records.
fn noted_rows() -> Option<usize> {
    RECORDING.with_borrow(|recording| recording.as_ref().map(|it| it.rows))
}

impl Recording {
    fn refusal(&self, rows: usize) -> Failure {
        let message = format!("rows: {rows}, while calls of {} are noted", self.rows);
        Failure::invalid("rows", message)
    }
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
    /// Makes the calls, for the first rows of their tensors, up to one that fails.
    fn run(&self, py: Python<'_>, rows: usize) -> PyResult<()> {
        if rows > self.rows {
            let message = format!("rows: {rows}, the calls were noted for {}", self.rows);
            return Err(Failure::invalid("rows", message).into());
        }
        Ok(py.detach(|| self.calls.iter().try_for_each(|call| call(rows)))?)
    }

    fn __len__(&self) -> usize {
        self.calls.len()
    }
}
