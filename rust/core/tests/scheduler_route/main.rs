//! Routing against a naive model: random operations, every decision compared with a full scan over plain lists.
//!
//! Workers evict leaves first, so holder sets are nested and the choice must cost what the full scan's costs; which of
//! several equals is taken is free. Where sets are not nested, no more may be claimed than is there.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod ops;

use std::collections::BTreeSet;

use ops::{Op, op, prompt};
use orchestra_core::{
    BlockHash, ErrorCode, Time, block_hashes,
    scheduler::{
        Reservation, ReservationId, RoutePolicy, RouteRequest, Scheduler, SchedulerConfig,
        WorkerId, WorkerLoad, WorkerSpec,
    },
    step::KvEvent,
};
use proptest::prelude::*;

const MODELS: [&str; 2] = ["small", "large"];

/// A worker with everything recomputed from lists when asked.
struct ModelWorker {
    id: WorkerId,
    spec: WorkerSpec,
    is_draining: bool,
    cached: BTreeSet<BlockHash>,
    load: WorkerLoad,
    reservations: Vec<ModelReservation>,
    /// Number of the decision that last chose it.
    last_chosen: usize,
}

struct ModelReservation {
    id: ReservationId,
    is_reported: bool,
    blocks: u64,
    prefill: u64,
}

impl ModelWorker {
    /// `max(all reservations, report + reservations since)` of one quantity.
    fn estimate(&self, reported: u64, of: impl Fn(&ModelReservation) -> u64) -> u64 {
        let all: u64 = self.reservations.iter().map(&of).sum();
        let since: u64 = self
            .reservations
            .iter()
            .filter(|held| !held.is_reported)
            .map(&of)
            .sum();
        all.max(reported + since)
    }

    fn depth(&self, request: &RouteRequest<'_>) -> u32 {
        let size = self.spec.block_size as usize;
        let chain = block_hashes(self.spec.hash_seed(request.salt), request.token_ids, size);
        // One token is always computed.
        let usable = (request.token_ids.len() - 1) / size;
        chain[..usable]
            .iter()
            .take_while(|hash| self.cached.contains(hash))
            .count() as u32
    }

    /// Ascending rank: room, cost, age of the last choice. `deepest` are the blocks of the deepest holder.
    fn rank(
        &self,
        policy: RoutePolicy,
        request: &RouteRequest<'_>,
        deepest: u32,
    ) -> (bool, u64, usize) {
        let depth = self.depth(request);
        let batch = self.estimate(
            u64::from(self.load.num_running) + u64::from(self.load.num_waiting),
            |_| 1,
        );
        let queued = self.estimate(self.load.queued_prefill_tokens, |held| held.prefill);
        let used = self.estimate(self.load.kv_blocks_used.into(), |held| held.blocks);
        let needed = u64::from(self.blocks(request) - depth);
        let left = request.token_ids.len() as u64 - u64::from(depth * self.spec.block_size);
        let has_room = batch < u64::from(self.spec.max_num_seqs)
            && used + needed <= u64::from(self.spec.num_blocks);
        let prompt = request.token_ids.len() as u64;
        let fetched = u64::from((deepest - depth) * self.spec.block_size);
        let fetch = prompt - u64::from(deepest * self.spec.block_size) + fetched.div_ceil(4);
        let cost = match policy {
            RoutePolicy::Product => (left + queued) * (batch + 1),
            RoutePolicy::PrefixSum => left + queued + 3 * batch,
            RoutePolicy::TransferAware => (left.min(fetch) + queued) * (batch + 1),
            RoutePolicy::LeastRequests => batch,
            RoutePolicy::LeastTokens => queued,
            _ => (prompt + queued) * (batch + 1),
        };
        (!has_room, cost, self.last_chosen)
    }

    fn blocks(&self, request: &RouteRequest<'_>) -> u32 {
        let tokens = request.token_ids.len() as u32 + request.max_tokens;
        tokens.div_ceil(self.spec.block_size)
    }
}

