//! The registered GPUs, their memory, and what is placed on them.
//!
//! [`registry`] adds and removes GPUs and says which may be used, [`find`] chooses a gang, [`stages`] the domains of a
//! pipeline, [`preempt`] whom they displace; [`refuse`] says why not, this file commits and releases. [`eligible`] is the
//! index that all of them keep current, [`shares`] counts what GPUs share.

mod classes;
mod eligible;
mod find;
mod fragmentation;
mod integrity;
mod memory;
mod preempt;
mod refuse;
mod registry;
mod shares;
mod stages;

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

pub use self::fragmentation::{DomainMemory, GpuMemoryUse};
use self::{
    classes::SizeClasses,
    eligible::{EligibleDomains, Shape},
    find::Gang,
    fragmentation::SizeMix,
    memory::{GpuMemory, Piece, Rooms},
    registry::{Domain, Gpu},
    shares::Node,
};
use super::{
    SchedulerConfig,
    error::SchedulerError,
    place::{
        Extent, GpuId, Layout, NUM_PRIORITIES, PlaceRequest, PlacedGpu, Placement, PlacementId,
        Shares,
    },
};
use crate::time::Time;

/// A live placement.
#[derive(Debug)]
struct Held {
    /// The slots of its GPUs, each once, by stage.
    slots: Vec<u32>,
    /// GPUs of one stage.
    num_gpus: u32,
    /// Of each GPU.
    shares: Shares,
    priority: u8,
    replay_cost: u64,
    expires_at: Option<Time>,
}

/// All registered GPUs and what is placed on them.
#[derive(Debug)]
pub(super) struct GpuPool {
    extent_bytes: u64,
    max_num_gpus: u32,
    max_num_placements: u32,
    classes: SizeClasses,
    /// By slot; those of removed GPUs are used again.
    gpus: Vec<Option<Gpu>>,
    free_gpu_slots: BTreeSet<u32>,
    gpu_ids: FxHashMap<GpuId, u32>,
    gpu_names: FxHashMap<String, GpuId>,
    num_registered: u32,
    /// In order of registration, which is the address order of first fit; `None` where all GPUs of one were removed.
    domains: Vec<Option<Domain>>,
    free_domain_slots: BTreeSet<u32>,
    domain_names: FxHashMap<String, u32>,
    nodes: Vec<Option<Node>>,
    free_node_slots: BTreeSet<u32>,
    node_names: FxHashMap<String, u32>,
    index_shape: Shape,
    /// GPU slots: `[domain][member]` in the shape of the index; stale where there is no member.
    member_slots: Vec<u32>,
    /// By longest run that a request of each priority could take.
    by_run: [EligibleDomains; NUM_PRIORITIES],
    /// By all memory that a request of each priority could take.
    by_total: [EligibleDomains; NUM_PRIORITIES],
    /// By memory, taken or not, of GPUs in any state.
    by_capacity: EligibleDomains,
    held: FxHashMap<PlacementId, Held>,
    expiries: BTreeSet<(Time, PlacementId)>,
    num_placed: u64,
    asked: SizeMix,
}

impl GpuPool {
    pub(super) fn new(config: &SchedulerConfig) -> Self {
        Self {
            extent_bytes: config.extent_bytes,
            max_num_gpus: config.max_num_gpus,
            max_num_placements: config.max_num_reservations,
            classes: SizeClasses::new(),
            gpus: Vec::new(),
            free_gpu_slots: BTreeSet::new(),
            gpu_ids: FxHashMap::default(),
            gpu_names: FxHashMap::default(),
            num_registered: 0,
            domains: Vec::new(),
            free_domain_slots: BTreeSet::new(),
            domain_names: FxHashMap::default(),
            nodes: Vec::new(),
            free_node_slots: BTreeSet::new(),
            node_names: FxHashMap::default(),
            index_shape: Shape::default(),
            member_slots: Vec::new(),
            by_run: Default::default(),
            by_total: Default::default(),
            by_capacity: EligibleDomains::default(),
            held: FxHashMap::default(),
            expiries: BTreeSet::new(),
            num_placed: 0,
            asked: SizeMix::default(),
        }
    }

