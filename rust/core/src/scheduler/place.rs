//! Placing gangs: `num_gpus` GPUs of one domain, with memory on each; for a pipeline one such gang per stage.
//!
//! From two ends: narrow gangs take the first domain that fits, wide ones the tightest, from the last; in it the GPUs
//! with the least room that is enough, and there the tightest free run. Between the two ends long runs and whole
//! domains stay free: in domains of eight GPUs at 90 % memory load this rejects a third of what best fit does. `docs/placement.md` has the figures, also those where best fit is the better rule.
//!
//! Properties (tested): the GPUs of a placement are distinct, those of one stage of one domain; memory is never given
//! out twice, nor are shares of nodes and domains; a request is refused only if there is no room for it, all memory of
//! lower priority counted; victims are of lower priority, and none is needless; a refusal changes nothing; releasing all
//! leaves all memory free.

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
    /// Domains of one rack are nearer to each other than to others: a pipeline that needs several stays in as few
    /// racks as can be. The same for all GPUs of a domain; 1 to 128 bytes where given.
    pub rack: Option<String>,
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

/// What a gang takes, for each of its GPUs, of things that GPUs share. 0 takes none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// Of the node's cores, thousandths of a core.
    pub cpu_milli: u64,
    /// Of the node's memory.
    pub host_memory_bytes: u64,
    /// Of the node's network, megabits per second.
    pub nic_mbps: u64,
    /// Of the domain's power, watts.
    pub power_watts: u64,
}

/// What the GPUs of a node share. 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeLimits {
    /// Cores, in thousandths.
    pub cpu_milli: u64,
    /// Memory.
    pub host_memory_bytes: u64,
    /// Network, megabits per second.
    pub nic_mbps: u64,
}

/// A gang that wants memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceRequest {
    /// GPUs of each stage, all of one domain; at least 1.
    pub num_gpus: u32,
    /// Stages of a pipeline, each with `num_gpus` GPUs of its own: in one domain where they all fit, else neighbours
    /// as close as can be. 1 to 64; 1, the default, is a gang of one domain.
    pub num_stages: u32,
    /// Bytes on each, rounded up to whole extents; at least 1.
    pub bytes_per_gpu: u64,
    /// 0 to 3. What does not fit displaces placements of lower priority, those with the least to replay.
    pub priority: u8,
    /// How the memory must lie.
    pub layout: Layout,
    /// Bytes on the same GPUs besides, in any pieces of whole extents: the KV of a replica beside its weights.
    pub paged_bytes_per_gpu: u64,
    /// What each GPU needs of its node and domain.
    pub shares_per_gpu: Shares,
    /// What losing this placement would cost, in any unit that all requests share: for instance tokens to replay
    /// times the time to prefill one.
    pub replay_cost: u64,
    /// When [`Scheduler::expire_placements`] releases it; never where `None`.
    pub expires_at: Option<Time>,
}

impl Default for PlaceRequest {
    fn default() -> Self {
        Self {
            num_gpus: 0,
            num_stages: 1,
            bytes_per_gpu: 0,
            priority: 0,
            layout: Layout::default(),
            paged_bytes_per_gpu: 0,
            shares_per_gpu: Shares::default(),
            replay_cost: 0,
            expires_at: None,
        }
    }
}

/// A contiguous piece of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset_bytes: u64,
    /// Bytes.
    pub length_bytes: u64,
}

/// One GPU of a placement, or one of its pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedGpu {
    /// The GPU.
    pub gpu: GpuId,
    /// The stage that it belongs to, from 0.
    pub stage: u32,
    /// Its memory.
    pub extent: Extent,
    /// What the memory is: `bytes_per_gpu` in one piece, or a piece of what may lie anywhere.
    pub layout: Layout,
}

/// Memory on a gang of GPUs, held until [`Scheduler::release_placement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its name.
    pub id: PlacementId,
    /// `num_gpus` GPUs of one domain for each stage, by stage and then in order of registration. A GPU is named once
    /// for each of its pieces, by address: once where all is contiguous.
    pub gpus: Vec<PlacedGpu>,
    /// The placements of lower priority that it displaced; their memory is gone.
    pub preempted: Vec<PlacementId>,
}

impl PlaceRequest {
    /// Memory of all its GPUs together, before rounding.
    fn bytes(&self) -> u128 {
        let num_gpus = u128::from(self.num_gpus) * u128::from(self.num_stages);
        num_gpus * (u128::from(self.bytes_per_gpu) + u128::from(self.paged_bytes_per_gpu))
    }
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

    /// Limits what the GPUs of a node share: of more than the limits nothing is given out, and what is held stays.
    /// Limits go with the node's last GPU. Refused where the node's GPUs are of several domains.
    pub fn set_node_limits(
        &mut self,
        node: &str,
        limits: &NodeLimits,
    ) -> Result<(), SchedulerError> {
        self.gpus.set_node_limits(node, limits)
    }

    /// Limits the power that the GPUs of a domain share, in watts; 0 is no limit. `false` where no GPU is of this
    /// domain.
    pub fn set_domain_power(&mut self, domain: &str, watts: u64) -> bool {
        self.gpus.set_domain_power(domain, watts)
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
            Reverse((request.priority, request.bytes()))
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