/// The router's view, kept in lists.
struct Model {
    policy: RoutePolicy,
    workers: Vec<ModelWorker>,
    num_decisions: usize,
}

impl Model {
    fn worker(&self, id: WorkerId) -> &ModelWorker {
        self.workers.iter().find(|worker| worker.id == id).unwrap()
    }

    fn rank(&self, worker: &ModelWorker, request: &RouteRequest<'_>) -> (bool, u64, usize) {
        let key = |worker: &ModelWorker| {
            let spec = &worker.spec;
            (spec.model.clone(), spec.weights_epoch, spec.block_size)
        };
        let alike = self
            .workers
            .iter()
            .filter(|other| key(other) == key(worker));
        let deepest = alike.map(|other| other.depth(request)).max().unwrap();
        worker.rank(self.policy, request, deepest)
    }

    /// The best rank, or why there is none.
    fn route(&self, request: &RouteRequest<'_>) -> Result<(bool, u64), ErrorCode> {
        let of_model = || {
            self.workers
                .iter()
                .filter(|worker| worker.spec.model == request.model)
        };
        if of_model().next().is_none() {
            return Err(ErrorCode::ModelNotFound);
        }
        let tokens = request.token_ids.len() as u32 + request.max_tokens;
        let fits = |worker: &&ModelWorker| {
            tokens <= worker.spec.max_model_len && worker.blocks(request) <= worker.spec.num_blocks
        };
        let is_open =
            |worker: &&ModelWorker| !worker.is_draining && !request.exclude.contains(&worker.id);
        let ranks = of_model()
            .filter(is_open)
            .filter(fits)
            .map(|worker| self.rank(worker, request));
        match ranks.min() {
            Some((room, cost, _)) => Ok((room, cost)),
            None if of_model().any(|worker| is_open(&worker)) => Err(ErrorCode::ContextTooLong),
            None => Err(ErrorCode::NoWorkers),
        }
    }

    fn commit(&mut self, reservation: &Reservation, prompt_len: usize) {
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
            prefill: prompt_len as u64 - u64::from(cached),
        });
    }

    fn held(&self) -> Vec<ReservationId> {
        let held = self.workers.iter().flat_map(|worker| &worker.reservations);
        held.map(|held| held.id).collect()
    }
}

struct Pair {
    real: Scheduler,
    model: Model,
    names: usize,
    /// Whether workers evict leaves first.
    is_nested: bool,
}

impl Pair {
    fn new(policy: RoutePolicy, is_nested: bool) -> Self {
        let config = SchedulerConfig {
            policy,
            seq_cost_tokens: 3,
            fetch_cost_permille: 250,
            ..SchedulerConfig::default()
        };
        Self {
            real: Scheduler::new(config).unwrap(),
            model: Model {
                policy,
                workers: Vec::new(),
                num_decisions: 0,
            },
            names: 0,
            is_nested,
        }
    }

    /// The index of some worker, where there is one.
    fn pick(&self, pick: usize) -> Option<usize> {
        pick.checked_rem(self.model.workers.len())
    }

    fn chain(&self, worker: usize, family: u32) -> Vec<BlockHash> {
        let spec = &self.model.workers[worker].spec;
        block_hashes(
            spec.hash_seed(""),
            &prompt(family, 64),
            spec.block_size as usize,
        )
    }

    fn add_worker(&mut self, model: usize, epoch: u64, sizes: [u32; 3]) {
        let [block_size, num_blocks, max_num_seqs] = sizes;
        self.names += 1;
        let spec = WorkerSpec {
            name: format!("worker-{}", self.names),
            model: MODELS[model].to_owned(),
            weights_epoch: epoch,
            block_size,
            num_blocks,
            max_num_seqs,
            max_model_len: 90,
        };
        let id = self.real.add_worker(spec.clone()).unwrap();
        self.model.workers.push(ModelWorker {
            id,
            spec,
            is_draining: false,
            cached: BTreeSet::new(),
            load: WorkerLoad::default(),
            reservations: Vec::new(),
            last_chosen: 0,
        });
    }

