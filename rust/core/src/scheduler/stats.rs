//! What the scheduler tells about itself, and the check of its invariants.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::Serialize;

use super::{
    Scheduler,
    kv_feed::KvFeed,
    recent::RecentBlocks,
    standing::NIL,
    worker::{Demand, WorkerId, WorkerSpec},
};
use crate::time::Time;

/// Figures of a [`Scheduler`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SchedulerStats {
    /// Registered workers.
    pub num_workers: u32,
    /// Of these, how many drain.
    pub num_draining: u32,
    /// Distinct KV blocks in the prefix index; those of workers that left or cleared count until they are swept.
    pub num_index_blocks: u64,
    /// (block, holder) pairs in the prefix index.
    pub num_index_entries: u64,
    /// Memory of the prefix index, and of what workers without KV events are taken to hold.
    pub index_bytes: u64,
    /// Times that messages of a worker's numbered KV events were missing.
    pub num_kv_gaps: u64,
    /// Live reservations.
    pub num_reservations: u64,
    /// Age of the oldest live reservation, µs: one that grows without end was never released.
    pub reservation_age_us_max: u64,
    /// Requests that wait for a worker.
    pub num_waiting_requests: u64,
    /// Gangs that wait for GPUs.
    pub num_waiting_gangs: u64,
    /// Reservations made since start.
    pub num_decisions: u64,
    /// Registered GPUs.
    pub num_gpus: u32,
    /// Live placements.
    pub num_placements: u64,
    /// Memory of the GPUs that have not failed, bytes.
    pub gpu_bytes_total: u64,
    /// Of it, how much is free, in pieces of any size.
    pub gpu_bytes_free: u64,
}

/// A worker's figures as routing sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSnapshot {
    /// What it is.
    pub spec: Arc<WorkerSpec>,
    /// Whether it takes no new requests.
    pub is_draining: bool,
    /// Sequences that run or wait there.
    pub batch: u32,
    /// Prompt tokens that wait to be computed there.
    pub queued_prefill_tokens: u64,
    /// KV blocks that nothing holds and nothing was promised.
    pub kv_blocks_free: u64,
    /// Blocks of its prefix cache that the index knows.
    pub num_cached_blocks: u32,
    /// Whether its numbered KV events are in step; where they are lost, its cache counts as empty.
    pub kv_feed: KvFeed,
    /// Live reservations.
    pub num_reservations: u32,
    /// Prompt tokens that it computes in a second, learned from [`prefill_done`](Scheduler::prefill_done); 0: unknown.
    pub prefill_tokens_per_s: u64,
}

