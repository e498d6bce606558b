//! The rival's side, put together from its public parts in the order in which its own queue calls them
//! (`SchedulerQueueActor::admit_one`): look up, estimate, project loads, select, book. Its queue, its channels and its
//! asynchronous service around that are left out, which favours it.

use std::{
    collections::HashMap,
    mem,
    time::{Duration, Instant as Clock},
};

use dynamo_kv_router::{
    ActiveSequencesMultiWorker, DefaultWorkerSelector, KvRouterConfig, NoopSequencePublisher,
    SchedulingRequest, SequenceRequest, WorkerLoadProjection, WorkerSelectionInput, WorkerSelector,
    WorkerType,
    indexer::{MatchDetails, TieredMatchDetails},
    protocols::{RoutingConstraints, WorkerConfigLike, WorkerId, WorkerWithDpRank},
    scheduling::{
        OverlapAnalysis, OverlapSignals, ScheduleMode, effective_prefill_tokens,
        prefill_load_hint_from_effective_tokens,
    },
    sequences::topology::WorkerDpRange,
};
use rustc_hash::FxHashMap;
use tokio::time::Instant;

use crate::{
    caches::Change,
    dynamo_index::{Index, Kind, router_events},
    fleet::{Decision, Router, Size},
    prompts::Prompt,
    report::Samples,
    trace::TRACE_BLOCK,
};

/// What the selector is told of a worker.
struct Worker {
    total_kv_blocks: u64,
}

impl WorkerConfigLike for Worker {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        1
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        Some(8_192)
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        Some(self.total_kv_blocks)
    }
}

/// Parts of a decision, timed apart.
#[derive(Default)]
struct Parts {
    find: Samples,
    estimate: Samples,
    project: Samples,
    select: Samples,
    book: Samples,
}

pub struct Dynamo {
    kind: Kind,
    index: Index,
    config: KvRouterConfig,
    selector: DefaultWorkerSelector,
    workers: HashMap<WorkerId, Worker>,
    slots: ActiveSequencesMultiWorker<NoopSequencePublisher>,
    /// Kept from decision to decision, as its queue does.
    loads: FxHashMap<WorkerWithDpRank, WorkerLoadProjection>,
    registration_rate: f64,
    prepared: Option<SchedulingRequest>,
    parts: Parts,
}

impl Dynamo {
    pub fn new(size: Size, kind: Kind) -> Self {
        let label = WorkerType::Aggregated.default_selector_label();
        let slots = ActiveSequencesMultiWorker::new_without_expiry(
            NoopSequencePublisher,
            TRACE_BLOCK as usize,
            HashMap::new(),
            false,
            0,
            label,
        );
        let mut workers = HashMap::new();
        let start = Clock::now();
        for id in 0..size.num_workers as WorkerId {
            slots.register_worker(WorkerDpRange::new(id, 0, 1)).unwrap();
            let total_kv_blocks = size.kv_blocks().into();
            workers.insert(id, Worker { total_kv_blocks });
        }
        Self {
            kind,
            index: Index::new(kind),
            config: KvRouterConfig::default(),
            selector: DefaultWorkerSelector::new(None, label),
            registration_rate: size.num_workers as f64 / start.elapsed().as_secs_f64(),
            workers,
            slots,
            loads: FxHashMap::default(),
            prepared: None,
            parts: Parts::default(),
        }
    }
}

/// A request as its queue gets it, before anything is known of the workers.
fn scheduling_request(prompt: &Prompt) -> SchedulingRequest {
    SchedulingRequest {
        mode: ScheduleMode::Tracked {
            request_id: prompt.number.to_string(),
        },
        token_seq: Some(prompt.chain.iter().map(|hash| hash.0).collect()),
        isl_tokens: prompt.input as usize,
        lora_name: None,
        expected_output_tokens: Some(prompt.output),
        affinity_target: None,
        pinned_worker: None,
        allowed_worker_ids: None,
        routing_constraints: RoutingConstraints::default(),
        router_config_override: None,
        track_prefill_tokens: true,
        priority_jump: 0.0,
        strict_priority: 0,
        policy_class: None,
        session_context: None,
        overlap: OverlapSignals::default(),
        kv_transfer_candidates: None,
        retain_kv_transfer_chain: false,
        shared_cache_hits: None,
        worker_loads: FxHashMap::default(),
        resp_tx: None,
    }
}

