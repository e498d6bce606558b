//! How long routing decisions take on a trace, with the KV events that they cause in between, and what a full scan
//! over plain arrays that makes the same choice takes in the same run.
//!
//! `cargo bench -p orchestra-core --bench route_latency -- TRACE.jsonl[.gz] [--workers 10000] [--entries 17500000]
//! [--block 512] [--decisions 20000]`
//!
//! The trace has one JSON object a line with `input_length`, `output_length` and `hash_ids`, one per 512 tokens. It is
//! replayed, each time with other conversations, until the workers hold as many blocks as asked for. Workers keep
//! what they computed and evict the oldest chain, leaves first. The cost of as many decisions
//! as are timed is held against the scan's, each of them.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, or fails loudly"
)]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

#[path = "route_latency/cache.rs"]
mod cache;
#[path = "route_latency/scan.rs"]
mod scan;
#[path = "route_latency/trace.rs"]
mod trace;

use std::{collections::VecDeque, rc::Rc, time::Instant};

use orchestra_core::{
    BlockHash, HashSeed, Time, block_hashes,
    scheduler::{
        HashedPrompt, Reservation, RouteRequest, Scheduler, SchedulerConfig, WorkerId, WorkerLoad,
        WorkerSpec,
    },
    step::KvEvent,
};
use rustc_hash::FxHashMap;

use cache::Cache;
use scan::{MAX_NUM_SEQS, Scan};
use trace::{TRACE_BLOCK, TraceRow, read_trace};

struct Options {
    trace: String,
    workers: usize,
    entries: usize,
    block: u32,
    decisions: usize,
}

impl Options {
    fn parse() -> Option<Self> {
        let mut options = Self {
            trace: String::new(),
            workers: 10_000,
            entries: 17_500_000,
            block: TRACE_BLOCK,
            decisions: 20_000,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut number = || args.next().unwrap().parse::<usize>().unwrap();
            match arg.as_str() {
                "--workers" => options.workers = number(),
                "--entries" => options.entries = number(),
                "--block" => options.block = number() as u32,
                "--decisions" => options.decisions = number(),
                "--bench" => {}
                _ => options.trace = arg,
            }
        }
        (!options.trace.is_empty()).then_some(options)
    }
}

/// A reservation and what the scan's arrays owe it.
struct Live {
    reservation: Reservation,
    worker: u32,
    prefill: u64,
    blocks: u64,
}

#[derive(Default)]
struct Times {
    route: Vec<u32>,
    /// Routes that a scan came just before, which leaves other data in the caches.
    route_after_scan: Vec<u32>,
    scan: Vec<u32>,
    /// Of each decision's events.
    picos_per_block: Vec<u32>,
    release: Vec<u32>,
    prefill_done: Vec<u32>,
    load: Vec<u32>,
    event_nanos: u64,
    event_blocks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Warming,
    /// Each decision against the scan.
    Checked,
    Timed,
}

struct Fleet {
    options: Options,
    scheduler: Scheduler,
    seed: HashSeed,
    ids: Vec<WorkerId>,
    by_id: FxHashMap<WorkerId, u32>,
    caches: Vec<Cache>,
    scan: Scan,
    prefilling: VecDeque<Live>,
    decoding: VecDeque<Live>,
    tokens: Vec<u32>,
    num_entries: usize,
    times: Times,
}

impl Fleet {
    fn new(options: Options) -> Self {
        let num_blocks =
            (options.entries / options.workers + 200_000 / options.block as usize) as u32;
        let spec = |name: usize| WorkerSpec {
            name: format!("worker-{name}"),
            model: "model".to_owned(),
            weights_epoch: 0,
            block_size: options.block,
            num_blocks,
            max_num_seqs: MAX_NUM_SEQS,
            max_model_len: 1 << 20,
            ..WorkerSpec::default()
        };
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        let start = Instant::now();
        let ids: Vec<WorkerId> = (0..options.workers)
            .map(|name| scheduler.add_worker(spec(name)).unwrap())
            .collect();
        let millis = start.elapsed().as_secs_f64() * 1e3;
        println!("{} workers registered in {millis:.1} ms", options.workers);
        let size = options.workers;
        Self {
            seed: spec(0).hash_seed("", None),
            by_id: ids.iter().copied().zip(0..).collect(),
            ids,
            scheduler,
            caches: (0..size).map(|_| Cache::default()).collect(),
            scan: Scan::new(size, num_blocks.into()),
            prefilling: VecDeque::new(),
            decoding: VecDeque::new(),
            tokens: vec![0; 1 << 20],
            num_entries: 0,
            times: Times::default(),
            options,
        }
    }

