//! One side of the comparison: a router, and the workers that do what it decides.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    caches::{Caches, Change},
    heap,
    prompts::{Prompt, Prompts},
    report::{Quality, Times},
    trace::TRACE_BLOCK,
};

#[derive(Clone, Copy)]
pub struct Size {
    pub num_workers: usize,
    /// What a worker caches.
    pub cache_blocks: usize,
    /// Requests that decode at once, on all workers.
    pub num_live: usize,
}

impl Size {
    /// A worker's KV blocks: its cache, and the longest prompts of the trace beside it.
    pub fn kv_blocks(self) -> u32 {
        self.cache_blocks as u32 + 400
    }

    /// Requests whose prompt is being computed at once.
    fn num_prefilling(self) -> usize {
        self.num_workers / 2
    }

    /// Decisions until as many requests are under way as shall be.
    pub fn num_warm(self) -> usize {
        self.num_live + self.num_prefilling()
    }
}

pub struct Decision<B> {
    pub worker: usize,
    /// What the router believes that the worker has cached of the prompt.
    pub cached_tokens: u64,
    /// Names what was booked.
    pub booking: B,
}

/// What decides. Everything that it needs about a prompt is made ready in [`Router::prepare`], untimed.
pub trait Router {
    type Booking;

    fn name(&self) -> String;
    /// Workers registered a second, where there is something to register.
    fn registration_rate(&self) -> Option<f64>;
    fn prepare(&mut self, prompt: &Prompt);
    /// Decides and books.
    fn decide(&mut self, prompt: &Prompt) -> Decision<Self::Booking>;
    fn prefill_done(&mut self, booking: &Self::Booking);
    fn free(&mut self, booking: Self::Booking);
    /// Takes KV events; how long that took from when they were there in the router's own form.
    fn apply(&mut self, changes: &[Change]) -> Duration;
    /// What there is to say of where a decision's time goes.
    fn details(&mut self) -> Option<String> {
        None
    }
}

/// A decision that counts, apart from the rest, so that a tool can find its instructions.
#[inline(never)]
pub fn measured_decision<R: Router>(router: &mut R, prompt: &Prompt) -> Decision<R::Booking> {
    router.decide(prompt)
}

struct Live<B> {
    booking: B,
    worker: usize,
    prefill: u64,
}

/// A side, whatever its router.
pub trait Side {
    fn take_turn(&mut self, prompts: &[Prompt], is_timed: bool);
    fn report(&mut self) -> Report;
}

pub struct Report {
    pub name: String,
    pub registration_rate: Option<f64>,
    pub num_entries: usize,
    pub bytes_per_entry: f64,
    pub fill_rate: f64,
    pub times: Times,
    pub quality: Quality,
    pub details: Option<String>,
}

pub struct Fleet<R: Router> {
    size: Size,
    router: R,
    caches: Caches,
    /// Requests on each worker.
    batch: Vec<u32>,
    /// Tokens that each worker still has to prefill.
    queued: Vec<u64>,
    prefilling: VecDeque<Live<R::Booking>>,
    decoding: VecDeque<Live<R::Booking>>,
    times: Times,
    quality: Quality,
    bytes_per_entry: f64,
    fill_rate: f64,
}

impl<R: Router> Fleet<R> {
    /// Workers with caches filled from the prompts.
    pub fn new(size: Size, mut router: R, prompts: &mut Prompts) -> Self {
        let mut caches = Caches::new(size);
        let (mut taken, mut bytes, mut num_blocks) = (Duration::ZERO, 0, 0);
        caches.fill(prompts, |changes| {
            let (duration, left) = heap::counted(|| router.apply(changes));
            taken += duration;
            bytes += left;
            num_blocks += changes.iter().map(Change::num_blocks).sum::<usize>();
        });
        Self {
            bytes_per_entry: bytes as f64 / caches.num_entries as f64,
            fill_rate: num_blocks as f64 / taken.as_secs_f64(),
            size,
            router,
            caches,
            batch: vec![0; size.num_workers],
            queued: vec![0; size.num_workers],
            prefilling: VecDeque::new(),
            decoding: VecDeque::new(),
            times: Times::default(),
            quality: Quality::default(),
        }
    }

    fn step(&mut self, prompt: &Prompt, is_timed: bool) {
        self.router.prepare(prompt);
        let start = Instant::now();
        let decision = if is_timed {
            measured_decision(&mut self.router, prompt)
        } else {
            self.router.decide(prompt)
        };
        self.times.decide.add(start.elapsed(), is_timed);
        let Decision {
            worker, booking, ..
        } = decision;
        let cached = self.caches.held_tokens(worker, prompt);
        let most = prompt.usable().len() as u64 * u64::from(TRACE_BLOCK);
        let believed = decision.cached_tokens.min(most);
        assert_eq!(believed, cached, "the index is not what the worker holds");
        let prefill = u64::from(prompt.input) - cached;
        if is_timed {
            let ahead = self.queued[worker] + prefill;
            self.quality.add(prompt.input.into(), cached, ahead);
        }
        self.queued[worker] += prefill;
        self.batch[worker] += 1;
        self.prefilling.push_back(Live {
            booking,
            worker,
            prefill,
        });
        let change = self.caches.store(worker, prompt);
        let num_blocks = change.num_blocks();
        if num_blocks > 0 {
            let taken = self.router.apply(&[change]);
            self.times.add_events(num_blocks, taken, is_timed);
        }
        self.advance(is_timed);
    }

    /// Ends the oldest prefill and the oldest request, where there are more of them than shall be.
    fn advance(&mut self, is_timed: bool) {
        if self.prefilling.len() > self.size.num_prefilling()
            && let Some(live) = self.prefilling.pop_front()
        {
            let start = Instant::now();
            self.router.prefill_done(&live.booking);
            self.times.prefill_done.add(start.elapsed(), is_timed);
            self.queued[live.worker] -= live.prefill;
            self.decoding.push_back(live);
        }
        if self.decoding.len() > self.size.num_live
            && let Some(live) = self.decoding.pop_front()
        {
            let start = Instant::now();
            self.router.free(live.booking);
            self.times.free.add(start.elapsed(), is_timed);
            self.batch[live.worker] -= 1;
        }
    }
}

impl<R: Router> Side for Fleet<R> {
    fn take_turn(&mut self, prompts: &[Prompt], is_timed: bool) {
        for prompt in prompts {
            self.step(prompt, is_timed);
        }
        if is_timed {
            self.quality.add_spread(&self.batch);
        }
    }

    fn report(&mut self) -> Report {
        Report {
            name: self.router.name(),
            registration_rate: self.router.registration_rate(),
            num_entries: self.caches.num_entries,
            bytes_per_entry: self.bytes_per_entry,
            fill_rate: self.fill_rate,
            times: std::mem::take(&mut self.times),
            quality: std::mem::take(&mut self.quality),
            details: self.router.details(),
        }
    }
}