    fn stored(&mut self, worker: usize, family: u32, blocks: usize) {
        let hashes = self.chain(worker, family)[..blocks].to_vec();
        let model = &mut self.model.workers[worker];
        let mut after = model.cached.clone();
        after.extend(&hashes);
        let fits = after.len() <= model.spec.num_blocks as usize;
        let outcome = self.real.apply_kv_event(model.id, &KvEvent::Stored(hashes));
        assert_eq!(outcome.is_ok(), fits);
        if fits {
            model.cached = after;
        }
    }

    /// Every candidate's figures equal the model's, the choice first, then best first. Returns the choice.
    fn compare_candidates(&self, request: &RouteRequest<'_>) -> Option<WorkerId> {
        let explanation = self.real.explain(request, usize::MAX).ok()?;
        let figures = explanation.candidates.iter().map(|candidate| {
            let id = candidate.worker;
            let model = self.model.worker(id);
            assert_eq!(
                candidate.num_cached_tokens,
                model.depth(request) * model.spec.block_size
            );
            let rank = self.model.rank(model, request);
            assert_eq!((!candidate.has_room, candidate.cost), (rank.0, rank.1));
            (rank, id)
        });
        let figures: Vec<_> = figures.collect();
        assert!(figures.iter().skip(1).is_sorted());
        figures.first().map(|&(_, id)| id)
    }

    fn route(&mut self, request: &RouteRequest<'_>) {
        let explained = self.compare_candidates(request);
        let expected = self.model.route(request);
        let reservation = match self.real.route(request, Time::ZERO) {
            Ok(reservation) => reservation,
            Err(error) => {
                assert_eq!(Some(error.code()), expected.err());
                return;
            }
        };
        assert_eq!(Some(reservation.worker), explained);
        let best = expected.unwrap_or_else(|code| panic!("the model says {code}"));
        let chosen = self.model.worker(reservation.worker);
        let cached_tokens = chosen.depth(request) * chosen.spec.block_size;
        assert_eq!(reservation.num_blocks, chosen.blocks(request));
        assert!(
            reservation.num_cached_tokens <= cached_tokens,
            "claims what is not there"
        );
        if self.is_nested {
            assert_eq!(reservation.num_cached_tokens, cached_tokens);
            let (room, cost, _) = self.model.rank(chosen, request);
            if is_least_cost(self.model.policy) {
                assert_eq!((room, cost), best);
            }
            assert_eq!(room, best.0, "room goes first under every policy");
        }
        self.model.commit(&reservation, request.token_ids.len());
    }

    fn release(&mut self, pick: usize) {
        let held = self.model.held();
        let Some(index) = pick.checked_rem(held.len()) else {
            return;
        };
        assert!(self.real.release(held[index]));
        assert!(!self.real.release(held[index]), "released twice");
        for worker in &mut self.model.workers {
            worker.reservations.retain(|kept| kept.id != held[index]);
        }
    }

    fn prefill_done(&mut self, pick: usize) {
        let held = self.model.held();
        let Some(index) = pick.checked_rem(held.len()) else {
            return;
        };
        let mut all = self
            .model
            .workers
            .iter_mut()
            .flat_map(|worker| &mut worker.reservations);
        let model = all.find(|kept| kept.id == held[index]).unwrap();
        assert_eq!(self.real.prefill_done(held[index]), model.prefill > 0);
        model.prefill = 0;
    }

