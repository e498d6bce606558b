//! Routing among hundreds of workers, where holder sets are large, loads are spread and ids are swept: the choice
//! against `explain`, which judges every worker.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::VecDeque;

use orchestra_core::{
    BlockHash, Time, block_hashes,
    scheduler::{
        HashedPrompt, ReservationId, RoutePolicy, RouteRequest, Scheduler, SchedulerConfig,
        WorkerId, WorkerSpec,
    },
    step::KvEvent,
};

const NUM_WORKERS: usize = 600;
const BLOCK_SIZE: u32 = 4;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % bound
    }
}

fn spec(name: usize, num_blocks: u32) -> WorkerSpec {
    WorkerSpec {
        name: format!("w{name}"),
        model: "m".to_owned(),
        weights_epoch: 0,
        block_size: BLOCK_SIZE,
        num_blocks,
        max_num_seqs: 12,
        max_model_len: 4096,
        ..WorkerSpec::default()
    }
}

struct Fleet {
    scheduler: Scheduler,
    workers: Vec<WorkerId>,
    held: VecDeque<ReservationId>,
    random: Random,
    num_names: usize,
}

impl Fleet {
    fn new(policy: RoutePolicy) -> Self {
        let config = SchedulerConfig {
            policy,
            ..SchedulerConfig::default()
        };
        let mut fleet = Self {
            scheduler: Scheduler::new(config).unwrap(),
            workers: Vec::new(),
            held: VecDeque::new(),
            random: Random(7),
            num_names: 0,
        };
        (0..NUM_WORKERS).for_each(|_| fleet.add_worker());
        fleet
    }

    fn add_worker(&mut self) {
        self.num_names += 1;
        let num_blocks = 200 + 7 * (self.num_names as u32 % 40);
        let spec = spec(self.num_names, num_blocks);
        self.workers.push(self.scheduler.add_worker(spec).unwrap());
    }

    /// Conversations that share their first blocks with all, the next with many, the last with few.
    fn prompt(&mut self) -> Vec<u32> {
        let (family, member) = (self.random.below(3) as u32, self.random.below(40) as u32);
        let len = 1 + self.random.below(120) as u32;
        let token = |position: u32| match position {
            0..16 => position,
            16..40 => position + 1000 * (family + 1),
            _ => position + 10_000 * (family + 1) + 1000 * (member + 1),
        };
        (0..len).map(token).collect()
    }

    fn route(&mut self) {
        let token_ids = self.prompt();
        let seed = spec(0, 1).hash_seed("", None);
        let blocks = block_hashes(seed, &token_ids, BLOCK_SIZE as usize);
        let hashed = HashedPrompt {
            seed,
            block_size: BLOCK_SIZE,
            blocks: &blocks,
        };
        let request = RouteRequest {
            model: "m",
            token_ids: &token_ids,
            max_tokens: 1 + self.random.below(60) as u32,
            exclude: &[self.workers[self.random.below(self.workers.len())]],
            hashed: Some(hashed),
            ..RouteRequest::default()
        };
        let all = self
            .scheduler
            .explain(&request, usize::MAX)
            .unwrap()
            .candidates;
        let rank = |index: usize| (!all[index].has_room, all[index].cost);
        assert_eq!(rank(0), (0..all.len()).map(rank).min().unwrap());
        let reservation = self.scheduler.route(&request, Time::ZERO).unwrap();
        assert_eq!(reservation.worker, all[0].worker);
        assert_eq!(reservation.num_cached_tokens, all[0].num_cached_tokens);
        self.held.push_back(reservation.id);
        self.store(reservation.worker, blocks);
    }

    fn store(&mut self, worker: WorkerId, blocks: Vec<BlockHash>) {
        if self
            .scheduler
            .apply_kv_event(worker, &KvEvent::Stored(blocks))
            .is_err()
        {
            self.scheduler
                .apply_kv_event(worker, &KvEvent::Cleared)
                .unwrap();
        }
    }

    fn step(&mut self, num_held: usize) {
        self.route();
        if self.held.len() > num_held {
            let index = self.random.below(self.held.len());
            let id = self.held.swap_remove_back(index).unwrap();
            self.scheduler.release(id);
        }
        let index = self.random.below(self.held.len());
        self.scheduler.prefill_done(self.held[index], Time::ZERO);
        let index = self.random.below(self.workers.len());
        match self.random.below(40) {
            0 => {
                self.scheduler
                    .remove_worker(self.workers.swap_remove(index));
                self.add_worker();
            }
            1 => {
                let event = KvEvent::Cleared;
                self.scheduler
                    .apply_kv_event(self.workers[index], &event)
                    .unwrap();
            }
            2 => {
                self.scheduler
                    .set_draining(self.workers[index], index.is_multiple_of(2));
            }
            3..30 => {
                let prompt = self.prompt();
                let seed = spec(0, 1).hash_seed("", None);
                let blocks = block_hashes(seed, &prompt, BLOCK_SIZE as usize);
                self.store(self.workers[index], blocks);
            }
            _ => {}
        }
    }
}

fn run(policy: RoutePolicy) {
    let mut fleet = Fleet::new(policy);
    // From idle over busy to full.
    for num_held in [300, 2000, 8000] {
        for _ in 0..400 {
            fleet.step(num_held);
        }
        for _ in 0..num_held.saturating_sub(fleet.held.len()) / 2 {
            let token_ids = fleet.prompt();
            let request = RouteRequest {
                model: "m",
                token_ids: &token_ids,
                max_tokens: 200,
                ..RouteRequest::default()
            };
            let reservation = fleet.scheduler.route(&request, Time::ZERO).unwrap();
            fleet.held.push_back(reservation.id);
        }
        fleet.scheduler.check_integrity();
    }
    assert!(fleet.scheduler.stats(Time::ZERO).num_index_entries > 10_000);
}

#[test]
fn the_product_is_least_among_hundreds() {
    run(RoutePolicy::Product);
}

#[test]
fn the_sum_is_least_among_hundreds() {
    run(RoutePolicy::PrefixSum);
}

#[test]
fn the_load_is_least_among_hundreds() {
    run(RoutePolicy::LoadOnly);
}

#[test]
fn the_product_with_fetches_is_least_among_hundreds() {
    run(RoutePolicy::TransferAware);
}
