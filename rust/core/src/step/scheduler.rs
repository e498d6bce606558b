//! The replica's scheduler: its state, and how requests come and go. Planning a step is in `schedule`, taking its
//! result in `commit`.

use std::collections::{BTreeMap, VecDeque};

use rustc_hash::FxHashSet;

use super::{
    block_pool::BlockPool,
    commit::Executing,
    config::StepSchedulerConfig,
    lateness::Lateness,
    moves::Moves,
    plan::{KvEvent, Request},
    sealed::SealedChains,
    sequence::{HashBlock, Preempted, Running, Sequence},
    stats::StepStats,
    step_cost::StepCost,
    waiting::WaitingQueue,
};
use crate::{
    config::ConfigIssue,
    error::RejectReason,
    hash::{BlockHash, next_block_hash},
    ids::{BlockId, RequestId},
    time::Time,
};

/// Plans a replica's steps: [`schedule`](Self::schedule), run the plan,
/// [`update_from_output`](Self::update_from_output). They are run and committed in order, and up to
/// `max_steps_in_flight` are planned before the first of them is committed. Requests may come and go at any moment, also
/// while steps execute.
#[derive(Debug)]
pub struct StepScheduler {
    pub(super) config: StepSchedulerConfig,
    pub(super) hash_block: HashBlock,
    pub(super) pool: BlockPool,
    /// By seniority; the first is never preempted.
    pub(super) running: Vec<Running>,
    /// By seniority. They start again before anything new starts.
    pub(super) preempted: BTreeMap<u64, Preempted>,
    pub(super) waiting: WaitingQueue,
    /// Sequences that have ever started; the next one's seniority.
    pub(super) num_started: u64,
    /// Sampler slots that no running sequence has; the last is given out first.
    pub(super) free_slots: Vec<u32>,
    /// The steps whose outputs are due, in order.
    pub(super) executing: VecDeque<Executing>,
    /// When a step was last committed.
    pub(super) committed_at: Time,
    pub(super) stats: StepStats,
    /// Learns only where there is a TPOT target.
    pub(super) step_cost: StepCost,
    /// Of whoever executes the steps.
    pub(super) lateness: Lateness,
    /// Blocks that prefills of the step being planned compute: a request that needs one of them next is held
    /// back instead of computing it too.
    pub(super) in_flight_prefixes: FxHashSet<BlockHash>,
    /// The cached blocks of the request being looked at.
    pub(super) matched: Vec<BlockId>,
    pub(super) moves: Moves,
    /// Where what is cached is to be written through.
    pub(super) sealed: Option<SealedChains>,
}

impl StepScheduler {
    /// A scheduler without requests, with an empty cache. Fails with everything that is wrong with `config`.
    pub fn new(config: StepSchedulerConfig) -> Result<Self, Vec<ConfigIssue>> {
        Self::with_hash(config, next_block_hash)
    }

    /// As [`new`](Self::new), with another block hash: tests pass a bad one to see that collisions do no harm.
    #[doc(hidden)]
    pub fn with_hash(
        config: StepSchedulerConfig,
        hash_block: fn(u64, &[u32]) -> BlockHash,
    ) -> Result<Self, Vec<ConfigIssue>> {
        config.validate()?;
        Ok(Self {
            hash_block,
            pool: BlockPool::new(&config),
            running: Vec::new(),
            preempted: BTreeMap::new(),
            waiting: WaitingQueue::new(config.block_size, config.max_overtakes),
            num_started: 0,
            free_slots: (0..config.max_num_seqs).rev().collect(),
            executing: VecDeque::new(),
            committed_at: Time::ZERO,
            stats: StepStats::default(),
            step_cost: StepCost::default(),
            lateness: Lateness::default(),
            in_flight_prefixes: FxHashSet::default(),
            matched: Vec::new(),
            moves: Moves::default(),
            sealed: None,
            config,
        })
    }

    /// Queues a request. A request that is accepted can always run to its end, if need be alone; one that is
    /// refused changes nothing.
    ///
    /// `QueueFull` at `max_num_waiting`; `TooLong` where prompt and `max_tokens` exceed `max_model_len`, or a
    /// replayed output leaves nothing to generate; `NoCapacity` where the whole pool could not hold the request;
    /// `EmptyPrompt`; `DuplicateId` while a request with this id has not ended.
    pub fn add_request(&mut self, request: Request, now: Time) -> Result<(), RejectReason> {
        let sequence = self.admit(request, now)?;
        self.enqueue(sequence);
        Ok(())
    }

    /// Refuses a request, or hashes it.
    pub(super) fn admit(&self, request: Request, now: Time) -> Result<Sequence, RejectReason> {
        self.check_request(&request)?;
        let mut sequence = Sequence::new(request, now);
        if self.config.enable_prefix_cache {
            sequence.hash_full_blocks(self.block_size(), self.hash_block);
        }
        Ok(sequence)
    }

    /// Lets a request start when it is its turn.
    pub(super) fn enqueue(&mut self, sequence: Sequence) {
        let num_cached = self
            .pool
            .estimate_both_tiers(sequence.matchable(self.block_size()));
        let num_prefill_tokens = sequence.num_tokens() - num_cached * self.block_size();
        self.waiting.push(sequence, num_prefill_tokens);
    }

