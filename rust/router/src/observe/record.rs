//! What is taken down of one request on its way.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use orchestra_core::{ErrorCode, scheduler::AdmissionClass, step::FinishReason};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::Instant;

use super::{Observers, TraceContext};

/// Most decisions that one request is remembered with: its choices and replays may be more.
const DECISIONS_MAX: usize = 64;

/// A request as its door sees it come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) door: &'static str,
    pub(crate) route: &'static str,
    pub(crate) request_id: &'a str,
    pub(crate) traceparent: Option<&'a [u8]>,
    pub(crate) tracestate: Option<&'a [u8]>,
    pub(crate) wants_explanation: bool,
}

/// The points that a request passes, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its prompt is token ids, or for a foreign engine read and checked.
    Tokenised,
    /// It has a seat.
    Admitted,
    /// It has a worker.
    Placed,
    /// Its worker was told to start.
    Dispatched,
    /// Its first token came.
    FirstToken,
}

/// How many [`Stage`]s there are.
const NUM_STAGES: usize = 5;

/// Why a worker was chosen.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Decision {
    /// Milliseconds since the request arrived.
    pub(crate) at_ms: u64,
    pub(crate) choice: usize,
    pub(crate) worker: String,
    /// Whether another worker ran the choice before.
    pub(crate) is_replay: bool,
    /// Prompt tokens whose KV the worker was thought to hold.
    pub(crate) predicted_cached_tokens: u32,
    /// Those that it said it held; absent until its first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reported_cached_tokens: Option<u32>,
    /// KV of the prompt that was to come from another worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kv_move: Option<KvMove>,
    /// Every worker judged; only where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) explanation: Option<Explained>,
}

/// KV that a worker gets from another one.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct KvMove {
    /// `fetch`: the other one holds it. `split`: it is to compute it.
    pub(crate) kind: &'static str,
    /// The other one.
    pub(crate) from: String,
    /// Leading blocks of the prompt.
    pub(crate) blocks: u32,
}

/// How the workers stood when a request was placed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Explained {
    /// The best ones, best first.
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) num_more_candidates: u32,
    /// Workers of the model that could not take the request, and why.
    pub(crate) ineligible: Vec<(String, &'static str)>,
    pub(crate) num_more_ineligible: usize,
}

/// A worker that could take the request.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Candidate {
    pub(crate) worker: String,
    pub(crate) cost: u64,
    pub(crate) has_room: bool,
    pub(crate) cached_tokens: u32,
    pub(crate) queued_prefill_tokens: u64,
    pub(crate) batch: u32,
    pub(crate) kv_blocks: u32,
    pub(crate) kv_blocks_free: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kv_move: Option<KvMove>,
}

/// What is known of a request so far.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) stages: [Option<Instant>; NUM_STAGES],
    pub(super) ended: Option<Instant>,
    pub(super) model: String,
    pub(super) tenant: Option<Arc<str>>,
    pub(super) class: Option<AdmissionClass>,
    /// HTTP's or gRPC's.
    pub(super) status: u16,
    pub(super) code: Option<ErrorCode>,
    pub(super) finish: Option<FinishReason>,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) replays: u32,
    pub(super) retries: u32,
    pub(super) pauses: u32,
    pub(super) decisions: Vec<Decision>,
    /// Of the decision that is about to be made.
    explanation: Option<Explained>,
}

impl Facts {
    /// The worker that was chosen last.
    pub(super) fn worker(&self) -> &str {
        self.decisions
            .last()
            .map_or("", |decision| &decision.worker)
    }
}

/// One request.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) request_id: String,
    pub(super) door: &'static str,
    pub(super) route: &'static str,
    pub(super) arrived: Instant,
    pub(super) arrived_at: SystemTime,
    pub(super) trace: Option<TraceContext>,
    is_explained: bool,
    pub(super) facts: Mutex<Facts>,
}

/// The times of a request that is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passed {
    /// Arrival to token ids.
    pub(crate) tokenise: Option<Duration>,
    /// Token ids to dispatch: the wait for a seat and a worker.
    pub(crate) queue: Option<Duration>,
    /// Arrival to the first token.
    pub(crate) ttft: Option<Duration>,
    /// Arrival to the end.
    pub(crate) total: Duration,
}

/// The share in a request's entry that keeps it open. What holds none of it, as [`Default`] gives it, is not recorded.
#[derive(Clone, Debug, Default)]
pub struct Record(Option<Arc<Open>>);

#[derive(Debug)]
struct Open {
    entry: Arc<Entry>,
    observers: Arc<Observers>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.entry.facts.lock().ended = Some(Instant::now());
        self.observers.ended(&self.entry);
    }
}

impl Record {
    pub(super) fn new(
        arrival: &Arrival<'_>,
        is_explained: bool,
        trace: Option<TraceContext>,
        observers: Arc<Observers>,
    ) -> Self {
        let entry = Entry {
            request_id: arrival.request_id.to_owned(),
            door: arrival.door,
            route: arrival.route,
            arrived: Instant::now(),
            arrived_at: SystemTime::now(),
            trace,
            is_explained,
            facts: Mutex::default(),
        };
        let entry = Arc::new(entry);
        Self(Some(Arc::new(Open { entry, observers })))
    }

    fn note(&self, note: impl FnOnce(&mut Facts)) {
        if let Some(open) = &self.0 {
            note(&mut open.entry.facts.lock());
        }
    }

    /// The `traceparent` for what the request causes elsewhere, where it has a span of ours that is its parent.
    pub(crate) fn traceparent(&self) -> Option<String> {
        let open = self.0.as_ref()?;
        let trace = open.entry.trace.as_ref()?;
        open.observers.has_traces().then(|| trace.traceparent())
    }

