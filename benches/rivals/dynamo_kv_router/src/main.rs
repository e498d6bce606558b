//! Orchestra's routing decision beside Dynamo's own code (the `dynamo-kv-router` crate) and beside a full scan: the same
//! requests in the same process, in turns.
//!
//! `cargo run --release --manifest-path benches/rivals/dynamo_kv_router/Cargo.toml -- TRACE.jsonl[.gz]
//! [--workers 8,64,512,2048,10000] [--requests 20000] [--seed 1] [--blocks 1024] [--live 2] [--copies N]
//! [--index fastest|radix|positional|compressed] [--callgrind ours|dynamo|scan]`
//!
//! `--blocks` is what a worker's cache holds, in blocks of 512 tokens; `--live` the requests that decode on each worker
//! in the mean; `--copies` how often the trace runs at once, otherwise once for eight workers. Each side has workers of
//! its own, which cache and evict as its own decisions make them. All of them start from the same caches, filled by a
//! rule.

#[path = "../../../../rust/core/benches/route_latency/cache.rs"]
mod cache;
mod caches;
mod dynamo;
mod dynamo_index;
mod fleet;
mod heap;
mod orchestra;
mod probe;
mod prompts;
mod report;
#[path = "../../../../rust/core/benches/route_latency/scan.rs"]
mod scan;
mod scan_router;
#[path = "../../../../rust/core/benches/route_latency/trace.rs"]
mod trace;

use std::rc::Rc;

use orchestra_core::scheduler::RoutePolicy;

use dynamo::Dynamo;
use dynamo_index::Kind;
use fleet::{Fleet, Router, Side, Size};
use orchestra::Orchestra;
use prompts::{Prompts, WORKERS_PER_COPY};
use scan_router::ScanRouter;
use trace::{TraceRow, read_trace};

/// Decisions that one side makes before it is the next one's turn.
const TURN: usize = 1_000;

struct Options {
    trace: String,
    workers: Vec<usize>,
    requests: usize,
    seed: u64,
    blocks: usize,
    live: usize,
    copies: Option<usize>,
    index: Option<Kind>,
    callgrind: Option<String>,
}

impl Options {
    fn parse() -> Option<Self> {
        let mut options = Self {
            trace: String::new(),
            workers: vec![8, 64, 512, 2_048, 10_000],
            requests: 20_000,
            seed: 1,
            blocks: 1_024,
            live: 2,
            copies: None,
            index: None,
            callgrind: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--workers" => {
                    let numbers = args.next()?;
                    let numbers = numbers.split(',').map(str::parse);
                    options.workers = numbers.collect::<Result<_, _>>().ok()?;
                }
                "--requests" => options.requests = args.next()?.parse().ok()?,
                "--seed" => options.seed = args.next()?.parse().ok()?,
                "--blocks" => options.blocks = args.next()?.parse().ok()?,
                "--live" => options.live = args.next()?.parse().ok()?,
                "--copies" => options.copies = Some(args.next()?.parse().ok()?),
                "--index" => match args.next()?.as_str() {
                    "fastest" => options.index = None,
                    name => options.index = Some(Kind::from_name(name)?),
                },
                "--callgrind" => options.callgrind = args.next(),
                _ => options.trace = arg,
            }
        }
        (!options.trace.is_empty()).then_some(options)
    }

    fn size(&self, num_workers: usize) -> Size {
        Size {
            num_workers,
            cache_blocks: self.blocks,
            num_live: num_workers * self.live,
        }
    }
}

fn main() {
    let Some(options) = Options::parse() else {
        println!("give a trace: see the head of src/main.rs");
        return;
    };
    let trace: Rc<[TraceRow]> = read_trace(&options.trace).into();
    for &num_workers in &options.workers {
        let size = options.size(num_workers);
        let copies = options.copies;
        let copies = copies.unwrap_or(num_workers.div_ceil(WORKERS_PER_COPY));
        let prompts = Prompts::new(Rc::clone(&trace), options.seed, copies);
        match &options.callgrind {
            Some(side) => count_instructions(side, size, prompts, &options),
            None => compare(size, prompts, &options),
        }
    }
}

/// The sides in turns, and their table.
fn compare(size: Size, mut prompts: Prompts, options: &Options) {
    println!("\n## {} workers\n", size.num_workers);
    let probed = probe::probe_indexes(size, &prompts);
    let fastest = report::print_indexes(&probed);
    let index = options.index.unwrap_or(fastest);
    let filling = || prompts.clone();
    let ours = |policy| Fleet::new(size, Orchestra::new(size, policy), &mut filling());
    let [product, sum] = [RoutePolicy::Product, RoutePolicy::PrefixSum].map(ours);
    let dynamo = Fleet::new(size, Dynamo::new(size, index), &mut filling());
    let scan = Fleet::new(size, ScanRouter::new(size), &mut prompts);
    let mut sides: [Box<dyn Side>; 4] = [
        Box::new(product),
        Box::new(sum),
        Box::new(dynamo),
        Box::new(scan),
    ];
    let num_warm = size.num_warm().next_multiple_of(TURN);
    for first in (0..num_warm + options.requests).step_by(TURN) {
        let is_timed = first >= num_warm;
        let left = num_warm + options.requests - first;
        let turn: Vec<_> = prompts.by_ref().take(TURN.min(left)).collect();
        for side in &mut sides {
            side.take_turn(&turn, is_timed);
        }
    }
    report::print_sides(&mut sides);
}

/// One side alone, for a tool that counts the instructions in [`fleet::measured_decision`].
fn count_instructions(side: &str, size: Size, mut prompts: Prompts, options: &Options) {
    fn run<R: Router>(size: Size, router: R, prompts: &mut Prompts, requests: usize) {
        let mut fleet = Fleet::new(size, router, prompts);
        let warm: Vec<_> = prompts.take(size.num_warm()).collect();
        fleet.take_turn(&warm, false);
        let turn: Vec<_> = prompts.take(requests).collect();
        fleet.take_turn(&turn, true);
        println!(
            "{} workers: {requests} calls of measured_decision",
            size.num_workers
        );
    }
    let requests = options.requests;
    let index = options.index.unwrap_or(Kind::Compressed);
    match side {
        "ours" => {
            let ours = Orchestra::new(size, RoutePolicy::Product);
            run(size, ours, &mut prompts, requests);
        }
        "dynamo" => run(size, Dynamo::new(size, index), &mut prompts, requests),
        "scan" => run(size, ScanRouter::new(size), &mut prompts, requests),
        _ => println!("--callgrind ours, dynamo or scan"),
    }
}
