//! Every decision of a real trace against a full scan over what the workers really hold.
//!
//! The scan knows nothing of the scheduler: it has the simulated workers' caches as hash maps and their loads as plain
//! sums, and judges every worker for every request.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../benches/route_latency/cache.rs"]
mod cache;

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io::{BufRead, BufReader},
};

use cache::Cache;
use flate2::read::GzDecoder;
use orchestra_core::{
    BlockHash, Time,
    scheduler::{
        HashedPrompt, Reservation, RouteRequest, Scheduler, SchedulerConfig, WorkerId, WorkerSpec,
    },
    step::KvEvent,
};
use serde::Deserialize;

const TRACE: &[u8] = include_bytes!("testdata/traces/mooncake_conversation.jsonl.gz");
const BLOCK_SIZE: u64 = 512;
const NUM_WORKERS: usize = 24;
/// So few that caches evict, and so few places that sometimes nobody has room.
const NUM_BLOCKS: u64 = 400;
const MAX_NUM_SEQS: u64 = 3;
/// A worker prefills 8 tokens a millisecond and draws one token in 40.
const PREFILL_TOKENS_PER_MS: u64 = 8;
const MS_PER_OUTPUT_TOKEN: u64 = 40;

#[derive(Deserialize)]
struct Row {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

impl Row {
    /// Hashes of the full blocks.
    fn chain(&self) -> Vec<BlockHash> {
        let num_full = (self.input_length / BLOCK_SIZE) as usize;
        let ids = self.hash_ids.iter().take(num_full);
        ids.map(|id| BlockHash(id.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
            .collect()
    }

    fn num_blocks(&self) -> u64 {
        (self.input_length + self.output_length).div_ceil(BLOCK_SIZE)
    }

    /// Leading blocks that a prefix hit can use: one token is always computed.
    fn num_usable(&self) -> usize {
        ((self.input_length - 1) / BLOCK_SIZE) as usize
    }
}

/// A simulated worker: what it holds and what runs there.
#[derive(Default)]
struct Worker {
    cache: Cache,
    queued: u64,
    batch: u64,
    kv_used: u64,
}

impl Worker {
    fn depth(&self, row: &Row, chain: &[BlockHash]) -> u64 {
        let usable = chain.iter().take(row.num_usable());
        usable
            .take_while(|&hash| self.cache.uses.contains_key(hash))
            .count() as u64
    }

    /// Room goes first, then `(miss + queued) × (batch + 1)`.
    fn cost(&self, row: &Row, chain: &[BlockHash]) -> (bool, u64) {
        let depth = self.depth(row, chain);
        let is_full =
            self.batch >= MAX_NUM_SEQS || self.kv_used + row.num_blocks() - depth > NUM_BLOCKS;
        let left = row.input_length - depth * BLOCK_SIZE + self.queued;
        (is_full, left * (self.batch + 1))
    }
}

/// A request on its worker.
struct Live {
    reservation: Reservation,
    worker: usize,
    chain: Vec<BlockHash>,
    prefill: u64,
    kv: u64,
    output: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Prefilled,
    Finished,
}

struct Fleet {
    scheduler: Scheduler,
    ids: Vec<WorkerId>,
    workers: Vec<Worker>,
    live: Vec<Live>,
    events: BinaryHeap<Reverse<(u64, Next, usize)>>,
    tokens: Vec<u32>,
    num_cached_tokens: u64,
    num_without_room: u64,
}

impl Fleet {
    fn new() -> Self {
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        let spec = |index: usize| WorkerSpec {
            name: format!("worker-{index}"),
            model: "model".to_owned(),
            block_size: BLOCK_SIZE as u32,
            num_blocks: NUM_BLOCKS as u32,
            max_num_seqs: MAX_NUM_SEQS as u32,
            max_model_len: 1 << 20,
            ..WorkerSpec::default()
        };
        let ids = (0..NUM_WORKERS).map(|index| scheduler.add_worker(spec(index)).unwrap());
        Self {
            ids: ids.collect(),
            scheduler,
            workers: (0..NUM_WORKERS).map(|_| Worker::default()).collect(),
            live: Vec::new(),
            events: BinaryHeap::new(),
            tokens: vec![0; 1 << 18],
            num_cached_tokens: 0,
            num_without_room: 0,
        }
    }

    fn arrive(&mut self, row: &Row) {
        self.run_until(row.timestamp);
        let chain = row.chain();
        let spec = self.scheduler.worker_spec(self.ids[0]).unwrap();
        let request = RouteRequest {
            model: "model",
            token_ids: &self.tokens[..row.input_length as usize],
            max_tokens: row.output_length as u32,
            hashed: Some(HashedPrompt {
                seed: spec.hash_seed("", None),
                block_size: BLOCK_SIZE as u32,
                blocks: &chain,
            }),
            ..RouteRequest::default()
        };
        let reservation = self
            .scheduler
            .route(&request, Time(row.timestamp * 1000))
            .unwrap();
        let worker = self
            .ids
            .iter()
            .position(|&id| id == reservation.worker)
            .unwrap();
        let costs = self.workers.iter().map(|worker| worker.cost(row, &chain));
        let best = costs.min().unwrap();
        assert_eq!(self.workers[worker].cost(row, &chain), best);
        let depth = self.workers[worker].depth(row, &chain);
        assert_eq!(u64::from(reservation.num_cached_tokens), depth * BLOCK_SIZE);
        self.num_cached_tokens += depth * BLOCK_SIZE;
        self.num_without_room += u64::from(best.0);
        self.start(row, reservation, worker, chain, depth);
    }

    fn start(
        &mut self,
        row: &Row,
        reservation: Reservation,
        worker: usize,
        chain: Vec<BlockHash>,
        depth: u64,
    ) {
        let live = Live {
            reservation,
            worker,
            chain,
            prefill: row.input_length - depth * BLOCK_SIZE,
            kv: row.num_blocks() - depth,
            output: row.output_length,
        };
        let at = &mut self.workers[worker];
        at.queued += live.prefill;
        at.batch += 1;
        at.kv_used += live.kv;
        let prefilled = row.timestamp + at.queued / PREFILL_TOKENS_PER_MS;
        self.events
            .push(Reverse((prefilled, Next::Prefilled, self.live.len())));
        self.live.push(live);
    }

    fn run_until(&mut self, now: u64) {
        while let Some(&Reverse((time, next, index))) = self.events.peek()
            && time <= now
        {
            self.events.pop();
            let live = &mut self.live[index];
            let worker = &mut self.workers[live.worker];
            match next {
                Next::Prefilled => {
                    worker.queued -= live.prefill;
                    assert!(self.scheduler.prefill_done(live.reservation.id, Time::ZERO));
                    let chain = std::mem::take(&mut live.chain).into();
                    let (stored, removed) = worker.cache.store(chain, NUM_BLOCKS as usize);
                    for event in [KvEvent::Removed(removed), KvEvent::Stored(stored)] {
                        let id = self.ids[live.worker];
                        self.scheduler.apply_kv_event(id, &event).unwrap();
                    }
                    let finished = time + live.output * MS_PER_OUTPUT_TOKEN;
                    self.events.push(Reverse((finished, Next::Finished, index)));
                }
                Next::Finished => {
                    worker.batch -= 1;
                    worker.kv_used -= live.kv;
                    assert!(self.scheduler.release(live.reservation.id));
                }
            }
        }
    }
}

#[test]
fn every_decision_of_the_trace_costs_what_the_full_scan_s_does() {
    let lines = BufReader::new(GzDecoder::new(TRACE)).lines();
    let mut fleet = Fleet::new();
    let (mut num_rows, mut num_tokens) = (0_u64, 0);
    for line in lines {
        let row: Row = serde_json::from_str(&line.unwrap()).unwrap();
        fleet.arrive(&row);
        num_rows += 1;
        num_tokens += row.input_length;
        if num_rows.is_multiple_of(1000) {
            fleet.scheduler.check_integrity();
        }
    }
    fleet.run_until(u64::MAX);
    assert_eq!(num_rows, 12_031);
    assert_eq!(fleet.scheduler.stats(Time::ZERO).num_reservations, 0);
    // The trace exercised what it is here for: hits, misses, and workers without room.
    let hit_percent = 100 * fleet.num_cached_tokens / num_tokens;
    assert!(
        (10..40).contains(&hit_percent),
        "{hit_percent} % of the tokens hit"
    );
    assert!(
        (50..6_000).contains(&fleet.num_without_room),
        "{}",
        fleet.num_without_room
    );
}