    /// Chooses a gang and takes its memory; those that it displaces lose theirs.
    pub(super) fn place(&mut self, request: &PlaceRequest) -> Result<Placement, SchedulerError> {
        let gang = self.choose(request)?;
        let limit = self.max_num_placements;
        if self.held.len() - gang.victims.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "placements",
                current: limit,
                limit,
            });
        }
        if request.layout == Layout::Contiguous {
            let units = request.bytes_per_gpu.div_ceil(self.extent_bytes);
            self.asked.add(units as u32, &self.classes);
        }
        Ok(self.commit(gang, request))
    }

    fn commit(&mut self, gang: Gang, request: &PlaceRequest) -> Placement {
        for &victim in &gang.victims {
            self.release(victim);
        }
        self.num_placed += 1;
        let id = PlacementId(self.num_placed);
        let gpus = self.extents(&gang);
        for pick in &gang.picks {
            if let Some(gpu) = self.gpus[pick.gpu as usize].as_mut() {
                gpu.memory.insert(Piece {
                    offset: pick.offset,
                    length: pick.length,
                    priority: request.priority,
                    placement: id,
                });
            }
        }
        // By stage and GPU, so that the pieces of one GPU are neighbours.
        let mut slots: Vec<u32> = gang.picks.iter().map(|pick| pick.gpu).collect();
        slots.dedup();
        for &slot in &slots {
            self.refresh(slot);
            self.book_shares(slot, &request.shares_per_gpu, true);
        }
        if let Some(at) = request.expires_at {
            self.expiries.insert((at, id));
        }
        let held = Held {
            slots,
            num_gpus: request.num_gpus,
            shares: request.shares_per_gpu,
            priority: request.priority,
            replay_cost: request.replay_cost,
            expires_at: request.expires_at,
        };
        self.held.insert(id, held);
        Placement {
            id,
            gpus,
            preempted: gang.victims,
        }
    }

    /// The gang's pieces as bytes.
    fn extents(&self, gang: &Gang) -> Vec<PlacedGpu> {
        let bytes = |units: u32| u64::from(units) * self.extent_bytes;
        let placed = gang.picks.iter().map(|pick| PlacedGpu {
            gpu: pick.id,
            stage: pick.stage,
            extent: Extent {
                offset_bytes: bytes(pick.offset),
                length_bytes: bytes(pick.length),
            },
            layout: pick.layout,
        });
        placed.collect()
    }

    /// What [`place`](Self::place) would take and displace now.
    pub(super) fn preview(
        &self,
        request: &PlaceRequest,
    ) -> Result<(Vec<PlacedGpu>, Vec<PlacementId>), SchedulerError> {
        let gang = self.choose(request)?;
        Ok((self.extents(&gang), gang.victims))
    }

    pub(super) fn release(&mut self, id: PlacementId) -> bool {
        let Some(held) = self.held.remove(&id) else {
            return false;
        };
        if let Some(at) = held.expires_at {
            self.expiries.remove(&(at, id));
        }
        for slot in held.slots {
            if let Some(gpu) = self.gpus[slot as usize].as_mut() {
                gpu.memory.remove(id);
            }
            self.refresh(slot);
            self.book_shares(slot, &held.shares, false);
        }
        true
    }

    /// Sets or lifts the time at which the placement is released unasked. `false` where it is gone.
    pub(super) fn set_expiry(&mut self, id: PlacementId, expires_at: Option<Time>) -> bool {
        let Some(held) = self.held.get_mut(&id) else {
            return false;
        };
        if let Some(at) = std::mem::replace(&mut held.expires_at, expires_at) {
            self.expiries.remove(&(at, id));
        }
        if let Some(at) = expires_at {
            self.expiries.insert((at, id));
        }
        true
    }

    pub(super) fn set_replay_cost(&mut self, id: PlacementId, replay_cost: u64) -> bool {
        let Some(held) = self.held.get_mut(&id) else {
            return false;
        };
        held.replay_cost = replay_cost;
        true
    }

    /// Releases what expired at or before `now`, oldest expiry first. O(log placements) for each.
    pub(super) fn expire(&mut self, now: Time) -> Vec<PlacementId> {
        let mut expired = Vec::new();
        while let Some(&(at, id)) = self.expiries.first() {
            if at > now {
                break;
            }
            self.release(id);
            expired.push(id);
        }
        expired
    }

    /// Brings the index up to date with one GPU's memory and state.
    fn refresh(&mut self, slot: u32) {
        let Some(gpu) = self.gpus[slot as usize].as_mut() else {
            return;
        };
        let rooms = if gpu.is_usable() {
            gpu.memory.rooms()
        } else {
            Rooms::default()
        };
        let before = std::mem::replace(&mut gpu.indexed, rooms);
        let (domain, member) = (gpu.domain, gpu.member as usize);
        for (priority, (room, before)) in rooms.into_iter().zip(before).enumerate() {
            if room.longest != before.longest {
                self.by_run[priority].set(domain, member, room.longest, &self.classes);
            }
            if room.total != before.total {
                self.by_total[priority].set(domain, member, room.total, &self.classes);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.gpu_ids.len()
    }

    pub(super) fn num_placements(&self) -> usize {
        self.held.len()
    }

    /// Memory of GPUs that have not failed, and how much of it is free.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let usable = self.gpus.iter().flatten().filter(|gpu| !gpu.is_failed);
        let sum = usable.fold((0, 0), |(total, free), gpu| {
            let held: u64 = gpu.memory.pieces().map(|p| u64::from(p.length)).sum();
            let capacity = u64::from(gpu.memory.capacity());
            (total + capacity, free + capacity - held)
        });
        (sum.0 * self.extent_bytes, sum.1 * self.extent_bytes)
    }

    fn memory(&self, slot: u32) -> Option<&GpuMemory> {
        self.gpus[slot as usize].as_ref().map(|gpu| &gpu.memory)
    }
}
