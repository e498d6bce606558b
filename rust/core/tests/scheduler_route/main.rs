//! Routing against a naive model: random operations, every decision compared with a full scan over plain lists.
//!
//! Workers evict leaves first, so holder sets are nested and the choice must cost what the full scan's costs; which of
//! several equals is taken is free. Where sets are not nested, no more may be claimed than is there.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod model;
mod ops;
mod seeds;

use std::collections::BTreeSet;

use model::{LORA_LOAD_TOKENS, Model, ModelReservation, ModelWorker, SPLIT_MIN_TOKENS};
use ops::{LORAS, NUM_FAMILIES, Op, op, prompt};
use orchestra_core::{
    BlockHash, Time, block_hashes,
    scheduler::{
        KvSource, Lora, Reservation, RoutePolicy, RouteRequest, Scheduler, SchedulerConfig,
        WorkerId, WorkerLoad, WorkerRole, WorkerSpec,
    },
    step::KvEvent,
};
use proptest::prelude::*;

const MODELS: [&str; 2] = ["small", "large"];

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
            split_min_tokens: SPLIT_MIN_TOKENS as u32,
            lora_load_tokens: LORA_LOAD_TOKENS as u32,
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
        // The last family is the first one's text under an adapter.
        let lora = (family == NUM_FAMILIES).then_some(LORAS[0]);
        let token_ids = prompt(family % NUM_FAMILIES, 64);
        block_hashes(
            spec.hash_seed("", lora),
            &token_ids,
            spec.block_size as usize,
        )
    }

    fn add_worker(&mut self, op: &Op) {
        let Op::AddWorker {
            model,
            epoch,
            sizes: [block_size, num_blocks, max_num_seqs],
            ref terms,
            ref part,
        } = *op
        else {
            return;
        };
        self.names += 1;
        let spec = WorkerSpec {
            name: format!("worker-{}", self.names),
            model: MODELS[model].to_owned(),
            weights_epoch: epoch,
            block_size,
            num_blocks,
            num_host_blocks: 0,
            max_num_seqs,
            max_model_len: 90,
            taints: terms.taints(),
            slo_classes: terms.slo_classes(),
            max_loras: terms.max_loras,
            kv_source: KvSource::Reported,
            kv_exchange: part.exchange.clone(),
            role: part.role,
        };
        let id = self.real.add_worker(spec.clone()).unwrap();
        self.model.workers.push(ModelWorker {
            id,
            spec,
            is_draining: false,
            cached: BTreeSet::new(),
            kept: BTreeSet::new(),
            loras: BTreeSet::new(),
            load: WorkerLoad::default(),
            reservations: Vec::new(),
            returned: Vec::new(),
            last_chosen: 0,
        });
    }

    fn stored(&mut self, worker: usize, family: u32, blocks: usize) {
        let hashes = self.chain(worker, family)[..blocks].to_vec();
        let model = &mut self.model.workers[worker];
        let mut after = model.cached.clone();
        after.extend(&hashes);
        let fits = after.len() <= model.spec.num_blocks as usize;
        let event = KvEvent::Stored(hashes.clone());
        let outcome = self.real.apply_kv_event(model.id, &event);
        assert_eq!(outcome.is_ok(), fits);
        if fits {
            model.cached = after;
            model.kept.retain(|hash| !hashes.contains(hash));
        }
    }

    /// The worker's device gives up what it holds of a chain from this block on, and its host memory keeps it.
    fn kept(&mut self, worker: usize, family: u32, block: usize) {
        let chain = self.chain(worker, family);
        let model = &mut self.model.workers[worker];
        let is_held = |hash: &&BlockHash| model.cached.contains(hash);
        let hashes: Vec<BlockHash> = chain[block..].iter().filter(is_held).copied().collect();
        model.kept.extend(&hashes);
        let event = KvEvent::Kept(hashes);
        self.real.apply_kv_event(model.id, &event).unwrap();
    }

    fn set_loras(&mut self, worker: usize, loras: &[usize]) {
        let loras: Vec<Lora<'_>> = loras.iter().map(|&index| LORAS[index]).collect();
        let model = &mut self.model.workers[worker];
        let outcome = self.real.set_loras(model.id, &loras);
        let fits = loras.len() <= model.spec.max_loras as usize;
        assert_eq!(outcome.is_ok(), fits);
        if fits {
            let owned = loras.iter().map(|lora| (lora.id.to_owned(), lora.version));
            model.loras = owned.collect();
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
        assert_eq!(reservation.num_blocks, chosen.booked_blocks(request));
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
            self.compare_moves(&reservation, request);
        }
        if let Some(fetch) = reservation.fetch {
            let source = self.model.worker(fetch.source);
            assert!(
                source.depth(request) >= fetch.num_blocks,
                "fetches what is not there"
            );
            assert_eq!(source.spec.kv_exchange, chosen.spec.kv_exchange);
        }
        self.model.commit(&reservation, request);
    }

    /// What the reservation says of KV that moves is what the model says.
    fn compare_moves(&self, reservation: &Reservation, request: &RouteRequest<'_>) {
        let chosen = self.model.worker(reservation.worker);
        let fetch = self.model.fetch(chosen, request);
        let split = self.model.split(chosen, request);
        let Some(part) = reservation.prefill else {
            assert_eq!(split, None, "it should have been split");
            let fetched = reservation.fetch.map(|fetch| fetch.num_blocks);
            assert_eq!(fetched, fetch);
            return;
        };
        assert_eq!(reservation.fetch, None);
        let helper = self.model.worker(part.worker);
        assert_eq!(helper.spec.role, WorkerRole::Prefill);
        assert_eq!(helper.spec.kv_exchange, chosen.spec.kv_exchange);
        assert_eq!(Some(helper.prefill_rank(request)), split);
    }

    fn release(&mut self, pick: usize) {
        let held = self.model.held();
        let Some(index) = pick.checked_rem(held.len()) else {
            return;
        };
        assert!(self.real.release(held[index]));
        assert!(!self.real.release(held[index]), "released twice");
        for worker in &mut self.model.workers {
            let of_it = |kept: &mut ModelReservation| kept.id == held[index];
            let gone = worker.reservations.extract_if(.., of_it);
            worker.returned.extend(gone.filter(|gone| gone.is_reported));
        }
    }

    fn prefill_done(&mut self, pick: usize) {
        let held = self.model.held();
        let Some(index) = pick.checked_rem(held.len()) else {
            return;
        };
        let is_first = self.real.prefill_done(held[index], Time::ZERO);
        for worker in &mut self.model.workers {
            let mut kept = worker.reservations.iter_mut();
            let Some(kept) = kept.find(|kept| kept.id == held[index]) else {
                continue;
            };
            assert_eq!(is_first, kept.prefill > 0);
            let prefill = std::mem::take(&mut kept.prefill);
            if kept.is_reported {
                worker.returned.push(ModelReservation {
                    prefill,
                    blocks: 0,
                    seqs: 0,
                    ..*kept
                });
            }
        }
    }

    fn apply_to_worker(&mut self, op: &Op) {
        let (Op::RemoveWorker(pick)
        | Op::SetDraining(pick, _)
        | Op::Cleared(pick)
        | Op::Load(pick, _)
        | Op::SetLoras(pick, _)
        | Op::Removed { worker: pick, .. }
        | Op::Kept { worker: pick, .. }
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
            Op::Kept { family, block, .. } => self.kept(index, family, block),
            Op::Removed { family, block, .. } => {
                let chain = self.chain(index, family);
                let end = if self.is_nested { 8 } else { block + 1 };
                let hashes = chain[block..end].to_vec();
                let model = &mut self.model.workers[index];
                model.cached.retain(|hash| !hashes.contains(hash));
                model.kept.retain(|hash| !hashes.contains(hash));
                self.real
                    .apply_kv_event(id, &KvEvent::Removed(hashes))
                    .unwrap();
            }
            Op::Cleared(_) => {
                self.real.apply_kv_event(id, &KvEvent::Cleared).unwrap();
                self.model.workers[index].cached.clear();
                self.model.workers[index].kept.clear();
            }
            Op::SetLoras(_, ref loras) => self.set_loras(index, loras),
            Op::Load(_, load) => {
                assert!(self.real.update_load(id, load));
                let worker = &mut self.model.workers[index];
                worker.load = load;
                worker.returned.clear();
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
            Op::AddWorker { .. } => self.add_worker(op),
            Op::Route {
                model,
                family,
                len,
                max_tokens,
                booked_tokens,
                exclude,
                lora,
                weights_epoch,
                ref terms,
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
                    booked_tokens,
                    exclude: &exclude,
                    lora: lora.map(|index| LORAS[index]),
                    weights_epoch,
                    slo_class: if terms.is_batch { "batch" } else { "" },
                    tolerations: if terms.is_tainted { &["spot"] } else { &[] },
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

#[test]
fn equals_take_turns_also_where_they_are_of_different_kinds() {
    for block_sizes in [[32, 32], [16, 32]] {
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        let mut number = 0;
        let workers = block_sizes.map(|block_size| {
            number += 1;
            let spec = WorkerSpec {
                name: format!("w{number}"),
                model: "m".to_owned(),
                block_size,
                num_blocks: 1000,
                max_num_seqs: 8,
                max_model_len: 4096,
                ..WorkerSpec::default()
            };
            scheduler.add_worker(spec).unwrap()
        });
        let mut chosen = [0; 2];
        for token in 0..10 {
            let request = RouteRequest {
                model: "m",
                token_ids: &[token; 8],
                max_tokens: 8,
                ..RouteRequest::default()
            };
            let reservation = scheduler.route(&request, Time(0)).unwrap();
            chosen[usize::from(reservation.worker == workers[1])] += 1;
            scheduler.release(reservation.id);
        }
        assert_eq!(chosen, [5, 5], "{block_sizes:?}");
    }
}
