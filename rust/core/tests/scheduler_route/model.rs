//! The naive model: lists, and a full scan for every decision.

use std::collections::BTreeSet;

use orchestra_core::{
    BlockHash, ErrorCode, block_hashes,
    scheduler::{
        PrefillPart, Reservation, ReservationId, RoutePolicy, RouteRequest, WorkerId, WorkerLoad,
        WorkerRole, WorkerSpec,
    },
};

pub(crate) const LORA_LOAD_TOKENS: u64 = 20;
pub(crate) const SPLIT_MIN_TOKENS: u64 = 6;

/// What moving KV of so many tokens costs; nothing is known of speeds.
fn moving(tokens: u64) -> u64 {
    tokens.div_ceil(4)
}

/// A worker with everything recomputed from lists when asked.
pub(crate) struct ModelWorker {
    pub(crate) id: WorkerId,
    pub(crate) spec: WorkerSpec,
    pub(crate) is_draining: bool,
    pub(crate) cached: BTreeSet<BlockHash>,
    /// Those of them that are in host memory.
    pub(crate) kept: BTreeSet<BlockHash>,
    pub(crate) loras: BTreeSet<(String, u64)>,
    pub(crate) load: WorkerLoad,
    pub(crate) reservations: Vec<ModelReservation>,
    /// Given back since the last report of what it covered.
    pub(crate) returned: Vec<ModelReservation>,
    /// Number of the decision that last chose it.
    pub(crate) last_chosen: usize,
}

pub(crate) struct ModelReservation {
    pub(crate) id: ReservationId,
    pub(crate) is_reported: bool,
    pub(crate) blocks: u64,
    pub(crate) prefill: u64,
    pub(crate) seqs: u64,
}

impl ModelWorker {
    /// `max(all reservations, report - returned since + reservations since)` of one quantity.
    pub(crate) fn estimate(&self, reported: u64, of: impl Fn(&ModelReservation) -> u64) -> u64 {
        let all: u64 = self.reservations.iter().map(&of).sum();
        let since: u64 = self
            .reservations
            .iter()
            .filter(|held| !held.is_reported)
            .map(&of)
            .sum();
        let returned: u64 = self.returned.iter().map(&of).sum();
        all.max(reported.saturating_sub(returned) + since)
    }

    pub(crate) fn depth(&self, request: &RouteRequest<'_>) -> u32 {
        self.held(request).len() as u32
    }

    /// The leading blocks that it holds.
    fn held(&self, request: &RouteRequest<'_>) -> Vec<BlockHash> {
        let size = self.spec.block_size as usize;
        let seed = self.spec.hash_seed(request.salt, request.lora);
        let chain = block_hashes(seed, request.token_ids, size);
        // One token is always computed.
        let usable = (request.token_ids.len() - 1) / size;
        chain[..usable]
            .iter()
            .take_while(|hash| self.cached.contains(hash))
            .copied()
            .collect()
    }

    /// Ascending rank: room, cost, age of the last choice. `deepest` are the blocks of the deepest holder.
    pub(crate) fn rank(
        &self,
        policy: RoutePolicy,
        request: &RouteRequest<'_>,
        deepest: u32,
    ) -> (bool, u64, usize) {
        let depth = self.depth(request);
        let (batch, queued) = (self.batch(), self.queued());
        let used = self.estimate(self.load.kv_blocks_used.into(), |held| held.blocks);
        let needed = u64::from(self.booked_blocks(request) - depth);
        let left = request.token_ids.len() as u64 - u64::from(depth * self.spec.block_size);
        let has_room = batch < u64::from(self.spec.max_num_seqs)
            && used + needed <= u64::from(self.spec.num_blocks);
        let prompt = request.token_ids.len() as u64;
        let load = self.load_tokens(request);
        let fetching = |depth: u32, left: u64| {
            let fetched = u64::from((deepest - depth) * self.spec.block_size);
            let fetch = prompt - u64::from(deepest * self.spec.block_size) + moving(fetched);
            if self.fetches(policy) {
                left.min(fetch)
            } else {
                left
            }
        };
        // From host memory the last of them have to be copied back, or one does without.
        let num_kept = self.num_kept(request);
        let kept = u64::from(num_kept * self.spec.block_size);
        let without = fetching(depth - num_kept, left + kept);
        let left = without.min(fetching(depth, left) + kept.div_ceil(20));
        let cost = match policy {
            RoutePolicy::Product | RoutePolicy::TransferAware => {
                (left + load + queued) * (batch + 1)
            }
            RoutePolicy::PrefixSum => left + load + queued + 3 * batch,
            RoutePolicy::LeastRequests => batch,
            RoutePolicy::LeastTokens => queued,
            _ => (prompt + load + queued) * (batch + 1),
        };
        (!has_room, cost, self.last_chosen)
    }

    fn batch(&self) -> u64 {
        let reported = u64::from(self.load.num_running) + u64::from(self.load.num_waiting);
        self.estimate(reported, |held| held.seqs)
    }

    fn queued(&self) -> u64 {
        // A prompt that was computed is given back without its place in the batch.
        self.estimate(self.load.queued_prefill_tokens, |held| held.prefill)
    }

