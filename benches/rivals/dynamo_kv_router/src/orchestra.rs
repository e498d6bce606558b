//! Our side: [`Scheduler::route`] decides and reserves, [`Scheduler::release`] gives back. No load reports, so both
//! routers know the same of the workers: what they booked themselves, and the KV events.

use std::{
    iter,
    time::{Duration, Instant},
};

use orchestra_core::{
    HashSeed, Time,
    scheduler::{
        HashedPrompt, ReservationId, RoutePolicy, RouteRequest, Scheduler, SchedulerConfig,
        WorkerId, WorkerSpec,
    },
    step::KvEvent,
};
use rustc_hash::FxHashMap;

use crate::{
    caches::Change,
    fleet::{Decision, Router, Size},
    prompts::Prompt,
    scan::MAX_NUM_SEQS,
    trace::TRACE_BLOCK,
};

pub struct Orchestra {
    policy: RoutePolicy,
    scheduler: Scheduler,
    seed: HashSeed,
    ids: Vec<WorkerId>,
    by_id: FxHashMap<WorkerId, usize>,
    registration_rate: f64,
    tokens: Vec<u32>,
}

impl Orchestra {
    pub fn new(size: Size, policy: RoutePolicy) -> Self {
        let spec = |name: usize| WorkerSpec {
            name: format!("worker-{name}"),
            model: "model".to_owned(),
            block_size: TRACE_BLOCK,
            num_blocks: size.kv_blocks(),
            max_num_seqs: MAX_NUM_SEQS,
            max_model_len: 1 << 20,
            ..WorkerSpec::default()
        };
        let config = SchedulerConfig {
            policy,
            ..SchedulerConfig::default()
        };
        let mut scheduler = Scheduler::new(config).unwrap();
        let start = Instant::now();
        let ids: Vec<WorkerId> = (0..size.num_workers)
            .map(|name| scheduler.add_worker(spec(name)).unwrap())
            .collect();
        Self {
            policy,
            registration_rate: ids.len() as f64 / start.elapsed().as_secs_f64(),
            seed: spec(0).hash_seed("", None),
            by_id: iter::zip(ids.iter().copied(), 0..).collect(),
            ids,
            scheduler,
            tokens: vec![0; 1 << 20],
        }
    }
}

/// The prompt as both our search and the scan take it.
pub fn route_request<'a>(
    prompt: &'a Prompt,
    seed: HashSeed,
    tokens: &'a [u32],
) -> RouteRequest<'a> {
    RouteRequest {
        model: "model",
        token_ids: &tokens[..prompt.input as usize],
        max_tokens: prompt.output,
        hashed: Some(HashedPrompt {
            seed,
            block_size: TRACE_BLOCK,
            blocks: &prompt.chain,
        }),
        ..RouteRequest::default()
    }
}

impl Router for Orchestra {
    type Booking = ReservationId;

    fn name(&self) -> String {
        format!("Orchestra, {:?}", self.policy)
    }

    fn registration_rate(&self) -> Option<f64> {
        Some(self.registration_rate)
    }

    fn prepare(&mut self, _prompt: &Prompt) {}

    fn decide(&mut self, prompt: &Prompt) -> Decision<ReservationId> {
        let request = route_request(prompt, self.seed, &self.tokens);
        let reservation = self.scheduler.route(&request, Time::ZERO).unwrap();
        Decision {
            worker: self.by_id[&reservation.worker],
            cached_tokens: reservation.num_cached_tokens.into(),
            booking: reservation.id,
        }
    }

    fn prefill_done(&mut self, booking: &ReservationId) {
        self.scheduler.prefill_done(*booking, Time::ZERO);
    }

    fn free(&mut self, booking: ReservationId) {
        self.scheduler.release(booking);
    }

    fn apply(&mut self, changes: &[Change]) -> Duration {
        let of_change = |change: &Change| {
            let stored = KvEvent::Stored(change.stored.clone());
            let removed = KvEvent::Removed(change.removed.clone());
            [stored, removed].map(|event| (self.ids[change.worker], event))
        };
        let events: Vec<_> = changes.iter().flat_map(of_change).collect();
        let start = Instant::now();
        for (id, event) in &events {
            self.scheduler.apply_kv_event(*id, event).unwrap();
        }
        start.elapsed()
    }
}
