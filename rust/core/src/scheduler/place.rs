//! Placing gangs: `num_gpus` GPUs of one domain, with memory on each.
//!
//! From two ends: narrow gangs take the first domain that fits, wide ones the tightest, from the last; in it the GPUs
//! with the least room that is enough, and there the tightest free run. Between the two ends long runs and whole
//! domains stay free: in domains of eight GPUs at 90 % memory load this rejects a third of what best fit does. `docs/placement.md` has the figures, also those where best fit is the better rule.
//!
//! Properties (tested): the GPUs of a placement are distinct and of one domain; memory is never given out twice; a
//! request is refused only if no domain has room for it, all memory of lower priority counted; victims are of lower
//! priority, and none is needless; a refusal changes nothing; releasing all leaves all memory free.

use std::cmp::Reverse;

use super::{
    Scheduler,
    error::SchedulerError,
    placement::{DomainMemory, GpuMemoryUse},
};
use crate::time::Time;

/// Priorities are 0 to 3; a gang may displace those of lower priority, and 0 displaces nobody.
pub(super) const NUM_PRIORITIES: usize = 4;

/// Names a registered GPU. Never used again once the GPU is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuId(pub(super) u32);

/// Names a placement. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlacementId(pub(super) u64);

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuSpec {
    /// Unique among the registered GPUs, 1 to 128 bytes.
    pub name: String,
    /// GPUs of one domain reach each other at full speed (an `NVSwitch` island). 1 to 128 bytes.
    pub domain: String,
    /// The machine that it is in. 1 to 128 bytes.
    pub node: String,
    /// Memory that may be given out, rounded down to whole extents; at least one.
    pub memory_bytes: u64,
}

/// How a gang's memory must lie on each GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// In one piece: weights, transfer windows.
    #[default]
    Contiguous,
    /// In any pieces of whole extents, one where possible and else as few as can be: paged KV.
    Paged,
}

/// A gang that wants memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlaceRequest {
    /// GPUs, all of one domain; at least 1.
    pub num_gpus: u32,
    /// Bytes on each, rounded up to whole extents; at least 1.
    pub bytes_per_gpu: u64,
    /// 0 to 3. What does not fit displaces placements of lower priority, those with the least to replay.
    pub priority: u8,
    /// How the memory must lie.
    pub layout: Layout,
    /// What losing this placement would cost, in any unit that all requests share: for instance tokens to replay
    /// times the time to prefill one.
    pub replay_cost: u64,
    /// When [`Scheduler::expire_placements`] releases it; never where `None`.
    pub expires_at: Option<Time>,
}

/// A contiguous piece of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset_bytes: u64,
    /// Bytes.
    pub length_bytes: u64,
}

/// One GPU of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedGpu {
    /// The GPU.
    pub gpu: GpuId,
    /// Its memory.
    pub extent: Extent,
}

/// Memory on a gang of GPUs, held until [`Scheduler::release_placement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its name.
    pub id: PlacementId,
    /// `num_gpus` GPUs of one domain, in order of registration. With [`Layout::Paged`] a GPU is named once for each
    /// of its pieces, by address.
    pub gpus: Vec<PlacedGpu>,
    /// The placements of lower priority that it displaced; their memory is gone.
    pub preempted: Vec<PlacementId>,
}

impl Scheduler {
    /// Registers a GPU, all of its memory free.
    pub fn add_gpu(&mut self, spec: GpuSpec) -> Result<GpuId, SchedulerError> {
        self.gpus.add(spec)
    }

    /// Forgets a GPU and every placement that it was part of; these are returned. `None` where it is not registered.
    pub fn remove_gpu(&mut self, id: GpuId) -> Option<Vec<PlacementId>> {
        self.gpus.remove(id)
    }

    /// Takes a GPU out of use until [`restore_gpu`](Self::restore_gpu) and releases every placement that it was part
    /// of; these are returned. `None` where it is not registered.
    pub fn fail_gpu(&mut self, id: GpuId) -> Option<Vec<PlacementId>> {
        self.gpus.fail(id)
    }