    /// Whether it counts as fetching what others hold.
    fn fetches(&self, policy: RoutePolicy) -> bool {
        match policy {
            RoutePolicy::Product | RoutePolicy::PrefixSum => self.spec.kv_exchange.is_some(),
            policy => policy == RoutePolicy::TransferAware,
        }
    }

    /// As one that computes a prompt for another worker: room, and what is before that and of it.
    pub(crate) fn prefill_rank(&self, request: &RouteRequest<'_>) -> (bool, u64) {
        let request = &RouteRequest {
            max_tokens: 1,
            booked_tokens: None,
            ..*request
        };
        let (no_room, cost, _) = self.rank(RoutePolicy::LeastTokens, request, self.depth(request));
        let held = u64::from(self.depth(request) * self.spec.block_size);
        let left = request.token_ids.len() as u64 - held + self.load_tokens(request);
        // What is copied back costs a twentieth of what it saves, so at least one token where it saves any.
        let copied = u64::from(self.num_kept(request) * self.spec.block_size).div_ceil(20);
        (no_room, cost + left + copied)
    }

    /// The last of the blocks that it holds of a request, as many as lie in host memory.
    fn num_kept(&self, request: &RouteRequest<'_>) -> u32 {
        let held = self.held(request);
        let kept = held.iter().rev();
        let kept = kept.take_while(|hash| self.kept.contains(hash));
        kept.count() as u32
    }

    pub(crate) fn load_tokens(&self, request: &RouteRequest<'_>) -> u64 {
        let lora = request.lora.map(|lora| (lora.id.to_owned(), lora.version));
        let is_resident = lora.is_none_or(|lora| self.loras.contains(&lora));
        if is_resident { 0 } else { LORA_LOAD_TOKENS }
    }

    /// Whether its terms let it take the request.
    pub(crate) fn accepts(&self, request: &RouteRequest<'_>) -> bool {
        let spec = &self.spec;
        let tolerates = |taint: &String| request.tolerations.contains(&taint.as_str());
        request
            .weights_epoch
            .is_none_or(|epoch| epoch == spec.weights_epoch)
            && spec.taints.iter().all(tolerates)
            && (spec.slo_classes.is_empty()
                || spec.slo_classes.iter().any(|it| it == request.slo_class))
            && (request.lora.is_none() || spec.max_loras > 0)
    }

    pub(crate) fn blocks(&self, request: &RouteRequest<'_>) -> u32 {
        let tokens = request.token_ids.len() as u32 + request.max_tokens;
        tokens.div_ceil(self.spec.block_size)
    }

    pub(crate) fn booked_blocks(&self, request: &RouteRequest<'_>) -> u32 {
        let output = request.booked_tokens.unwrap_or(u32::MAX);
        let tokens = request.token_ids.len() as u32 + output.min(request.max_tokens);
        tokens.div_ceil(self.spec.block_size)
    }
}

/// The router's view, kept in lists.
pub(crate) struct Model {
    pub(crate) policy: RoutePolicy,
    pub(crate) workers: Vec<ModelWorker>,
    pub(crate) num_decisions: usize,
}

impl Model {
    pub(crate) fn worker(&self, id: WorkerId) -> &ModelWorker {
        self.workers.iter().find(|worker| worker.id == id).unwrap()
    }

    pub(crate) fn rank(
        &self,
        worker: &ModelWorker,
        request: &RouteRequest<'_>,
    ) -> (bool, u64, usize) {
        worker.rank(self.policy, request, self.deepest(worker, request))
    }

    /// Blocks of the deepest holder that the worker could fetch from.
    fn deepest(&self, worker: &ModelWorker, request: &RouteRequest<'_>) -> u32 {
        let exchange = &worker.spec.kv_exchange;
        let gives =
            |other: &&ModelWorker| exchange.is_none() || other.spec.kv_exchange == *exchange;
        let alike = self.alike(worker).filter(gives);
        alike.map(|other| other.depth(request)).max().unwrap()
    }

    /// Those whose blocks have the names that the worker's have.
    fn alike(&self, worker: &ModelWorker) -> impl Iterator<Item = &ModelWorker> {
        fn key(worker: &ModelWorker) -> impl PartialEq + use<> {
            let spec = &worker.spec;
            (spec.model.clone(), spec.weights_epoch, spec.block_size)
        }
        let wanted = key(worker);
        self.workers
            .iter()
            .filter(move |other| key(other) == wanted)
    }

    /// Leading blocks that the worker would fetch where that is cheaper than computing.
    pub(crate) fn fetch(&self, worker: &ModelWorker, request: &RouteRequest<'_>) -> Option<u32> {
        let deepest = self.deepest(worker, request);
        let between = u64::from((deepest - worker.depth(request)) * worker.spec.block_size);
        let is_cheaper = moving(between) < between;
        let fetches = worker.spec.kv_exchange.is_some() && worker.fetches(self.policy);
        (fetches && is_cheaper).then_some(deepest)
    }

