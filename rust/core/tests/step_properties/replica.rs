//! A scheduler, a fake model, and everything that has to be true of the two after every step.

mod plan_checks;

use std::collections::{BTreeMap, VecDeque};

use crate::{
    fake_model::{FakeModel, logprobs_of, reference_output},
    moves::Moves,
    router_view::RouterView,
};
use orchestra_core::{
    HashSeed, RejectReason, RequestId, SamplingParams, Time, TokenId,
    step::{
        FinishReason, Request, StepError, StepOutput, StepPlan, StepScheduler, StepSchedulerConfig,
        TokenUpdate,
    },
};

/// What the test knows of one accepted request.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(crate) prompt: Vec<TokenId>,
    sampling: SamplingParams,
    output: Vec<TokenId>,
    num_cached_tokens: Option<u32>,
    finish_reason: Option<FinishReason>,
    /// Its number among the first starts.
    seniority: Option<usize>,
    /// Later requests that started before this one.
    num_overtakes: u32,
    pub(crate) wish: Wish,
}

/// What is asked of a request besides its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Nothing,
    /// Another worker brings so many blocks.
    Await(u32),
    /// Only so many blocks are wanted.
    Prefill(u32),
}

impl Tracked {
    /// The prompt and the output so far.
    pub(crate) fn known_tokens(&self) -> Vec<TokenId> {
        [self.prompt.as_slice(), &self.output].concat()
    }
}

/// A request as a test writes it; its id and seed are given when it is sent.
#[derive(Clone, Debug)]
pub(crate) struct NewRequest {
    pub(crate) prompt: Vec<TokenId>,
    /// Tokens of its output that another replica has already generated.
    pub(crate) num_replayed: usize,
    pub(crate) sampling: SamplingParams,
    pub(crate) hash_seed: HashSeed,
}

/// A step that is not committed, with its output once it has run.
struct InFlight {
    plan: StepPlan,
    output: Option<StepOutput>,
}

pub(crate) struct Replica {
    pub(crate) scheduler: StepScheduler,
    pub(crate) config: StepSchedulerConfig,
    pub(crate) model: FakeModel,
    pub(crate) requests: BTreeMap<RequestId, Tracked>,
    /// In order; those that have run, before the others.
    executing: VecDeque<InFlight>,
    /// Most steps that were ever in flight, and plans that had part of a prompt whose beginning was.
    pub(crate) num_in_flight_max: usize,
    pub(crate) num_chunks_in_flight: u64,
    /// Rows that were planned before their token was known.
    pub(crate) num_pending_rows: u64,
    pub(crate) moves: Moves,
    num_started: usize,
    /// The most senior request, once it has been seen running as such.
    safe: Option<RequestId>,
    /// What a router that listens to the events believes to be cached.
    router_view: RouterView,
    now: Time,
    pub(crate) num_steps: u64,
    /// Steps that were executing when their replica started over.
    pub(crate) num_forgotten_steps: u64,
    /// Tokens computed, of all requests together.
    pub(crate) num_computed_tokens: u64,
}

impl Replica {
    pub(crate) fn new(scheduler: StepScheduler, config: StepSchedulerConfig) -> Self {
        Self {
            scheduler,
            model: FakeModel::new(&config),
            config,
            requests: BTreeMap::new(),
            executing: VecDeque::new(),
            num_in_flight_max: 0,
            num_chunks_in_flight: 0,
            num_pending_rows: 0,
            moves: Moves::default(),
            num_started: 0,
            safe: None,
            router_view: RouterView::default(),
            now: Time::ZERO,
            num_steps: 0,
            num_forgotten_steps: 0,
            num_computed_tokens: 0,
        }
    }

    pub(crate) fn add(&mut self, new: NewRequest) -> Result<RequestId, RejectReason> {
        self.add_with(new, Wish::Nothing)
    }

