//! Whole replicas of a model as placement requests: how the weights are cut decides how many GPUs, and how much on each.
//!
//! A replica is a pipeline of `pipeline_parallel` stages. A stage has `tensor_parallel · expert_parallel` GPUs: each
//! expert-parallel rank holds the dense weights, cut by tensor parallelism, and its share of the experts. Weights are
//! one contiguous extent per GPU, so that they can be loaded and moved as one; KV is paged on the same GPUs. Packing
//! replicas is [`Scheduler::place_batch`](super::Scheduler::place_batch) over their requests: it places the largest
//! first, and models share a GPU where its memory holds both.

use super::{
    SchedulerError,
    place::{Layout, PlaceRequest, Shares},
};

/// The most GPUs that a stage can have: those of the largest domain.
const STAGE_GPUS_MAX: u32 = 128;

/// How a replica of a model is cut, and what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaShape {
    /// GPUs that share each matrix; at least 1.
    pub tensor_parallel: u32,
    /// Stages that the layers are spread over; 1 to 64.
    pub pipeline_parallel: u32,
    /// Groups that the experts are spread over, 1 for a model without; a stage has at most 128 GPUs.
    pub expert_parallel: u32,
    /// Weights outside the experts, of the whole model.
    pub dense_weight_bytes: u64,
    /// Weights of all experts; 0 for a model without.
    pub expert_weight_bytes: u64,
    /// KV cache on each GPU.
    pub kv_bytes_per_gpu: u64,
    /// What each GPU needs of its node and domain.
    pub shares_per_gpu: Shares,
}

impl Default for ReplicaShape {
    fn default() -> Self {
        Self {
            tensor_parallel: 1,
            pipeline_parallel: 1,
            expert_parallel: 1,
            dense_weight_bytes: 0,
            expert_weight_bytes: 0,
            kv_bytes_per_gpu: 0,
            shares_per_gpu: Shares::default(),
        }
    }
}

impl ReplicaShape {
    /// What [`Scheduler::place`](super::Scheduler::place) takes for one replica. Priority, replay cost and expiry are
    /// the defaults.
    pub fn request(&self) -> Result<PlaceRequest, SchedulerError> {
        let ways = [
            ("tensor_parallel", self.tensor_parallel),
            ("pipeline_parallel", self.pipeline_parallel),
            ("expert_parallel", self.expert_parallel),
        ];
        if let Some(&(field, _)) = ways.iter().find(|(_, ways)| *ways == 0) {
            let expected = "at least 1";
            return Err(SchedulerError::InvalidField { field, expected });
        }
        let num_gpus = self.tensor_parallel.checked_mul(self.expert_parallel);
        let Some(num_gpus) = num_gpus.filter(|&num| num <= STAGE_GPUS_MAX) else {
            return Err(SchedulerError::InvalidField {
                field: "expert_parallel",
                expected: "at most 128 / tensor_parallel",
            });
        };
        let dense_ways = u64::from(self.tensor_parallel) * u64::from(self.pipeline_parallel);
        let expert_ways = u64::from(num_gpus) * u64::from(self.pipeline_parallel);
        let dense = self.dense_weight_bytes.div_ceil(dense_ways);
        let experts = self.expert_weight_bytes.div_ceil(expert_ways);
        Ok(PlaceRequest {
            num_gpus,
            num_stages: self.pipeline_parallel,
            bytes_per_gpu: dense.saturating_add(experts),
            layout: Layout::Contiguous,
            paged_bytes_per_gpu: self.kv_bytes_per_gpu,
            shares_per_gpu: self.shares_per_gpu,
            ..PlaceRequest::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_cut_by_every_way_that_holds_them() {
        let shape = ReplicaShape {
            tensor_parallel: 2,
            pipeline_parallel: 3,
            expert_parallel: 4,
            dense_weight_bytes: 601,
            expert_weight_bytes: 2400,
            kv_bytes_per_gpu: 50,
            ..ReplicaShape::default()
        };
        let request = shape.request().unwrap();
        assert_eq!((request.num_gpus, request.num_stages), (8, 3));
        assert_eq!(
            (request.bytes_per_gpu, request.paged_bytes_per_gpu),
            (101 + 100, 50)
        );
    }

    #[test]
    fn a_shape_that_no_domain_can_hold_names_its_field() {
        let shape = |tensor_parallel, expert_parallel| ReplicaShape {
            tensor_parallel,
            expert_parallel,
            ..ReplicaShape::default()
        };
        let field = |shape: ReplicaShape| match shape.request() {
            Err(SchedulerError::InvalidField { field, .. }) => Some(field),
            _ => None,
        };
        assert_eq!(field(shape(0, 1)), Some("tensor_parallel"));
        assert_eq!(field(shape(8, 16)), None);
        assert_eq!(field(shape(8, 17)), Some("expert_parallel"));
        assert_eq!(field(shape(u32::MAX, u32::MAX)), Some("expert_parallel"));
    }
}
