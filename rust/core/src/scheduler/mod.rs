//! Chooses among replicas and GPUs: which worker takes a request, and which memory a model gets.
//!
//! [`mod@route`] holds the routing decision, [`exchange`] and [`split`] what it says about KV that moves, [`mod@place`] the
//! placement of gangs of GPUs, [`waiting`] the queues of those that found no room, [`cells`] one decision over several
//! schedulers. What they know is fed from outside: specs,
//! KV events, load reports. One owner holds the [`Scheduler`]; callers with threads put it behind a mutex.

mod admission;
mod assumed;
mod bits;
pub mod cells;
mod chain;
mod charge;
mod chunks;
mod config;
mod error;
pub mod exchange;
mod explain;
mod fair_queue;
mod fair_share;
mod group;
mod held;
mod index;
mod kv_feed;
mod load_grid;
mod loras;
mod make_room;
mod move_wait;
mod output_length;
mod pace;
mod pick;
pub mod place;
mod placement;
mod policy;
mod predict;
mod recent;
mod replica;
mod reservation;
mod ring;
pub mod route;
mod search;
mod seats;
mod serve;
pub mod split;
mod standing;
mod stats;
mod terms;
mod wait_queues;
pub mod waiting;
mod worker;
mod workers;

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

pub use self::{
    admission::AdmissionClass,
    assumed::KvSource,
    cells::{CellId, Cells},
    config::SchedulerConfig,
    error::SchedulerError,
    exchange::{Fetch, KvExchange, WorkerRole},
    kv_feed::KvFeed,
    loras::Lora,
    make_room::{Preemptible, Preemption},
    place::{
        Extent, GpuId, GpuSpec, Layout, NodeLimits, PlaceRequest, PlacedGpu, Placement,
        PlacementId, Shares,
    },
    placement::{DomainMemory, GpuMemoryUse},
    policy::RoutePolicy,
    replica::ReplicaShape,
    reservation::{PrefillPart, Reservation, ReservationId},
    route::{Candidate, Explanation, HashedPrompt, Ineligible, RouteRequest},
    split::Split,
    stats::{SchedulerStats, WorkerSnapshot},
    waiting::{Grant, Granted, TicketId, Wait},
    worker::{NAME_BYTES_MAX, WorkerId, WorkerLoad, WorkerSpec},
};
use self::{
    admission::Rules,
    charge::Charge,
    exchange::{Exchanges, Moved},
    group::Groups,
    held::HeldReservations,
    index::PrefixIndex,
    loras::Loras,
    placement::GpuPool,
    seats::Seats,
    standing::NIL,
    wait_queues::WaitQueues,
    worker::{Demand, Worker},
    workers::Workers,
};
use crate::config::ConfigIssue;

/// Chooses workers for requests and GPUs for gangs.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    workers: Workers,
    groups: Groups,
    index: PrefixIndex,
    loras: Loras,
    exchanges: Exchanges,
    reservations: HeldReservations,
    /// Of the reservations whose prompt comes from other workers.
    moved: FxHashMap<ReservationId, Moved>,
    /// Reservations made so far.
    num_decisions: u64,
    /// Times that a worker's KV events were lost.
    num_kv_gaps: u64,
    gpus: GpuPool,
    waiting: WaitQueues,
    rules: Rules,
    seats: Seats,
    /// Of the reservations that were acquired.
    charges: FxHashMap<ReservationId, Charge>,
    /// Of the tenants that have one of their own.
    tenant_weights: BTreeMap<String, u32>,
}

impl Scheduler {
    /// A scheduler without workers and GPUs.
    pub fn new(config: SchedulerConfig) -> Result<Self, Vec<ConfigIssue>> {
        config.validate()?;
        let gpus = GpuPool::new(&config);
        let rules = Rules::new(&config);
        Ok(Self {
            config,
            workers: Workers::default(),
            groups: Groups::default(),
            index: PrefixIndex::default(),
            loras: Loras::default(),
            exchanges: Exchanges::default(),
            reservations: HeldReservations::default(),
            moved: FxHashMap::default(),
            num_decisions: 0,
            num_kv_gaps: 0,
            gpus,
            waiting: WaitQueues::default(),
            rules,
            seats: Seats::default(),
            charges: FxHashMap::default(),
            tenant_weights: BTreeMap::new(),
        })
    }