    /// The rank of who should compute the request's prompt for the worker, where somebody should.
    pub(crate) fn split(
        &self,
        worker: &ModelWorker,
        request: &RouteRequest<'_>,
    ) -> Option<(bool, u64)> {
        let spec = &worker.spec;
        spec.kv_exchange.as_ref()?;
        let size = u64::from(spec.block_size);
        let prompt = request.token_ids.len() as u64;
        let whole = (prompt - 1) / size * size;
        let held = u64::from(worker.depth(request)) * size;
        if spec.role == WorkerRole::Prefill || whole - held < SPLIT_MIN_TOKENS {
            return None;
        }
        let fetched = self.fetch(worker, request);
        let fetched = fetched.map_or(held, |blocks| u64::from(blocks) * size);
        let crowd = worker.batch() + 1 + u64::from(spec.role == WorkerRole::Decode);
        let alone = (prompt - fetched + worker.queued()) * crowd + moving(fetched - held);
        let tail = (prompt - whole + worker.queued()) * crowd + moving(whole - held);
        let tokens = request.token_ids.len() as u32 + 1;
        let helps = |other: &&ModelWorker| {
            other.spec.role == WorkerRole::Prefill
                && other.spec.kv_exchange == spec.kv_exchange
                && other.accepts(request)
                && !other.is_draining
                && !request.exclude.contains(&other.id)
                && tokens <= other.spec.max_model_len
                && tokens.div_ceil(other.spec.block_size) <= other.spec.num_blocks
        };
        let helpers = self.alike(worker).filter(helps);
        let best = helpers.map(|other| other.prefill_rank(request)).min()?;
        (best.1 + tail < alone).then_some(best)
    }

    /// The best rank, or why there is none.
    pub(crate) fn route(&self, request: &RouteRequest<'_>) -> Result<(bool, u64), ErrorCode> {
        let of_model = || {
            self.workers
                .iter()
                .filter(|worker| worker.spec.model == request.model)
        };
        if !of_model().any(|worker| worker.accepts(request)) {
            return Err(ErrorCode::ModelNotFound);
        }
        let tokens = request.token_ids.len() as u32 + request.max_tokens;
        let fits = |worker: &&ModelWorker| {
            tokens <= worker.spec.max_model_len && worker.blocks(request) <= worker.spec.num_blocks
        };
        let is_open =
            |worker: &&ModelWorker| !worker.is_draining && !request.exclude.contains(&worker.id);
        let able = || {
            of_model()
                .filter(|worker| worker.accepts(request))
                .filter(is_open)
                .filter(fits)
        };
        // Those that are there for prompts count where nobody else could take it.
        let is_whole = |worker: &&ModelWorker| worker.spec.role != WorkerRole::Prefill;
        let only_prefill = !able().any(|worker| is_whole(&worker));
        let ranks = able()
            .filter(|worker| only_prefill || is_whole(worker))
            .map(|worker| self.rank(worker, request));
        match ranks.min() {
            Some((room, cost, _)) => Ok((room, cost)),
            None if of_model().any(|it| it.accepts(request) && is_open(&it)) => {
                Err(ErrorCode::ContextTooLong)
            }
            None => Err(ErrorCode::NoWorkers),
        }
    }

    pub(crate) fn commit(&mut self, reservation: &Reservation, request: &RouteRequest<'_>) {
        if let Some(part) = &reservation.prefill {
            self.commit_prefill(part, request);
        }
        self.num_decisions += 1;
        let id = reservation.worker;
        let worker = self.workers.iter_mut().find(|worker| worker.id == id);
        let worker = worker.unwrap();
        worker.last_chosen = self.num_decisions;
        let cached = reservation.num_cached_tokens;
        let moved = reservation.prefill.map(|part| part.num_blocks);
        let moved = moved.or(reservation.fetch.map(|fetch| fetch.num_blocks));
        let given = moved.unwrap_or(0) * worker.spec.block_size;
        worker.reservations.push(ModelReservation {
            id: reservation.id,
            is_reported: false,
            blocks: u64::from(reservation.num_blocks - cached / worker.spec.block_size),
            prefill: request.token_ids.len() as u64 - u64::from(given.max(cached)),
            seqs: 1,
        });
        let lora = request.lora.map(|lora| (lora.id.to_owned(), lora.version));
        worker.loras.extend(lora);
    }

    /// Room on the worker that computes a prompt for another.
    fn commit_prefill(&mut self, part: &PrefillPart, request: &RouteRequest<'_>) {
        self.num_decisions += 1;
        let worker = self.workers.iter_mut().find(|it| it.id == part.worker);
        let worker = worker.unwrap();
        worker.last_chosen = self.num_decisions;
        let blocks = u64::from(part.num_blocks - worker.depth(request));
        worker.reservations.push(ModelReservation {
            id: part.id,
            is_reported: false,
            blocks,
            prefill: blocks * u64::from(worker.spec.block_size),
            seqs: 1,
        });
    }

    pub(crate) fn held(&self) -> Vec<ReservationId> {
        let held = self.workers.iter().flat_map(|worker| &worker.reservations);
        held.map(|held| held.id).collect()
    }
}