    /// Sends a request; on a refusal nothing may have changed.
    pub(crate) fn add_with(
        &mut self,
        new: NewRequest,
        wish: Wish,
    ) -> Result<RequestId, RejectReason> {
        let id = RequestId(self.requests.len() as u64);
        let sampling = SamplingParams {
            seed: id.0,
            ..new.sampling
        };
        let mut output = reference_output(&new.prompt, &sampling, &self.config.eos_token_ids);
        // Its last token would have ended the request, so it is never replayed.
        output.truncate(new.num_replayed.min(output.len() - 1));
        let request = Request {
            id,
            prompt_token_ids: new.prompt.clone(),
            output_token_ids: output.clone(),
            sampling: sampling.clone(),
            hash_seed: new.hash_seed,
        };
        let before = self.scheduler.stats();
        let result = self.send(request.clone(), wish);
        if let Err(reason) = result {
            assert_eq!(self.scheduler.stats(), before, "a refusal changes nothing");
            return Err(reason);
        }
        // All of a prompt may be too long where a part of it is not.
        if !matches!(wish, Wish::Prefill(_)) {
            let again = self.scheduler.add_request(request, self.now);
            assert_eq!(again, Err(RejectReason::DuplicateId));
        }
        let tracked = Tracked {
            prompt: new.prompt,
            sampling,
            output,
            num_cached_tokens: None,
            finish_reason: None,
            seniority: None,
            num_overtakes: 0,
            wish,
        };
        self.requests.insert(id, tracked);
        Ok(id)
    }

    fn send(&mut self, request: Request, wish: Wish) -> Result<(), RejectReason> {
        match wish {
            Wish::Nothing => self.scheduler.add_request(request, self.now),
            Wish::Prefill(num_blocks) => self.scheduler.add_prefill(request, num_blocks, self.now),
            Wish::Await(num_blocks) => {
                let id = request.id;
                let deadline = Time(self.now.0 + 20_000);
                let awaited = self
                    .scheduler
                    .add_awaiting(request, num_blocks, deadline, self.now)?;
                self.moves.incoming.extend(awaited.map(|it| (id, it)));
                Ok(())
            }
        }
    }

    /// Ends the `index`-th request that is unfinished, if there is one.
    pub(crate) fn abort(&mut self, index: usize) {
        let unfinished: Vec<RequestId> = self.unfinished().collect();
        if unfinished.is_empty() {
            return;
        }
        let id = unfinished[index % unfinished.len()];
        assert!(self.scheduler.abort(id));
        assert!(!self.scheduler.abort(id), "a request ends once");
        self.end_by_abort(id);
    }

    pub(crate) fn abort_all(&mut self) {
        let mut ended = self.scheduler.abort_all();
        ended.sort_unstable();
        assert_eq!(ended, self.unfinished().collect::<Vec<_>>());
        for id in ended {
            self.end_by_abort(id);
        }
        assert!(!self.scheduler.has_work());
        let is_filling = |step: &InFlight| !step.plan.filled.is_empty();
        let has_moves = self.moves.is_any_open() || self.executing.iter().any(is_filling);
        assert!(has_moves || self.scheduler.stats().kv_blocks_used == 0);
    }

    /// Starts over, in the middle of a step or between two; the model has lost its KV.
    pub(crate) fn forget_all(&mut self) {
        let mut ended = self.scheduler.forget_all();
        ended.sort_unstable();
        assert_eq!(ended, self.unfinished().collect::<Vec<_>>());
        for id in ended {
            self.end_by_abort(id);
        }
        let steps = std::mem::take(&mut self.executing);
        self.num_forgotten_steps += steps.len() as u64;
        let filled = steps.into_iter().flat_map(|step| step.plan.filled);
        self.moves.forget_contents(filled.collect());
        self.model.lose_kv();
        assert_eq!(self.scheduler.cached_block_hashes(), []);
        assert_eq!(self.scheduler.kept_block_hashes(), []);
        assert!(!self.scheduler.has_work());
        self.check();
    }