    fn apply_to_worker(&mut self, op: &Op) {
        let (Op::RemoveWorker(pick)
        | Op::SetDraining(pick, _)
        | Op::Cleared(pick)
        | Op::Load(pick, _)
        | Op::Removed { worker: pick, .. }
        | Op::Stored { worker: pick, .. }) = *op
        else {
            return;
        };
        let Some(index) = self.pick(pick) else { return };
        let id = self.model.workers[index].id;
        match *op {
            Op::RemoveWorker(_) => {
                assert!(self.real.remove_worker(id));
                for held in self.model.workers.remove(index).reservations {
                    assert!(
                        !self.real.release(held.id),
                        "a reservation outlived its worker"
                    );
                }
            }
            Op::SetDraining(_, on) => {
                assert!(self.real.set_draining(id, on));
                self.model.workers[index].is_draining = on;
            }
            Op::Stored { family, blocks, .. } => self.stored(index, family, blocks),
            Op::Removed { family, block, .. } => {
                let chain = self.chain(index, family);
                let end = if self.is_nested { 8 } else { block + 1 };
                let hashes = chain[block..end].to_vec();
                self.model.workers[index]
                    .cached
                    .retain(|hash| !hashes.contains(hash));
                self.real
                    .apply_kv_event(id, &KvEvent::Removed(hashes))
                    .unwrap();
            }
            Op::Cleared(_) => {
                self.real.apply_kv_event(id, &KvEvent::Cleared).unwrap();
                self.model.workers[index].cached.clear();
            }
            Op::Load(_, load) => {
                assert!(self.real.update_load(id, load));
                let worker = &mut self.model.workers[index];
                worker.load = load;
                worker
                    .reservations
                    .iter_mut()
                    .for_each(|held| held.is_reported = true);
            }
            _ => {}
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::AddWorker {
                model,
                epoch,
                block_size,
                num_blocks,
                max_num_seqs,
            } => {
                self.add_worker(model, epoch, [block_size, num_blocks, max_num_seqs]);
            }
            Op::Route {
                model,
                family,
                len,
                max_tokens,
                exclude,
            } => {
                let token_ids = prompt(family, len);
                let excluded = exclude.and_then(|pick| self.pick(pick));
                let exclude: Vec<WorkerId> = excluded
                    .map(|index| self.model.workers[index].id)
                    .into_iter()
                    .collect();
                self.route(&RouteRequest {
                    model: MODELS[model],
                    token_ids: &token_ids,
                    max_tokens,
                    exclude: &exclude,
                    ..RouteRequest::default()
                });
            }
            Op::PrefillDone(pick) => self.prefill_done(pick),
            Op::Release(pick) => self.release(pick),
            _ => self.apply_to_worker(op),
        }
        self.real.check_integrity();
    }
}

const POLICIES: [RoutePolicy; 10] = [
    RoutePolicy::Product,
    RoutePolicy::PrefixSum,
    RoutePolicy::LoadOnly,
    RoutePolicy::TransferAware,
    RoutePolicy::LeastRequests,
    RoutePolicy::LeastTokens,
    RoutePolicy::RoundRobin,
    RoutePolicy::Random,
    RoutePolicy::PowerOfTwo,
    RoutePolicy::ConsistentHash,
];

fn is_least_cost(policy: RoutePolicy) -> bool {
    POLICIES[..6].contains(&policy)
}

fn run(policy: RoutePolicy, is_nested: bool, ops: &[Op]) {
    let mut pair = Pair::new(policy, is_nested);
    for op in ops {
        pair.apply(op);
    }
    // Whatever happened, everything can be given back.
    while !pair.model.held().is_empty() {
        pair.release(0);
    }
    let stats = pair.real.stats(Time::ZERO);
    assert_eq!(stats.num_reservations, 0);
    pair.real.check_integrity();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_decision_costs_what_the_full_scan_s_does(ops in prop::collection::vec(op(), 1..120)) {
        run(RoutePolicy::Product, true, &ops);
    }

    #[test]
    fn under_every_policy(
        policy in prop::sample::select(&POLICIES[..]),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        run(policy, true, &ops);
    }

    #[test]
    fn nothing_is_claimed_in_excess_where_sets_are_not_nested(
        policy in prop::sample::select(&POLICIES[..]),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        run(policy, false, &ops);
    }
}
