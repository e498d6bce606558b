//! Workers, what they report, and requests.

use arbitrary::{Arbitrary, Unstructured};
use orchestra_core::{
    BlockHash, Time,
    scheduler::{
        Lora, ReservationId, RoutePolicy, RouteRequest, Scheduler, SchedulerConfig, SchedulerError,
        WorkerId, WorkerLoad, WorkerSpec,
    },
    step::KvEvent,
};

use crate::operations;

#[derive(Debug, Arbitrary)]
enum Op {
    AddWorker {
        name: u8,
        block_size: u8,
        num_blocks: u16,
        max_num_seqs: u32,
        max_model_len: u32,
        max_loras: u8,
        is_tainted: bool,
    },
    Report(u8, Report),
    Route {
        token_ids: Vec<u8>,
        max_tokens: u32,
        lora: Option<(u8, u8)>,
        weights_epoch: Option<u64>,
        is_tolerant: bool,
        exclude: Option<u8>,
    },
    Explain(Vec<u8>, u8),
    PrefillDone(u8),
    Release(u8),
}

/// What becomes of a worker, and what it tells.
#[derive(Debug, Arbitrary)]
enum Report {
    Removed,
    Draining(bool),
    Load([u32; 3], u64),
    KvStored(Vec<u8>),
    KvRemoved(Vec<u8>),
    /// Stored blocks, or the whole cache cleared.
    KvEvents(u8, Vec<Option<Vec<u8>>>),
    KvAll(u8, Vec<u8>),
    Loras(Vec<(u8, u8)>),
}

const POLICIES: [RoutePolicy; 4] = [
    RoutePolicy::Product,
    RoutePolicy::TransferAware,
    RoutePolicy::PowerOfTwo,
    RoutePolicy::ConsistentHash,
];
const LORA_IDS: [&str; 3] = ["", "poet", "coder"];

/// Any operations, in any order, with any figures.
///
/// # Panics
/// If an invariant breaks.
pub fn routing(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(policy) = input.choose(&POLICIES) else {
        return;
    };
    let config = SchedulerConfig {
        policy: *policy,
        max_num_workers: 6,
        max_num_reservations: 8,
        ..SchedulerConfig::default()
    };
    let Ok(mut scheduler) = Scheduler::new(config) else {
        return;
    };
    let mut held = Vec::new();
    for op in operations::<Op>(input) {
        apply(&mut scheduler, &mut held, op);
        scheduler.check_integrity();
    }
    for id in held {
        scheduler.release(id);
    }
    let stats = scheduler.stats(Time::ZERO);
    assert_eq!(stats.num_reservations, 0, "everything can be given back");
    scheduler.check_integrity();
}

fn apply(scheduler: &mut Scheduler, held: &mut Vec<ReservationId>, op: Op) {
    // Refusals are among what is tried: they must change nothing, which the integrity check sees.
    match op {
        Op::AddWorker { .. } => add_worker(scheduler, &op),
        Op::Route { .. } => route(scheduler, held, &op),
        Op::Explain(token_ids, k) => {
            let token_ids = tokens(&token_ids);
            let request = request(&token_ids, 1);
            if let Ok(explanation) = scheduler.explain(&request, k.into()) {
                assert!(explanation.candidates.len() <= k.into());
            }
        }
        Op::PrefillDone(pick) => {
            if let Some(&id) = held.get(usize::from(pick)) {
                scheduler.prefill_done(id, Time::ZERO);
            }
        }
        Op::Release(pick) => {
            if usize::from(pick) < held.len() {
                let id = held.swap_remove(pick.into());
                scheduler.release(id);
                assert!(!scheduler.release(id), "released twice");
            }
        }
        Op::Report(name, told) => {
            if let Some(id) = scheduler.worker_by_name(&worker(name)) {
                report(scheduler, id, told);
            }
        }
    }
}