    fn step(&mut self, row: &TraceRow, chain: Rc<[BlockHash]>, phase: Phase) {
        let is_timed = phase == Phase::Timed;
        let block = self.options.block;
        let tokens = std::mem::take(&mut self.tokens);
        let request = RouteRequest {
            model: "model",
            token_ids: &tokens[..row.input as usize],
            max_tokens: row.output,
            hashed: Some(HashedPrompt {
                seed: self.seed,
                block_size: block,
                blocks: &chain,
            }),
            ..RouteRequest::default()
        };
        let usable = &chain[..chain.len().min((row.input as usize - 1) / block as usize)];
        let start = Instant::now();
        let expected =
            (phase == Phase::Checked).then(|| self.scan.best(&request, block, usable, 0).0);
        let scanned = start.elapsed();
        let start = Instant::now();
        let reservation = self.scheduler.route(&request, Time::ZERO).unwrap();
        let routed = start.elapsed();
        let worker = self.by_id[&reservation.worker];
        if let Some(expected) = expected {
            let got = self.scan.cost(&request, block, worker as usize);
            assert_eq!(got, expected, "the scan finds a better worker");
            self.times.scan.push(scanned.as_nanos() as u32);
            self.times.route_after_scan.push(routed.as_nanos() as u32);
        } else if is_timed {
            self.times.route.push(routed.as_nanos() as u32);
        }
        self.tokens = tokens;
        self.take(row, reservation, worker);
        self.store(worker, chain, is_timed);
        self.advance(is_timed);
    }

    fn take(&mut self, row: &TraceRow, reservation: Reservation, worker: u32) {
        let cached = reservation.num_cached_tokens;
        let live = Live {
            reservation,
            worker,
            prefill: u64::from(row.input - cached),
            blocks: u64::from(reservation.num_blocks - cached / self.options.block),
        };
        self.scan.queued[worker as usize] += live.prefill;
        self.scan.batch[worker as usize] += 1;
        self.scan.kv_used[worker as usize] += live.blocks;
        self.prefilling.push_back(live);
    }

    /// The worker computes the prompt: its events.
    fn store(&mut self, worker: u32, chain: Rc<[BlockHash]>, is_timed: bool) {
        let limit = self.options.entries / self.options.workers;
        let (stored, removed) = self.caches[worker as usize].store(chain, limit);
        self.scan.apply(worker, &stored, &removed);
        self.num_entries = self.num_entries + stored.len() - removed.len();
        let num_blocks = stored.len() + removed.len();
        let id = self.ids[worker as usize];
        let events = [KvEvent::Removed(removed), KvEvent::Stored(stored)];
        let start = Instant::now();
        for event in &events {
            self.scheduler.apply_kv_event(id, event).unwrap();
        }
        if is_timed && num_blocks > 0 {
            let nanos = start.elapsed().as_nanos() as u64;
            self.times.event_nanos += nanos;
            let picos = nanos * 1000 / num_blocks as u64;
            self.times.picos_per_block.push(picos as u32);
            self.times.event_blocks += num_blocks as u64;
        }
    }

    /// Ends the oldest prefill and the oldest request; their workers report.
    fn advance(&mut self, is_timed: bool) {
        let num_workers = self.options.workers;
        if self.prefilling.len() > num_workers / 2
            && let Some(live) = self.prefilling.pop_front()
        {
            let start = Instant::now();
            self.scheduler.prefill_done(live.reservation.id, Time::ZERO);
            record(&mut self.times.prefill_done, start, is_timed);
            self.scan.queued[live.worker as usize] -= live.prefill;
            self.report(live.worker as usize, is_timed);
            self.decoding.push_back(live);
        }
        if self.decoding.len() > num_workers * 8
            && let Some(live) = self.decoding.pop_front()
        {
            let start = Instant::now();
            self.scheduler.release(live.reservation.id);
            record(&mut self.times.release, start, is_timed);
            let worker = live.worker as usize;
            self.scan.batch[worker] -= 1;
            self.scan.kv_used[worker] -= live.blocks;
            self.report(worker, is_timed);
        }
    }

