//! `orchestra-kernels` for `orchestra.worker`: tensors come as the addresses and sizes that torch gives of them.

mod attention;
mod group;

use orchestra_core::{ErrorCode, config::ConfigIssue};
use orchestra_kernels::GroupError;

pub(crate) use self::{attention::PagedAttention, group::SharedGroup};
use crate::errors::Failure;

impl From<GroupError> for Failure {
    fn from(error: GroupError) -> Self {
        match (error.code(), error.key()) {
            (ErrorCode::InvalidConfig, Some(key)) => {
                Self::config(&[ConfigIssue::new(key, error.to_string())])
            }
            (ErrorCode::InvalidRequest, Some(key)) => Self::invalid(key, error.to_string()),
            (code, _) => Self::new(code, error.to_string()),
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