    /// Registers a worker with an empty prefix cache and no load.
    pub fn add_worker(&mut self, spec: WorkerSpec) -> Result<WorkerId, SchedulerError> {
        spec.validate()?;
        if self.workers.by_name(&spec.name).is_some() {
            return Err(SchedulerError::DuplicateName { kind: "worker" });
        }
        let limit = self.config.max_num_workers;
        if self.workers.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "workers",
                current: limit,
                limit,
            });
        }
        let slot = self.workers.next_slot();
        self.exchanges.join(&spec, &self.config);
        let group = self.groups.add_member(&spec, slot);
        if self.config.policy == RoutePolicy::ConsistentHash
            && let Some(model) = self.groups.model_mut(&spec.model)
        {
            model.ring.insert(&spec.name, slot);
        }
        let holder = self.index.add_holder(slot);
        let id = self.workers.insert(Worker::new(spec, holder, group));
        let group = self.groups.get_mut(group);
        group.open(self.workers.standings_mut(), slot);
        Ok(id)
    }

    /// Forgets a worker, what it cached, and every reservation on it. `false` where it is not registered.
    pub fn remove_worker(&mut self, id: WorkerId) -> bool {
        self.set_draining(id, true);
        let Some(worker) = self.workers.remove(id) else {
            return false;
        };
        if let Some(model) = self.groups.model_mut(&worker.spec.model) {
            model.ring.remove(&worker.spec.name, id.slot);
        }
        self.groups
            .remove_member(&worker.spec, worker.group, id.slot);
        self.index
            .remove_holder(worker.holder, worker.num_cached_blocks);
        self.loras.remove(&worker.loras, id.slot);
        self.exchanges.leave(&worker.spec);
        let lost = self.reservations.remove_worker(id);
        for id in &lost {
            self.moved.remove(id);
        }
        self.refund_lost(&lost);
        if self.groups.model(&worker.spec.model).is_none() {
            self.waiting.forget_model(&worker.spec.model);
        }
        true
    }

    /// A draining worker takes no new requests and keeps its reservations. `false` where it is not registered.
    pub fn set_draining(&mut self, id: WorkerId, is_draining: bool) -> bool {
        let Some(worker) = self.workers.get_mut(id) else {
            return false;
        };
        if worker.is_draining != is_draining {
            worker.is_draining = is_draining;
            let group = self.groups.get_mut(worker.group);
            if is_draining {
                group.close(self.workers.standings_mut(), id.slot);
            } else {
                group.open(self.workers.standings_mut(), id.slot);
            }
        }
        true
    }

    /// Takes a worker's load report. `false` where it is not registered.
    pub fn update_load(&mut self, id: WorkerId, load: WorkerLoad) -> bool {
        let Some(worker) = self.workers.get_mut(id) else {
            return false;
        };
        worker.load = load;
        worker.num_reports += 1;
        worker.unreported = Demand::default();
        worker.returned = Demand::default();
        self.refresh(id.slot);
        true
    }

    /// Brings what decisions read up to date with a worker whose load changed. O(1).
    fn refresh(&mut self, slot: u32) {
        let Some((worker, standing)) = self.workers.at(slot) else {
            return;
        };
        let mut fresh = standing.clone();
        fresh.refresh(worker);
        let load_changed = (fresh.queued, fresh.batch) != (standing.queued, standing.batch);
        let (is_open, from, to) = (standing.cell != NIL, standing.room(), fresh.room());
        let group = self.groups.get_mut(fresh.group);
        let standings = self.workers.standings_mut();
        if is_open && load_changed {
            group.grid.remove(standings, slot);
            fresh.cell = NIL;
            standings[slot as usize] = fresh;
            group.grid.insert(standings, slot);
        } else {
            standings[slot as usize] = fresh;
        }
        if is_open && from != to {
            group.change_room(slot, from, to);
        }
    }

    /// The worker of this name.
    pub fn worker_by_name(&self, name: &str) -> Option<WorkerId> {
        self.workers.by_name(name)
    }

    /// What the worker was registered as.
    pub fn worker_spec(&self, id: WorkerId) -> Option<&WorkerSpec> {
        self.workers.get(id).map(|worker| &*worker.spec)
    }
}