    fn check_request(&self, request: &Request) -> Result<(), RejectReason> {
        let num_prompt_tokens = request.prompt_token_ids.len();
        let num_output_tokens = request.output_token_ids.len();
        let max_tokens = request.sampling.max_tokens as usize;
        let max_model_len = self.config.max_model_len as usize;
        if num_prompt_tokens == 0 {
            return Err(RejectReason::EmptyPrompt);
        }
        // In this order no sum of numbers that a client chose can overflow.
        let max_total = num_prompt_tokens.saturating_add(max_tokens);
        if max_total > max_model_len {
            return Err(RejectReason::TooLong {
                requested: max_total,
                limit: max_model_len,
            });
        }
        if num_output_tokens >= max_tokens {
            let requested = num_prompt_tokens + num_output_tokens + 1;
            return Err(RejectReason::TooLong {
                requested,
                limit: max_total,
            });
        }
        // The last token that is drawn is never computed.
        let num_blocks = (max_total - 1).div_ceil(self.block_size());
        if num_blocks > self.pool.num_blocks() {
            let limit = self.pool.num_blocks();
            return Err(RejectReason::NoCapacity {
                requested: num_blocks,
                limit,
            });
        }
        if self.contains(request.id) {
            return Err(RejectReason::DuplicateId);
        }
        let current = self.waiting.len() + self.moves.awaiting.len();
        let limit = self.config.max_num_waiting as usize;
        if current >= limit {
            return Err(RejectReason::QueueFull { current, limit });
        }
        Ok(())
    }

    fn contains(&self, id: RequestId) -> bool {
        self.waiting.contains(id)
            || self.running.iter().any(|running| running.sequence.id == id)
            || self.preempted.values().any(|it| it.sequence.id == id)
            || self.moves.sequences().any(|sequence| sequence.id == id)
    }

    /// Ends a request at once; `false` where there is none with this id.
    ///
    /// Also while steps execute that compute it: its token of theirs is dropped. Its blocks may then be given to
    /// others while those steps still write to them. That is safe because the next plan, the first that can name
    /// them, runs after these steps, on every stage; and because what they write was never committed: only the
    /// blocks of earlier steps stay in the prefix cache. The same holds for its slot.
    pub fn abort(&mut self, id: RequestId) -> bool {
        if self.waiting.remove(id).is_some() || self.abort_awaiting(id) {
            return true;
        }
        if let Some(index) = self
            .running
            .iter()
            .position(|running| running.sequence.id == id)
        {
            let running = self.running.remove(index);
            self.release(running);
            return true;
        }
        let found = self.preempted.iter().find(|(_, it)| it.sequence.id == id);
        let Some(seniority) = found.map(|(&seniority, _)| seniority) else {
            return false;
        };
        let preempted = self.preempted.remove(&seniority);
        preempted.map(|it| self.forget(it)).is_some()
    }

    /// Gives back what a preempted sequence holds.
    fn forget(&mut self, preempted: Preempted) -> RequestId {
        if let Some(swapped) = preempted.swapped {
            self.pool.host.free(swapped);
        }
        preempted.sequence.id
    }

    /// Ends every request and names them: the running ones first, then those that would have started next. What is
    /// held for other workers stays so.
    pub fn abort_all(&mut self) -> Vec<RequestId> {
        let mut ids = Vec::new();
        for running in std::mem::take(&mut self.running) {
            ids.push(self.release(running).id);
        }
        for preempted in std::mem::take(&mut self.preempted).into_values() {
            ids.push(self.forget(preempted));
        }
        ids.extend(self.waiting.drain().map(|sequence| sequence.id));
        ids.extend(self.abort_all_awaiting());
        ids
    }

    /// Gives back what a running sequence holds.
    pub(super) fn release(&mut self, mut running: Running) -> Sequence {
        self.pool.release_table(&mut running.block_table);
        self.free_slots.push(running.slot);
        running.sequence
    }

    /// Changes of the prefix cache since the last call, for the routers. Taken after every step,
    /// they are complete; where they gather to more than two per block, the next call says `Cleared` instead and
    /// lists what there is.
    pub fn take_kv_events(&mut self) -> Vec<KvEvent> {
        self.pool.take_events()
    }

    /// Every block that can be reused, parents before children: for a router that knows nothing yet.
    pub fn cached_block_hashes(&self) -> Vec<BlockHash> {
        self.pool.cached_hashes()
    }

    /// Whether any request has not ended, but for those that await their KV. While one has not, and no step executes,
    /// [`schedule`](Self::schedule) gives a plan, unless blocks are lacking that are held for other workers.
    pub fn has_work(&self) -> bool {
        self.waiting.len() + self.running.len() + self.preempted.len() > 0
    }

    /// Every block that host memory keeps to be copied back, parents before children.
    pub fn kept_block_hashes(&self) -> Vec<BlockHash> {
        self.pool.host.cache.hashes()
    }

    /// Load and counters.
    pub fn stats(&self) -> StepStats {
        let prefilling = self.running.iter().filter(|running| running.is_prefill());
        let num_running_prefill: usize = prefilling.map(Running::num_uncomputed_tokens).sum();
        let num_preempted_prefill: usize = self
            .preempted
            .values()
            .map(Preempted::num_prefill_tokens)
            .sum();
        StepStats {
            num_running: self.running.len() as u32,
            num_waiting: (self.waiting.len() + self.preempted.len() + self.moves.awaiting.len())
                as u32,
            kv_blocks_used: (self.pool.num_blocks() - self.pool.num_available()) as u32,
            kv_blocks_total: self.config.num_blocks,
            write_throughs_dropped: self.sealed.as_ref().map_or(0, |it| it.num_dropped),
            host_blocks_kept: self.pool.host.cache.len() as u32,
            queued_prefill_tokens: self.waiting.num_prefill_tokens()
                + (num_running_prefill + num_preempted_prefill) as u64
                + self.moves.num_prefill_tokens(self.block_size()),
            ..self.stats
        }
    }

    pub(super) fn block_size(&self) -> usize {
        self.config.block_size as usize
    }
}