impl Scheduler {
    /// Every worker's figures, in order of registration.
    pub fn workers(&self) -> impl Iterator<Item = (WorkerId, WorkerSnapshot)> + '_ {
        self.workers.in_order().into_iter().map(|(id, worker)| {
            let snapshot = WorkerSnapshot {
                spec: Arc::clone(&worker.spec),
                is_draining: worker.is_draining,
                batch: worker.batch(),
                queued_prefill_tokens: worker.queued_prefill_tokens(),
                kv_blocks_free: worker.kv_blocks_free(),
                num_cached_blocks: worker.num_cached_blocks,
                kv_feed: worker.kv_feed,
                num_reservations: worker.reserved.num_seqs,
                prefill_tokens_per_s: worker.prefill_pace.per_second(),
            };
            (id, snapshot)
        })
    }

    /// Figures at time `now`.
    pub fn stats(&self, now: Time) -> SchedulerStats {
        let workers = self.workers.iter().map(|(_, worker)| worker);
        let (num_waiting_requests, num_waiting_gangs) = self.waiting.lengths();
        let oldest = self.reservations.oldest();
        let (gpu_bytes_total, gpu_bytes_free) = self.gpus.bytes();
        SchedulerStats {
            num_workers: self.workers.len() as u32,
            num_draining: workers.clone().filter(|worker| worker.is_draining).count() as u32,
            num_index_blocks: self.index.len() as u64,
            num_index_entries: workers
                .map(|worker| u64::from(worker.num_cached_blocks))
                .sum(),
            index_bytes: self.index_bytes() as u64,
            num_kv_gaps: self.num_kv_gaps,
            num_reservations: self.reservations.len() as u64,
            reservation_age_us_max: oldest
                .map_or(0, |held| now.0.saturating_sub(held.reserved_at.0)),
            num_waiting_requests: num_waiting_requests as u64,
            num_waiting_gangs: num_waiting_gangs as u64,
            num_decisions: self.num_decisions,
            num_gpus: self.gpus.len() as u32,
            num_placements: self.gpus.num_placements() as u64,
            gpu_bytes_total,
            gpu_bytes_free,
        }
    }

    fn index_bytes(&self) -> usize {
        let assumed = self
            .workers
            .iter()
            .filter_map(|(_, worker)| worker.assumed.as_ref());
        let assumed_bytes: usize = assumed.map(RecentBlocks::heap_bytes).sum();
        self.index.heap_bytes() + assumed_bytes
    }

    /// Asserts every invariant. For tests and the simulator: walks all state.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check_integrity(&self) {
        let mut reserved: FxHashMap<WorkerId, Demand> = FxHashMap::default();
        let mut unreported: FxHashMap<WorkerId, Demand> = FxHashMap::default();
        for held in self.reservations.iter() {
            let worker = self.workers.get(held.worker);
            assert!(worker.is_some(), "a reservation outlived its worker");
            reserved.entry(held.worker).or_default().add(held.demand);
            if worker.is_some_and(|worker| worker.num_reports == held.num_reports) {
                unreported.entry(held.worker).or_default().add(held.demand);
            }
        }
        let mut cached: FxHashMap<u32, u32> = FxHashMap::default();
        for (_, slot) in self.index.entries() {
            *cached.entry(slot).or_default() += 1;
        }
        let mut num_loras = 0;
        for (id, worker) in self.workers.iter() {
            assert_eq!(
                worker.reserved,
                reserved.get(&id).copied().unwrap_or_default(),
                "{id}"
            );
            assert_eq!(
                worker.unreported,
                unreported.get(&id).copied().unwrap_or_default(),
                "{id}"
            );
            assert_eq!(
                worker.num_cached_blocks,
                cached.remove(&id.slot).unwrap_or_default()
            );
            assert!(
                worker.num_cached_blocks <= worker.spec.num_blocks,
                "{id} caches too much"
            );
            if let Some(assumed) = &worker.assumed {
                assumed.check_integrity();
            }
            let standing = self.workers.standing(id.slot);
            assert_eq!(
                (standing.queued, standing.batch),
                (worker.queued_prefill_tokens(), worker.batch())
            );
            assert_eq!(u64::from(standing.kv_blocks_free), worker.kv_blocks_free());
            assert_eq!(standing.cell == NIL, worker.is_draining);
            num_loras += worker.loras.len();
            for &key in &worker.loras {
                assert!(self.loras.contains(key, id.slot), "{id} lost an adapter");
            }
        }
        assert_eq!(self.loras.len(), num_loras, "residents of adapters");
        assert!(cached.is_empty(), "a holder is not registered");
        self.workers.check_integrity();
        let specs = self.workers.iter().map(|(_, worker)| &*worker.spec);
        self.exchanges.check_integrity(specs);
        self.groups.check_integrity(self.workers.standings());
        self.gpus.check_integrity();
        self.waiting.check_integrity();
        let reserved = |id| self.reservations.contains(id);
        let mut moved = self.moved.keys().copied();
        assert!(moved.all(reserved), "it moves KV for nobody");
        let mut charged = self.charges.keys().copied();
        assert!(charged.all(reserved), "a charge outlived its reservation");
    }
}