    /// Puts a failed GPU back into use, all of its memory free. `false` where it is not registered.
    pub fn restore_gpu(&mut self, id: GpuId) -> bool {
        self.gpus.restore(id)
    }

    /// A draining domain takes no new gangs and keeps those that it has; these are returned, to be moved or awaited.
    /// `None` where no GPU is of this domain.
    pub fn set_domain_draining(
        &mut self,
        domain: &str,
        is_draining: bool,
    ) -> Option<Vec<PlacementId>> {
        self.gpus.set_draining(domain, is_draining)
    }

    /// Finds and takes memory for a gang. On refusal nothing changes.
    pub fn place(&mut self, request: &PlaceRequest) -> Result<Placement, SchedulerError> {
        self.gpus.place(request)
    }

    /// Places gangs that arrived together: by priority, then the largest first, which packs better than the order
    /// of arrival. Answers are in the order of the requests; a refusal does not touch the others.
    pub fn place_batch(
        &mut self,
        requests: &[PlaceRequest],
    ) -> Vec<Result<Placement, SchedulerError>> {
        let mut order: Vec<usize> = (0..requests.len()).collect();
        order.sort_by_key(|&index| {
            let request = &requests[index];
            let bytes = u128::from(request.num_gpus) * u128::from(request.bytes_per_gpu);
            Reverse((request.priority, bytes))
        });
        let placed = order.into_iter().map(|i| (i, self.place(&requests[i])));
        let mut placed: Vec<_> = placed.collect();
        placed.sort_unstable_by_key(|(index, _)| *index);
        placed.into_iter().map(|(_, outcome)| outcome).collect()
    }

    /// What [`place`](Self::place) would take now, and whom it would displace. Takes nothing.
    pub fn preview_place(
        &self,
        request: &PlaceRequest,
    ) -> Result<(Vec<PlacedGpu>, Vec<PlacementId>), SchedulerError> {
        self.gpus.preview(request)
    }

    /// Refuses what [`place`](Self::place) would refuse. Takes nothing.
    pub(super) fn check_place(&self, request: &PlaceRequest) -> Result<(), SchedulerError> {
        self.gpus.preview(request).map(|_| ())
    }

    /// Gives a placement's memory back. `false` where it is gone already.
    pub fn release_placement(&mut self, id: PlacementId) -> bool {
        self.gpus.release(id)
    }

    /// Releases the placements whose time has come; these are returned, the first to expire first.
    pub fn expire_placements(&mut self, now: Time) -> Vec<PlacementId> {
        self.gpus.expire(now)
    }

    /// Moves a placement's expiry, or lifts it with `None`. `false` where the placement is gone.
    pub fn set_placement_expiry(&mut self, id: PlacementId, expires_at: Option<Time>) -> bool {
        self.gpus.set_expiry(id, expires_at)
    }

    /// Says what losing the placement would cost now. `false` where the placement is gone.
    pub fn set_replay_cost(&mut self, id: PlacementId, replay_cost: u64) -> bool {
        self.gpus.set_replay_cost(id, replay_cost)
    }

    /// How a GPU's memory is used, and how usable the rest is.
    pub fn gpu_memory(&self, id: GpuId) -> Option<GpuMemoryUse> {
        self.gpus.gpu_memory(id)
    }

    /// How a domain's memory is used, and how usable the rest is.
    pub fn domain_memory(&self, domain: &str) -> Option<DomainMemory> {
        self.gpus.domain_memory(domain)
    }

    /// The GPU of this name.
    pub fn gpu_by_name(&self, name: &str) -> Option<GpuId> {
        self.gpus.by_name(name)
    }

    /// What the GPU was registered as.
    pub fn gpu_spec(&self, id: GpuId) -> Option<&GpuSpec> {
        self.gpus.spec(id)
    }
}
