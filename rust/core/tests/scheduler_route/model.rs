//! The naive model: lists, and a full scan for every decision.

use std::collections::BTreeSet;

use orchestra_core::{
    BlockHash, ErrorCode, block_hashes,
    scheduler::{
        Reservation, ReservationId, RoutePolicy, RouteRequest, WorkerId, WorkerLoad, WorkerSpec,
    },
};

pub(crate) const LORA_LOAD_TOKENS: u64 = 20;

/// A worker with everything recomputed from lists when asked.
pub(crate) struct ModelWorker {
    pub(crate) id: WorkerId,
    pub(crate) spec: WorkerSpec,
    pub(crate) is_draining: bool,
    pub(crate) cached: BTreeSet<BlockHash>,
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
        let size = self.spec.block_size as usize;
        let seed = self.spec.hash_seed(request.salt, request.lora);
        let chain = block_hashes(seed, request.token_ids, size);
        // One token is always computed.
        let usable = (request.token_ids.len() - 1) / size;
        chain[..usable]
            .iter()
            .take_while(|hash| self.cached.contains(hash))
            .count() as u32
    }

    /// Ascending rank: room, cost, age of the last choice. `deepest` are the blocks of the deepest holder.
    pub(crate) fn rank(
        &self,
        policy: RoutePolicy,
        request: &RouteRequest<'_>,
        deepest: u32,
    ) -> (bool, u64, usize) {
        let depth = self.depth(request);
        let batch = self.estimate(
            u64::from(self.load.num_running) + u64::from(self.load.num_waiting),
            |held| held.seqs,
        );
        // A prompt that was computed is given back without its place in the batch.
        let queued = self.estimate(self.load.queued_prefill_tokens, |held| held.prefill);
        let used = self.estimate(self.load.kv_blocks_used.into(), |held| held.blocks);
        let needed = u64::from(self.booked_blocks(request) - depth);
        let left = request.token_ids.len() as u64 - u64::from(depth * self.spec.block_size);
        let has_room = batch < u64::from(self.spec.max_num_seqs)
            && used + needed <= u64::from(self.spec.num_blocks);
        let prompt = request.token_ids.len() as u64;
        let fetched = u64::from((deepest - depth) * self.spec.block_size);
        let fetch = prompt - u64::from(deepest * self.spec.block_size) + fetched.div_ceil(4);
        let load = self.load_tokens(request);
        let cost = match policy {
            RoutePolicy::Product => (left + load + queued) * (batch + 1),
            RoutePolicy::PrefixSum => left + load + queued + 3 * batch,
            RoutePolicy::TransferAware => (left.min(fetch) + load + queued) * (batch + 1),
            RoutePolicy::LeastRequests => batch,
            RoutePolicy::LeastTokens => queued,
            _ => (prompt + load + queued) * (batch + 1),
        };
        (!has_room, cost, self.last_chosen)
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
        fn key(worker: &ModelWorker) -> impl PartialEq + '_ {
            let spec = &worker.spec;
            (&spec.model, spec.weights_epoch, spec.block_size)
        }
        let alike = self
            .workers
            .iter()
            .filter(|other| key(other) == key(worker));
        let deepest = alike.map(|other| other.depth(request)).max().unwrap();
        worker.rank(self.policy, request, deepest)
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
        let ranks = of_model()
            .filter(|worker| worker.accepts(request))
            .filter(is_open)
            .filter(fits)
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
        self.num_decisions += 1;
        let id = reservation.worker;
        let worker = self.workers.iter_mut().find(|worker| worker.id == id);
        let worker = worker.unwrap();
        worker.last_chosen = self.num_decisions;
        let cached = reservation.num_cached_tokens;
        worker.reservations.push(ModelReservation {
            id: reservation.id,
            is_reported: false,
            blocks: u64::from(reservation.num_blocks - cached / worker.spec.block_size),
            prefill: request.token_ids.len() as u64 - u64::from(cached),
            seqs: 1,
        });
        let lora = request.lora.map(|lora| (lora.id.to_owned(), lora.version));
        worker.loras.extend(lora);
    }

    pub(crate) fn held(&self) -> Vec<ReservationId> {
        let held = self.workers.iter().flat_map(|worker| &worker.reservations);
        held.map(|held| held.id).collect()
    }
}
