//! `orchestra_core::partition` for `orchestra.worker`.

use std::time::Duration;

use orchestra_core::partition::{LayerCost, MoveTerms, PartitionError, StageLoad, plan_move};
use pyo3::prelude::*;

use crate::errors::Failure;

impl From<PartitionError> for Failure {
    fn from(error: PartitionError) -> Self {
        Self::invalid(error.field(), error.to_string())
    }
}

/// The split, the period before and after in nanoseconds, and the bytes to bring over.
type PlannedMove = (Vec<usize>, u64, u64, u64);

/// How layers are to be divided among the stages of a pipeline, where moving them pays.
#[pyfunction]
pub(crate) fn plan_layer_move(
    layers: Vec<(u64, u64)>,
    stages: Vec<(usize, u64, u64, u64)>,
    terms: (u64, u64, u64, u64),
) -> PyResult<Option<PlannedMove>> {
    let layers: Vec<_> = layers
        .into_iter()
        .map(|(work, bytes)| LayerCost { work, bytes })
        .collect();
    let stages: Vec<_> = stages
        .into_iter()
        .map(|(num_layers, busy_ns, fixed_work, free_bytes)| StageLoad {
            num_layers,
            busy_ns,
            fixed_work,
            free_bytes,
        })
        .collect();
    let (steps_in_flight, bytes_per_second, horizon_s, gain_percent_min) = terms;
    let terms = MoveTerms {
        steps_in_flight,
        bytes_per_second,
        horizon: Duration::from_secs(horizon_s),
        gain_percent_min,
    };
    let planned = plan_move(&layers, &stages, &terms).map_err(Failure::from)?;
    Ok(planned.map(|it| (it.split, it.period_before_ns, it.period_after_ns, it.bytes)))
}