    fn end_by_abort(&mut self, id: RequestId) {
        let request = self.requests.get_mut(&id).expect("a request that was sent");
        request.finish_reason = Some(FinishReason::Abort);
    }

    fn unfinished(&self) -> impl Iterator<Item = RequestId> {
        let unfinished = self
            .requests
            .iter()
            .filter(|(_, it)| it.finish_reason.is_none());
        unfinished.map(|(&id, _)| id)
    }

    /// Plans a step, unless as many execute as may. Returns whether one executes now.
    pub(crate) fn schedule(&mut self) -> bool {
        self.now = Time(self.now.0 + 1000);
        let plan = self.scheduler.schedule(self.now);
        if self.executing.len() == self.config.max_steps_in_flight as usize {
            assert_eq!(plan, None, "no more steps than may be in flight");
            return true;
        }
        // What is left may need what a step in flight draws.
        let may_wait = self.moves.is_any_open() || !self.executing.is_empty();
        assert!(
            plan.is_some() == self.scheduler.has_work() || may_wait,
            "work means a plan"
        );
        let Some(plan) = plan else {
            return !self.executing.is_empty();
        };
        self.num_steps += 1;
        assert_eq!(plan.step_id, self.num_steps);
        self.check_shape(&plan);
        self.note_starts(&plan);
        self.check_senior(&plan);
        self.check_in_flight(&plan);
        self.num_computed_tokens += plan.token_ids.len() as u64;
        self.executing.push_back(InFlight { plan, output: None });
        self.num_in_flight_max = self.num_in_flight_max.max(self.executing.len());
        true
    }

    /// The plan that was made last, while its step executes.
    pub(crate) fn newest(&self) -> Option<&StepPlan> {
        self.executing.back().map(|step| &step.plan)
    }

    /// Runs the oldest step that has not run, if there is one.
    pub(crate) fn execute(&mut self) {
        let Self {
            executing, model, ..
        } = self;
        if let Some(step) = executing.iter_mut().find(|step| step.output.is_none()) {
            step.output = Some(model.execute(&step.plan));
        }
    }

    /// Commits the oldest planned step, if there is one, and executes it before where it has not run.
    pub(crate) fn commit(&mut self) {
        let Some(InFlight { plan, output }) = self.executing.pop_front() else {
            let output = StepOutput {
                step_id: self.num_steps,
                ..StepOutput::default()
            };
            let error = self.scheduler.update_from_output(&output, self.now);
            assert_eq!(
                error,
                Err(StepError::NoStep {
                    got: self.num_steps
                })
            );
            return;
        };
        let output = output.unwrap_or_else(|| self.model.execute(&plan));
        self.now = Time(self.now.0 + 100 * plan.token_ids.len() as u64);
        let updates = self
            .scheduler
            .update_from_output(&output, self.now)
            .expect("an output");
        for update in &updates {
            self.take_update(update);
        }
        for id in self.scheduler.take_prefilled() {
            let request = self.requests.get_mut(&id).expect("a request that was sent");
            assert!(matches!(request.wish, Wish::Prefill(_)), "{id}");
            assert_eq!(request.finish_reason, None, "{id} has ended");
            request.finish_reason = Some(FinishReason::Length);
        }
        self.note_filled(plan.filled);
        self.check();
    }

    /// Sends outputs that do not fit the step: each is refused, and the right one still counts.
    pub(crate) fn commit_wrongly(&mut self) {
        let Some(InFlight { plan, .. }) = self.executing.front() else {
            return;
        };
        let expected = plan.samples.len();
        let output = StepOutput {
            step_id: plan.step_id,
            token_ids: vec![0; expected + 1],
            logprobs: Vec::new(),
        };
        let before = self.scheduler.stats();
        let error = self.scheduler.update_from_output(&output, self.now);
        assert_eq!(
            error,
            Err(StepError::WrongTokenCount {
                expected,
                got: expected + 1
            })
        );
        if plan.samples.iter().any(|sample| sample.logprobs.is_some()) {
            let output = StepOutput {
                token_ids: vec![0; expected],
                ..output.clone()
            };
            let error = self.scheduler.update_from_output(&output, self.now);
            assert_eq!(
                error,
                Err(StepError::WrongLogprobCount { expected, got: 0 })
            );
        }
        let late = StepOutput {
            step_id: plan.step_id - 1,
            ..output
        };
        let error = self.scheduler.update_from_output(&late, self.now);
        let (expected, got) = (plan.step_id, plan.step_id - 1);
        assert_eq!(error, Err(StepError::WrongStep { expected, got }));
        assert_eq!(self.scheduler.stats(), before);
    }