fn report(scheduler: &mut Scheduler, id: WorkerId, told: Report) {
    let num_cached = |scheduler: &Scheduler| scheduler.stats(Time::ZERO).num_index_entries;
    let before = num_cached(scheduler);
    let taken = match told {
        Report::Removed => known(scheduler.remove_worker(id)),
        Report::Draining(on) => known(scheduler.set_draining(id, on)),
        Report::Load([num_running, num_waiting, kv_blocks_used], queued_prefill_tokens) => {
            let load = WorkerLoad {
                num_running,
                num_waiting,
                kv_blocks_used,
                queued_prefill_tokens,
            };
            known(scheduler.update_load(id, load))
        }
        Report::KvStored(blocks) => {
            let outcome = scheduler.apply_kv_event(id, &KvEvent::Stored(hashes(&blocks)));
            outcome.inspect_err(|_| assert_eq!(num_cached(scheduler), before))
        }
        Report::KvRemoved(blocks) => {
            scheduler.apply_kv_event(id, &KvEvent::Removed(hashes(&blocks)))
        }
        Report::KvEvents(sequence, events) => {
            let event = |blocks: &Option<Vec<u8>>| match blocks {
                Some(blocks) => KvEvent::Stored(hashes(blocks)),
                None => KvEvent::Cleared,
            };
            let events: Vec<KvEvent> = events.iter().map(event).collect();
            let outcome = scheduler.apply_kv_events(id, sequence.into(), &events);
            outcome.map(|_| ())
        }
        Report::KvAll(sequence, blocks) => {
            scheduler.resync_kv(id, sequence.into(), &hashes(&blocks))
        }
        Report::Loras(loras) => {
            let loras: Vec<Lora<'_>> = loras.into_iter().map(lora).collect();
            scheduler.set_loras(id, &loras)
        }
    };
    assert_ne!(taken, Err(SchedulerError::UnknownWorker));
}

fn known(is_known: bool) -> Result<(), SchedulerError> {
    is_known.then_some(()).ok_or(SchedulerError::UnknownWorker)
}

fn add_worker(scheduler: &mut Scheduler, op: &Op) {
    let &Op::AddWorker {
        name,
        block_size,
        num_blocks,
        max_num_seqs,
        max_model_len,
        max_loras,
        is_tainted,
    } = op
    else {
        return;
    };
    let spec = WorkerSpec {
        name: worker(name),
        model: "model".to_owned(),
        block_size: u32::from(block_size % 9),
        num_blocks: num_blocks.into(),
        max_num_seqs,
        max_model_len,
        max_loras: max_loras.into(),
        taints: is_tainted.then(|| "spot".to_owned()).into_iter().collect(),
        ..WorkerSpec::default()
    };
    let known = scheduler.worker_by_name(&spec.name);
    let name = spec.name.clone();
    let added = scheduler.add_worker(spec);
    assert_eq!(scheduler.worker_by_name(&name), added.ok().or(known));
}

fn route(scheduler: &mut Scheduler, held: &mut Vec<ReservationId>, op: &Op) {
    let Op::Route {
        token_ids,
        max_tokens,
        lora: adapter,
        weights_epoch,
        is_tolerant,
        exclude,
    } = op
    else {
        return;
    };
    let token_ids = tokens(token_ids);
    let exclude: Vec<WorkerId> = exclude
        .and_then(|name| scheduler.worker_by_name(&worker(name)))
        .into_iter()
        .collect();
    let request = RouteRequest {
        lora: adapter.map(lora),
        weights_epoch: *weights_epoch,
        tolerations: if *is_tolerant { &["spot"] } else { &[] },
        exclude: &exclude,
        ..request(&token_ids, *max_tokens)
    };
    let expected = scheduler.explain(&request, 1);
    match scheduler.route(&request, Time::ZERO) {
        Ok(reservation) => {
            assert!(!exclude.contains(&reservation.worker));
            let spec = scheduler.worker_spec(reservation.worker);
            assert!(spec.is_some_and(|spec| reservation.num_blocks <= spec.num_blocks));
            let best = expected.ok().and_then(|it| it.candidates.first().copied());
            assert_eq!(best.map(|it| it.worker), Some(reservation.worker));
            held.push(reservation.id);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn request(token_ids: &[u32], max_tokens: u32) -> RouteRequest<'_> {
    RouteRequest {
        model: "model",
        token_ids,
        max_tokens,
        ..RouteRequest::default()
    }
}

fn worker(name: u8) -> String {
    format!("worker-{}", name % 8)
}

fn tokens(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|&byte| u32::from(byte % 2)).collect()
}

fn hashes(bytes: &[u8]) -> Vec<BlockHash> {
    bytes.iter().map(|&byte| BlockHash(byte.into())).collect()
}

fn lora((id, version): (u8, u8)) -> Lora<'static> {
    Lora {
        id: LORA_IDS[usize::from(id) % LORA_IDS.len()],
        version: version.into(),
    }
}