    /// Reports what the worker has, which a reservation that ended no longer counts in.
    fn report(&mut self, worker: usize, is_timed: bool) {
        let load = WorkerLoad {
            num_running: self.scan.batch[worker],
            num_waiting: 0,
            kv_blocks_used: self.scan.kv_used[worker] as u32,
            queued_prefill_tokens: self.scan.queued[worker],
        };
        let start = Instant::now();
        self.scheduler.update_load(self.ids[worker], load);
        record(&mut self.times.load, start, is_timed);
    }

    fn print(&mut self) {
        let entries = self.num_entries;
        let stats = self.scheduler.stats(Time::ZERO);
        assert_eq!(stats.num_index_entries, entries as u64);
        println!(
            "{entries} entries, {} blocks, {:.1} bytes an entry",
            stats.num_index_blocks,
            stats.index_bytes as f64 / entries as f64
        );
        let times = &mut self.times;
        times.picos_per_block.sort_unstable();
        println!(
            "{:28}{:>10}{:>10}{:>10}{:>10}",
            "µs", "p50", "p99", "p99.9", "max"
        );
        print_times("route, with its reservation", &mut times.route);
        print_times("the same after a scan", &mut times.route_after_scan);
        print_times("full scan, choice only", &mut times.scan);
        print_times("prefill_done", &mut times.prefill_done);
        print_times("release", &mut times.release);
        print_times("update_load", &mut times.load);
        let mut empty: Vec<u32> = (0..100_000)
            .map(|_| Instant::now().elapsed().as_nanos() as u32)
            .collect();
        print_times("the clock itself", &mut empty);
        println!(
            "KV events: {:.1} M blocks/s in the mean over {} blocks, {:.1} at the median decision",
            times.event_blocks as f64 * 1e3 / times.event_nanos as f64,
            times.event_blocks,
            1e6 / f64::from(times.picos_per_block[times.picos_per_block.len() / 2])
        );
        let (start, num_tokens) = (Instant::now(), 12_000);
        let hashes = block_hashes(
            self.seed,
            &self.tokens[..num_tokens],
            self.options.block as usize,
        );
        let micros = start.elapsed().as_secs_f64() * 1e6;
        println!(
            "hashing {num_tokens} tokens: {micros:.1} µs for {} blocks",
            hashes.len()
        );
    }
}

fn record(times: &mut Vec<u32>, start: Instant, is_timed: bool) {
    let nanos = start.elapsed().as_nanos() as u32;
    if is_timed {
        times.push(nanos);
    }
}

fn print_times(name: &str, times: &mut [u32]) {
    times.sort_unstable();
    let at = |permille: usize| f64::from(times[(times.len() - 1) * permille / 1000]) / 1e3;
    let [p50, p99, p999, max] = [500, 990, 999, 1000].map(at);
    println!("{name:28}{p50:>10.2}{p99:>10.2}{p999:>10.2}{max:>10.2}");
}

fn main() {
    let Some(options) = Options::parse() else {
        println!("give a trace: see the head of this file");
        return;
    };
    let trace = read_trace(&options.trace);
    let (decisions, block) = (options.decisions, options.block);
    let target = options.entries * 9 / 10;
    let mut fleet = Fleet::new(options);
    let mut replays = (0_u64..).flat_map(|replay| trace.iter().map(move |row| (row, replay)));
    let mut num_warm = 0;
    while fleet.num_entries < target {
        let (row, replay) = replays.next().unwrap();
        let chain = row.chain(block, replay);
        fleet.step(row, chain, Phase::Warming);
        num_warm += 1;
    }
    println!("warm after {num_warm} decisions; {decisions} are checked, then {decisions} timed");
    let phases = [Phase::Checked, Phase::Timed].map(|phase| std::iter::repeat_n(phase, decisions));
    for (phase, (row, replay)) in phases.into_iter().flatten().zip(replays) {
        let chain = row.chain(block, replay);
        fleet.step(row, chain, phase);
    }
    fleet.print();
}