    /// The trace that it belongs to, as logs write it.
    pub(crate) fn trace_id(&self) -> Option<String> {
        let trace = self.0.as_ref()?.entry.trace.as_ref();
        trace.map(TraceContext::trace_id_text)
    }

    /// Whether every worker is to be judged when the request is placed.
    pub(crate) fn wants_explanation(&self) -> bool {
        self.0.as_ref().is_some_and(|open| open.entry.is_explained)
    }

    /// The request passed this point; of several prompts, the first to.
    pub(crate) fn reached(&self, stage: Stage) {
        let now = Instant::now();
        self.note(|facts| {
            facts.stages[stage as usize].get_or_insert(now);
        });
    }

    /// The model that it names, which is one that is served.
    pub(crate) fn model(&self, name: &str) {
        self.note(|facts| name.clone_into(&mut facts.model));
    }

    /// Whose it is, where that is a tenant, and how urgent.
    pub(crate) fn caller(&self, tenant: &Arc<str>, class: AdmissionClass) {
        self.note(|facts| {
            facts.tenant = Some(Arc::clone(tenant)).filter(|name| !name.is_empty());
            facts.class = Some(class);
        });
    }

    /// One of its prompts has this many tokens.
    pub(crate) fn prompt(&self, num_tokens: usize) {
        self.note(|facts| facts.prompt_tokens += num_tokens as u64);
    }

    /// How the workers stand for the decision that is about to be made.
    pub(crate) fn explained(&self, explanation: Option<Explained>) {
        self.note(|facts| facts.explanation = explanation);
    }

    /// A worker was chosen for one of its choices.
    pub(crate) fn placed(
        &self,
        (choice, is_replay): (usize, bool),
        worker: &str,
        predicted_cached_tokens: u32,
        kv_move: Option<KvMove>,
    ) {
        let Some(Open { entry, observers }) = self.0.as_deref() else {
            return;
        };
        self.reached(Stage::Placed);
        let elapsed = entry.arrived.elapsed();
        let mut facts = entry.facts.lock();
        if is_replay {
            // Before its first token nobody noticed that another worker had it.
            if facts.stages[Stage::FirstToken as usize].is_some() {
                facts.replays += 1;
            } else {
                facts.retries += 1;
            }
        }
        let is_first = facts.decisions.is_empty();
        let explanation = facts.explanation.take();
        if facts.decisions.len() >= DECISIONS_MAX {
            // The last one says which worker has the request.
            facts.decisions.pop();
        }
        facts.decisions.push(Decision {
            at_ms: elapsed.as_millis() as u64,
            choice,
            worker: worker.to_owned(),
            is_replay,
            predicted_cached_tokens,
            reported_cached_tokens: None,
            kv_move,
            explanation,
        });
        drop(facts);
        if is_first {
            observers.remember(entry);
        }
    }

    /// It was stopped for a more urgent one, to go on later.
    pub(crate) fn paused(&self) {
        self.note(|facts| facts.pauses += 1);
    }

    /// A choice's first token came; its worker had the KV of so many prompt tokens.
    pub(crate) fn first_token(&self, choice: usize, cached_tokens: u32) {
        self.reached(Stage::FirstToken);
        self.cached(choice, cached_tokens);
    }

    /// The choice's worker had the KV of so many prompt tokens.
    pub(crate) fn cached(&self, choice: usize, cached_tokens: u32) {
        self.note(|facts| {
            facts.cached_tokens += u64::from(cached_tokens);
            let mut decisions = facts.decisions.iter_mut().rev();
            if let Some(decision) = decisions.find(|decision| decision.choice == choice) {
                decision.reported_cached_tokens = Some(cached_tokens);
            }
        });
    }

    /// A choice ended after so many tokens.
    pub(crate) fn finished(&self, reason: FinishReason, completion_tokens: u32) {
        self.note(|facts| {
            facts.finish = Some(reason);
            facts.completion_tokens += u64::from(completion_tokens);
        });
    }

    /// The request failed or was refused.
    pub(crate) fn failed(&self, code: ErrorCode) {
        self.note(|facts| facts.code = Some(code));
    }

    /// What the door answered: HTTP's or gRPC's status.
    pub(crate) fn status(&self, status: u16) {
        self.note(|facts| facts.status = status);
    }
}

impl Entry {
    /// Its times so far.
    pub(super) fn passed(&self) -> Passed {
        let facts = self.facts.lock();
        let since_arrival = |stage: Stage| Some(facts.stages[stage as usize]? - self.arrived);
        let tokenise = since_arrival(Stage::Tokenised);
        let dispatched = since_arrival(Stage::Dispatched);
        Passed {
            tokenise,
            queue: dispatched
                .zip(tokenise)
                .map(|(dispatched, tokenised)| dispatched.saturating_sub(tokenised)),
            ttft: since_arrival(Stage::FirstToken),
            total: facts.ended.unwrap_or_else(Instant::now) - self.arrived,
        }
    }

    /// Says that the request was slow, and where its time went.
    pub(super) fn warn_slow(&self, passed: &Passed) {
        let facts = self.facts.lock();
        let ms = |time: Option<Duration>| time.map(|time| time.as_millis() as u64);
        tracing::warn!(
            request_id = self.request_id,
            model = facts.model,
            worker_id = facts.worker(),
            prompt_tokens = facts.prompt_tokens,
            cached_tokens = facts.cached_tokens,
            completion_tokens = facts.completion_tokens,
            replays = facts.replays,
            pauses = facts.pauses,
            tokenise_ms = ms(passed.tokenise),
            queue_ms = ms(passed.queue),
            ttft_ms = ms(passed.ttft),
            total_ms = ms(Some(passed.total)),
            "slow request"
        );
    }
}
