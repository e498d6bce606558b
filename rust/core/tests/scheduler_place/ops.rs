//! Random operations on GPUs and gangs, and how the pair of scheduler and model plays them.

use orchestra_core::{
    Time,
    scheduler::{Layout, NodeLimits, PlaceRequest, Shares},
};
use proptest::prelude::*;

use crate::model::{EXTENT, NUM_DOMAINS, Pair};

#[derive(Clone, Debug)]
pub(crate) enum Op {
    AddGpu {
        domain: usize,
        node: usize,
        extents: u64,
    },
    RemoveGpu(usize),
    FailGpu(usize),
    RestoreGpu(usize),
    Drain {
        domain: usize,
        is_draining: bool,
    },
    LimitNode {
        domain: usize,
        node: usize,
        limits: NodeLimits,
    },
    LimitPower {
        domain: usize,
        watts: u64,
    },
    Place(PlaceRequest),
    PlaceBatch(Vec<PlaceRequest>),
    Release(usize),
    SetExpiry(usize, Option<u64>),
    Expire(u64),
}

fn shares() -> impl Strategy<Value = Shares> {
    let some = (0_u64..4, 0_u64..4, 0_u64..4, 0_u64..4);
    let some = some.prop_map(
        |(cpu_milli, host_memory_bytes, nic_mbps, power_watts)| Shares {
            cpu_milli,
            host_memory_bytes,
            nic_mbps,
            power_watts,
        },
    );
    prop_oneof![3 => Just(Shares::default()), 1 => some]
}

fn request() -> impl Strategy<Value = PlaceRequest> {
    let sizes = (1_u32..6, 1_u64..10 * EXTENT, stages(), paged_bytes());
    let layout = prop_oneof![Just(Layout::Contiguous), Just(Layout::Paged)];
    let expires_at = prop::option::of((0_u64..100).prop_map(Time));
    (sizes, 0_u8..4, layout, 0_u64..50, expires_at, shares()).prop_map(
        |(sizes, priority, layout, replay_cost, expires_at, shares_per_gpu)| {
            let (num_gpus, bytes_per_gpu, num_stages, paged_bytes_per_gpu) = sizes;
            PlaceRequest {
                num_gpus,
                num_stages,
                bytes_per_gpu,
                priority,
                layout,
                paged_bytes_per_gpu,
                shares_per_gpu,
                replay_cost,
                expires_at,
            }
        },
    )
}

fn stages() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(1), 1 => 2_u32..6]
}

fn paged_bytes() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0), 1 => 1..8 * EXTENT]
}

fn limits() -> impl Strategy<Value = NodeLimits> {
    (0_u64..12, 0_u64..12, 0_u64..12).prop_map(|(cpu_milli, host_memory_bytes, nic_mbps)| {
        NodeLimits {
            cpu_milli,
            host_memory_bytes,
            nic_mbps,
        }
    })
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let domain = || 0..NUM_DOMAINS;
    prop_oneof![
        8 => (domain(), 0_usize..2, 1_u64..24)
            .prop_map(|(domain, node, extents)| Op::AddGpu { domain, node, extents }),
        1 => (0_usize..100).prop_map(Op::RemoveGpu),
        1 => (0_usize..100).prop_map(Op::FailGpu),
        1 => (0_usize..100).prop_map(Op::RestoreGpu),
        2 => (domain(), prop::bool::weighted(0.3))
            .prop_map(|(domain, is_draining)| Op::Drain { domain, is_draining }),
        2 => (domain(), 0_usize..2, limits())
            .prop_map(|(domain, node, limits)| Op::LimitNode { domain, node, limits }),
        1 => (domain(), 0_u64..12).prop_map(|(domain, watts)| Op::LimitPower { domain, watts }),
        20 => request().prop_map(Op::Place),
        1 => prop::collection::vec(request(), 0..5).prop_map(Op::PlaceBatch),
        6 => (0_usize..100).prop_map(Op::Release),
        1 => (0_usize..100, prop::option::of(0_u64..100))
            .prop_map(|(pick, at)| Op::SetExpiry(pick, at)),
        1 => (0_u64..100).prop_map(Op::Expire),
    ]
}

impl Pair {
    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::AddGpu {
                domain,
                node,
                extents,
            } => self.add_gpu(domain, node, extents),
            Op::RemoveGpu(pick) | Op::FailGpu(pick) => {
                if let Some(index) = self.pick_gpu(pick) {
                    self.lose_gpu(index, matches!(op, Op::RemoveGpu(_)));
                }
            }
            Op::RestoreGpu(pick) => {
                if let Some(index) = self.pick_gpu(pick) {
                    self.restore_gpu(index);
                }
            }
            Op::Drain {
                domain,
                is_draining,
            } => self.drain(domain, is_draining),
            Op::LimitNode {
                domain,
                node,
                ref limits,
            } => self.limit_node(domain, node, limits),
            Op::LimitPower { domain, watts } => self.limit_power(domain, watts),
            Op::Place(ref request) => self.place(request),
            Op::PlaceBatch(ref requests) => self.place_batch(requests),
            Op::Release(pick) => self.release(pick),
            Op::SetExpiry(pick, at) => self.set_expiry(pick, at.map(Time)),
            Op::Expire(now) => self.expire(Time(now)),
        }
    }
}
