//! Chooses among replicas and GPUs: which worker takes a request, and which memory a model gets.
//!
//! [`mod@route`] holds the routing decision, [`mod@place`] the placement of gangs of GPUs, [`waiting`] the queues of
//! those that found no room. What they know is fed from outside: specs, KV events, load reports. One owner holds the
//! [`Scheduler`]; callers with threads put it behind a mutex.

mod config;
mod error;
mod index;
pub mod place;
mod placement;
mod reservation;
pub mod route;
mod stats;
pub mod waiting;
mod worker;

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

pub use self::{
    config::SchedulerConfig,
    error::SchedulerError,
    place::{Extent, GpuId, GpuSpec, Layout, PlaceRequest, PlacedGpu, Placement, PlacementId},
    placement::{DomainMemory, GpuMemoryUse},
    reservation::{Reservation, ReservationId},
    route::{Candidate, Explanation, Ineligible, RouteRequest},
    stats::{SchedulerStats, WorkerSnapshot},
    waiting::{Grant, Granted, TicketId, Wait},
    worker::{NAME_BYTES_MAX, WorkerId, WorkerLoad, WorkerSpec},
};
use self::{
    index::PrefixIndex,
    placement::GpuPool,
    reservation::Held,
    waiting::WaitQueues,
    worker::{Demand, Worker},
};
use crate::{config::ConfigIssue, step::KvEvent};

/// Chooses workers for requests and GPUs for gangs.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    workers: BTreeMap<WorkerId, Worker>,
    worker_names: FxHashMap<String, WorkerId>,
    /// Workers registered so far; the next id.
    num_registered: u32,
    index: PrefixIndex,
    /// Ordered by age.
    reservations: BTreeMap<ReservationId, Held>,
    /// Reservations made so far.
    num_decisions: u64,
    gpus: GpuPool,
    waiting: WaitQueues,
}

impl Scheduler {
    /// A scheduler without workers and GPUs.
    pub fn new(config: SchedulerConfig) -> Result<Self, Vec<ConfigIssue>> {
        config.validate()?;
        let gpus = GpuPool::new(&config);
        Ok(Self {
            config,
            workers: BTreeMap::new(),
            worker_names: FxHashMap::default(),
            num_registered: 0,
            index: PrefixIndex::default(),
            reservations: BTreeMap::new(),
            num_decisions: 0,
            gpus,
            waiting: WaitQueues::default(),
        })
    }

    /// Registers a worker with an empty prefix cache and no load.
    pub fn add_worker(&mut self, spec: WorkerSpec) -> Result<WorkerId, SchedulerError> {
        spec.validate()?;
        if self.worker_names.contains_key(&spec.name) {
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
        self.num_registered += 1;
        let id = WorkerId(self.num_registered);
        self.worker_names.insert(spec.name.clone(), id);
        self.workers.insert(id, Worker::new(spec));
        Ok(id)
    }

    /// Forgets a worker, what it cached, and every reservation on it. `false` where it is not registered.
    pub fn remove_worker(&mut self, id: WorkerId) -> bool {
        let Some(worker) = self.workers.remove(&id) else {
            return false;
        };
        self.worker_names.remove(&worker.spec.name);
        self.index.remove_worker(id);
        self.reservations.retain(|_, held| held.worker != id);
        true
    }

    /// A draining worker takes no new requests and keeps its reservations. `false` where it is not registered.
    pub fn set_draining(&mut self, id: WorkerId, is_draining: bool) -> bool {
        let Some(worker) = self.workers.get_mut(&id) else {
            return false;
        };
        worker.is_draining = is_draining;
        true
    }

    /// Takes a worker's load report. `false` where it is not registered.
    pub fn update_load(&mut self, id: WorkerId, load: WorkerLoad) -> bool {
        let Some(worker) = self.workers.get_mut(&id) else {
            return false;
        };
        worker.load = load;
        worker.num_reports += 1;
        worker.unreported = Demand::default();
        true
    }

    /// Takes a change of what a worker's prefix cache holds.
    ///
    /// A worker that reports more blocks than it has is refused before anything changes; so is one that is gone.
    pub fn apply_kv_event(&mut self, id: WorkerId, event: &KvEvent) -> Result<(), SchedulerError> {
        let worker = self
            .workers
            .get_mut(&id)
            .ok_or(SchedulerError::UnknownWorker)?;
        match event {
            KvEvent::Stored(hashes) => {
                let limit = worker.spec.num_blocks;
                let new = hashes
                    .iter()
                    .filter(|&&hash| !self.index.contains(hash, id))
                    .count();
                if new as u64 + u64::from(worker.num_cached_blocks) > u64::from(limit) {
                    let worker = worker.spec.name.clone();
                    return Err(SchedulerError::TooManyBlocks { worker, limit });
                }
                let index = &mut self.index;
                let inserted = hashes
                    .iter()
                    .filter(|&&hash| index.insert(hash, id))
                    .count();
                worker.num_cached_blocks += inserted as u32;
            }
            KvEvent::Removed(hashes) => {
                let index = &mut self.index;
                let removed = hashes
                    .iter()
                    .filter(|&&hash| index.remove(hash, id))
                    .count();
                worker.num_cached_blocks -= removed as u32;
            }
            KvEvent::Cleared => {
                self.index.remove_worker(id);
                worker.num_cached_blocks = 0;
            }
        }
        Ok(())
    }

    /// The worker of this name.
    pub fn worker_by_name(&self, name: &str) -> Option<WorkerId> {
        self.worker_names.get(name).copied()
    }

    /// What the worker was registered as.
    pub fn worker_spec(&self, id: WorkerId) -> Option<&WorkerSpec> {
        self.workers.get(&id).map(|worker| &worker.spec)
    }
}