impl Router for Dynamo {
    type Booking = String;

    fn name(&self) -> String {
        format!("Dynamo, {} index", self.kind.name())
    }

    fn registration_rate(&self) -> Option<f64> {
        Some(self.registration_rate)
    }

    fn prepare(&mut self, prompt: &Prompt) {
        self.prepared = Some(scheduling_request(prompt));
    }

    fn decide(&mut self, prompt: &Prompt) -> Decision<String> {
        let mut request = self.prepared.take().unwrap();
        let mut lap = Lap::start();
        let details = TieredMatchDetails {
            device: MatchDetails {
                overlap_scores: self.index.find(&prompt.local),
                ..MatchDetails::default()
            },
            ..TieredMatchDetails::default()
        };
        lap.add_to(&mut self.parts.find);
        request.overlap = OverlapAnalysis::new(&self.config, TRACE_BLOCK, &details).signals();
        lap.add_to(&mut self.parts.estimate);
        let now = Instant::now();
        request.worker_loads = mem::take(&mut self.loads);
        let tokens = request.token_seq.as_deref();
        self.slots
            .bench_project_worker_loads_into(tokens, now, &mut request.worker_loads);
        lap.add_to(&mut self.parts.project);
        let input = WorkerSelectionInput::configured(
            &self.workers,
            &request,
            request.eligibility(),
            TRACE_BLOCK,
        );
        let selected = self.selector.select_worker(input).unwrap();
        lap.add_to(&mut self.parts.select);
        let id = request.mode.request_id().unwrap().to_owned();
        let prefill = effective_prefill_tokens(request.isl_tokens, selected.cached_tokens);
        let hint = prefill_load_hint_from_effective_tokens(request.isl_tokens, prefill);
        let booking = SequenceRequest {
            request_id: id.clone(),
            token_sequence: request.token_seq.take(),
            track_prefill_tokens: request.track_prefill_tokens,
            expected_output_tokens: request.expected_output_tokens,
            prefill_load_hint: Some(hint.unwrap()),
            worker: selected.worker,
            lora_name: None,
        };
        self.slots.add_request(booking, Instant::now()).unwrap();
        self.loads = mem::take(&mut request.worker_loads);
        lap.add_to(&mut self.parts.book);
        Decision {
            worker: selected.worker.worker_id as usize,
            cached_tokens: selected.cached_tokens as u64,
            booking: id,
        }
    }

    fn prefill_done(&mut self, booking: &String) {
        let now = Instant::now();
        self.slots.mark_prefill_completed(booking, now).unwrap();
    }

    fn free(&mut self, booking: String) {
        self.slots.free(&booking, Instant::now()).unwrap();
    }

    fn apply(&mut self, changes: &[Change]) -> Duration {
        let events = router_events(changes);
        let start = Clock::now();
        self.index.apply(events);
        start.elapsed()
    }

    fn details(&mut self) -> Option<String> {
        let parts = &mut self.parts;
        let medians = [
            ("look up", &mut parts.find),
            ("estimate", &mut parts.estimate),
            ("project loads", &mut parts.project),
            ("select", &mut parts.select),
            ("book", &mut parts.book),
        ]
        .map(|(name, samples)| format!("{name} {:.2}", samples.micros([500])[0]));
        Some(format!(
            "Dynamo's decision at the median, µs: {} (untimed decisions of the start included)",
            medians.join(", ")
        ))
    }
}

/// Time since the part before.
struct Lap(Clock);

impl Lap {
    fn start() -> Self {
        Self(Clock::now())
    }

    fn add_to(&mut self, samples: &mut Samples) {
        let now = Clock::now();
        samples.add(now - self.0, true);
        self.0 = now;
    }
}