    fn take_update(&mut self, update: &TokenUpdate) {
        let id = update.request_id;
        let request = self.requests.get_mut(&id).expect("a request that was sent");
        assert_eq!(request.finish_reason, None, "{id} has ended");
        assert_eq!(update.output_index as usize, request.output.len(), "{id}");
        request.output.push(update.token_id);
        let logprobs = request
            .sampling
            .logprobs
            .map(|_| logprobs_of(id, update.token_id));
        assert_eq!(update.logprobs, logprobs, "{id}");
        let num_cached = *request
            .num_cached_tokens
            .get_or_insert(update.num_cached_tokens);
        assert_eq!(
            update.num_cached_tokens, num_cached,
            "{id}: said once and for all"
        );
        assert!(num_cached as usize <= request.prompt.len(), "{id}");
        assert!(update.num_fetched_tokens <= num_cached, "{id}");
        assert!(!matches!(request.wish, Wish::Prefill(_)), "{id} draws");
        self.moves.num_fetched_tokens += u64::from(update.num_fetched_tokens);

        let eos = &self.config.eos_token_ids;
        let reference = reference_output(&request.prompt, &request.sampling, eos);
        assert_eq!(
            request.output[..],
            reference[..request.output.len()],
            "{id} alone"
        );
        let is_last = request.output.len() == reference.len();
        assert_eq!(
            update.finish_reason.is_some(),
            is_last,
            "{id} ends where it ends alone"
        );
        let is_stop = (eos.contains(&update.token_id) && !request.sampling.ignore_eos)
            || request.sampling.stop_token_ids.contains(&update.token_id);
        let reason = if is_stop {
            FinishReason::Stop
        } else {
            FinishReason::Length
        };
        request.finish_reason = is_last.then_some(reason);
    }

    fn check(&mut self) {
        self.scheduler.check_integrity();
        self.router_view.follow(&mut self.scheduler);
    }

    /// Runs until nothing is left. The most senior request computes at least one token in every step, or in one of so
    /// many as may be in flight; so the number of steps is bounded by what each request could compute as the most
    /// senior one, once before it is preempted for the last time and once after.
    pub(crate) fn run_to_end(&mut self) {
        self.settle_moves();
        let num_tokens = |request: &Tracked| {
            request.prompt.len() as u64 + u64::from(request.sampling.max_tokens)
        };
        let is_open = |request: &&Tracked| request.finish_reason.is_none();
        let num_open: u64 = self.requests.values().filter(is_open).map(num_tokens).sum();
        let depth = u64::from(self.config.max_steps_in_flight);
        let most_steps = depth * (1 + 2 * num_open);
        let first_step = self.num_steps;
        while self.schedule() {
            for _ in 1..depth {
                self.schedule();
            }
            self.commit();
            self.settle_moves();
            assert!(self.num_steps - first_step <= most_steps, "livelock");
        }
        self.check();
        assert_eq!(self.unfinished().count(), 0, "every request ends");
        let stats = self.scheduler.stats();
        assert_eq!((stats.num_running, stats.num_waiting), (0, 0));
        assert_eq!((stats.kv_blocks_used, stats.queued_prefill_tokens), (0, 0));
    }

    /// Prompt tokens that came from the cache when the request first ran.
    pub(crate) fn num_cached_tokens(&self, id: RequestId) -> Option<u32> {
        self.requests[&id].num_cached_tokens
    }
}
