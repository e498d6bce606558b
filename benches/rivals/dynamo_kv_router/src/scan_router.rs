//! The full scan over arrays, with the cost that our search minimizes. Equals take turns.

use std::time::{Duration, Instant};

use orchestra_core::HashSeed;

use crate::{
    caches::Change,
    fleet::{Decision, Router, Size},
    orchestra::route_request,
    prompts::Prompt,
    scan::Scan,
    trace::TRACE_BLOCK,
};

pub struct ScanRouter {
    scan: Scan,
    num_decisions: usize,
    num_workers: usize,
    tokens: Vec<u32>,
}

impl ScanRouter {
    pub fn new(size: Size) -> Self {
        Self {
            scan: Scan::new(size.num_workers, size.kv_blocks().into()),
            num_decisions: 0,
            num_workers: size.num_workers,
            tokens: vec![0; 1 << 20],
        }
    }
}

pub struct Booking {
    worker: usize,
    prefill: u64,
    blocks: u64,
}

impl Router for ScanRouter {
    type Booking = Booking;

    fn name(&self) -> String {
        "full scan".to_owned()
    }

    fn registration_rate(&self) -> Option<f64> {
        None
    }

    fn prepare(&mut self, _prompt: &Prompt) {}

    fn decide(&mut self, prompt: &Prompt) -> Decision<Booking> {
        let request = route_request(prompt, HashSeed::default(), &self.tokens);
        self.num_decisions += 1;
        let first = self.num_decisions % self.num_workers;
        let usable = prompt.usable();
        let (_, worker) = self.scan.best(&request, TRACE_BLOCK, usable, first);
        let cached = self.scan.depths[worker];
        let tokens = u64::from(prompt.input) + u64::from(prompt.output);
        let booking = Booking {
            worker,
            prefill: u64::from(prompt.input) - u64::from(cached * TRACE_BLOCK),
            blocks: tokens.div_ceil(TRACE_BLOCK.into()) - u64::from(cached),
        };
        self.scan.queued[worker] += booking.prefill;
        self.scan.batch[worker] += 1;
        self.scan.kv_used[worker] += booking.blocks;
        Decision {
            worker,
            cached_tokens: u64::from(cached * TRACE_BLOCK),
            booking,
        }
    }

    fn prefill_done(&mut self, booking: &Booking) {
        self.scan.queued[booking.worker] -= booking.prefill;
    }

    fn free(&mut self, booking: Booking) {
        self.scan.batch[booking.worker] -= 1;
        self.scan.kv_used[booking.worker] -= booking.blocks;
    }

    fn apply(&mut self, changes: &[Change]) -> Duration {
        let start = Instant::now();
        for change in changes {
            let worker = change.worker as u32;
            self.scan.apply(worker, &change.stored, &change.removed);
        }
        start.elapsed()
    }
}
