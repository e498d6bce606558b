//! `orchestra-kernels` for `orchestra.worker`: tensors come as the addresses and sizes that torch gives of them.

#![expect(
    unsafe_code,
    reason = "sees the memory of tensors, whose addresses Python gives"
)]

mod attention;
mod experts;
mod group;
mod linear;
mod recording;
mod ring;
mod rows;

use std::{ptr::NonNull, slice};

use orchestra_core::{ErrorCode, config::ConfigIssue};
use orchestra_kernels::{GroupError, LinearError, RingError};
use pyo3::prelude::*;

pub(crate) use self::{
    attention::PagedAttention,
    experts::{ExpertRouter, Experts},
    group::SharedGroup,
    linear::Linear,
    recording::{KernelProgram, begin_recording, end_recording},
    ring::{MessageRingReader, MessageRingWriter},
    rows::{add, candidates, draw, gate, likeliest_of, look_up, mix, rms_norm, rotate, softmax},
};
use crate::errors::Failure;

/// Keeps the threads that compute on some cores.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "what a list becomes")]
pub(crate) fn bind_threads(cores: Vec<usize>, threads: u32) -> PyResult<()> {
    let bound = orchestra_kernels::pool::bind(threads, &cores);
    Ok(bound.map_err(|error| Failure::new(ErrorCode::Internal, error.to_string()))?)
}

impl From<GroupError> for Failure {
    fn from(error: GroupError) -> Self {
        failure(error.code(), error.key(), error.to_string())
    }
}

impl From<RingError> for Failure {
    fn from(error: RingError) -> Self {
        failure(error.code(), error.key(), error.to_string())
    }
}

fn failure(code: ErrorCode, key: Option<&str>, message: String) -> Failure {
    match (code, key) {
        (ErrorCode::InvalidConfig, Some(key)) => Failure::config(&[ConfigIssue::new(key, message)]),
        (ErrorCode::InvalidRequest, Some(key)) => Failure::invalid(key, message),
        (code, _) => Failure::new(code, message),
    }
}

impl From<LinearError> for Failure {
    fn from(error: LinearError) -> Self {
        match error {
            LinearError::InvalidShape { field, .. } => Self::invalid(field, error.to_string()),
            LinearError::NoMemory { .. } => Self::new(ErrorCode::Internal, error.to_string()),
        }
    }
}

/// The numbers of a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    Float32,
    Bfloat16,
}

impl Dtype {
    /// From torch's name.
    pub(crate) fn read(name: &str) -> Result<Self, Failure> {
        match name {
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::Bfloat16),
            _ => {
                let message = format!("dtype: {name} is neither float32 nor bfloat16");
                Err(Failure::invalid("dtype", message))
            }
        }
    }
}

/// Calls a generic, unsafe function of tensors with the kind of number that a dtype is.
macro_rules! with_numbers {
    ($dtype:expr, $call:ident($($argument:expr),*)) => {
        match $dtype {
            // SAFETY: the caller says that tensors of these shapes lie there, and leaves them alone until the call
            // returns: the contract of `_core.pyi`.
            Dtype::Float32 => unsafe { $call::<f32>($($argument),*) },
            // SAFETY: as above.
            Dtype::Bfloat16 => unsafe { $call::<u16>($($argument),*) },
        }
    };
}
pub(crate) use with_numbers;

/// The numbers of a tensor; none where there are none, whatever its address is.
///
/// # Safety
/// There are so many at the address, aligned, which nobody else reads or writes while the slice lives.
pub(crate) unsafe fn view<'a, T>(address: usize, count: usize) -> &'a mut [T] {
    let Some(start) = NonNull::new(address as *mut T).filter(|_| count > 0) else {
        return &mut [];
    };
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts_mut(start.as_ptr(), count) }
}
