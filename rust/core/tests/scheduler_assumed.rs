//! Workers without KV events: what the index claims of them equals a naive list of the prompts that they were given.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use orchestra_core::{
    BlockHash, Time, block_hashes,
    scheduler::{
        KvSource, ReservationId, RouteRequest, Scheduler, SchedulerConfig, SchedulerError,
        WorkerId, WorkerSpec,
    },
    step::KvEvent,
};
use proptest::prelude::*;

const BLOCK_SIZE: u32 = 4;
/// Most blocks of a worker and its time to live in seconds, by name.
const KINDS: [(u32, u32); 3] = [(5, 0), (16, 4), (40, 0)];
const SECOND: u64 = 1_000_000;

fn spec(kind: usize) -> WorkerSpec {
    let (max_blocks, ttl_s) = KINDS[kind];
    WorkerSpec {
        name: format!("worker-{kind}"),
        model: "model".into(),
        block_size: BLOCK_SIZE,
        num_blocks: 100,
        max_num_seqs: 4,
        max_model_len: 200,
        kv_source: KvSource::Assumed { max_blocks, ttl_s },
        ..WorkerSpec::default()
    }
}

/// Prompts of all families begin alike, those of the even and the odd ones for longer.
fn prompt(family: u32, len: u32) -> Vec<u32> {
    let token = |at: u32| match at {
        0..12 => at,
        12..24 => at + 1000 * (family % 2 + 1),
        _ => at + 10_000 * (family + 1),
    };
    (0..len).map(token).collect()
}

fn usable(token_ids: &[u32]) -> Vec<BlockHash> {
    let seed = spec(0).hash_seed("", None);
    block_hashes(seed, &token_ids[..token_ids.len() - 1], BLOCK_SIZE as usize)
}

/// What a worker was given: least recently used first, with the second of use.
#[derive(Default)]
struct Given(Vec<(BlockHash, u64)>);

impl Given {
    fn touch(&mut self, chain: &[BlockHash], max_blocks: u32, now_s: u64) {
        for &hash in chain.iter().take(max_blocks as usize).rev() {
            self.0.retain(|&(other, _)| other != hash);
            self.0.push((hash, now_s));
        }
        let excess = self.0.len().saturating_sub(max_blocks as usize);
        self.0.drain(..excess);
    }

    fn expire(&mut self, ttl_s: u32, now_s: u64) {
        self.0
            .retain(|&(_, used)| ttl_s == 0 || now_s - used < u64::from(ttl_s));
    }

    fn depth(&self, chain: &[BlockHash]) -> usize {
        let is_held = |hash: &&BlockHash| self.0.iter().any(|(held, _)| held == *hash);
        chain.iter().take_while(is_held).count()
    }
}

struct Pair {
    real: Scheduler,
    given: BTreeMap<WorkerId, (usize, Given)>,
    held: Vec<ReservationId>,
    now_s: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Route {
        family: u32,
        len: u32,
    },
    Release(usize),
    /// Adds the worker where it is away, and removes it where it is there.
    Toggle(usize),
    Clear(usize),
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0_u32..5, 1_u32..90).prop_map(|(family, len)| Op::Route { family, len }),
        3 => (0_usize..50).prop_map(Op::Release),
        1 => (0..KINDS.len()).prop_map(Op::Toggle),
        1 => (0..KINDS.len()).prop_map(Op::Clear),
        2 => (1_u64..4).prop_map(Op::Wait),
    ]
}

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            real: Scheduler::new(SchedulerConfig::default()).unwrap(),
            given: BTreeMap::new(),
            held: Vec::new(),
            now_s: 0,
        };
        (0..KINDS.len()).for_each(|kind| pair.toggle(kind));
        pair
    }

    fn toggle(&mut self, kind: usize) {
        let spec = spec(kind);
        if let Some(id) = self.real.worker_by_name(&spec.name) {
            self.real.remove_worker(id);
            self.given.remove(&id);
        } else {
            let id = self.real.add_worker(spec).unwrap();
            self.given.insert(id, (kind, Given::default()));
        }
    }

    fn route(&mut self, family: u32, len: u32) {
        let token_ids = prompt(family, len);
        let request = RouteRequest {
            model: "model",
            token_ids: &token_ids,
            max_tokens: 1,
            ..RouteRequest::default()
        };
        let chain = usable(&token_ids);
        let Ok(explanation) = self.real.explain(&request, usize::MAX) else {
            assert!(self.given.is_empty());
            return;
        };
        for candidate in explanation.candidates {
            let depth = self.given[&candidate.worker].1.depth(&chain);
            assert_eq!(candidate.num_cached_tokens, depth as u32 * BLOCK_SIZE);
        }
        let now = Time(self.now_s * SECOND);
        let reservation = self.real.route(&request, now).unwrap();
        let (kind, given) = self.given.get_mut(&reservation.worker).unwrap();
        let depth = given.depth(&chain);
        assert_eq!(reservation.num_cached_tokens, depth as u32 * BLOCK_SIZE);
        let (max_blocks, ttl_s) = KINDS[*kind];
        given.expire(ttl_s, self.now_s);
        given.touch(&chain, max_blocks, self.now_s);
        self.held.push(reservation.id);
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Route { family, len } => self.route(family, len),
            Op::Release(pick) => {
                if let Some(index) = pick.checked_rem(self.held.len()) {
                    self.real.release(self.held.swap_remove(index));
                }
            }
            Op::Toggle(kind) => self.toggle(kind),
            Op::Clear(kind) => {
                if let Some(id) = self.real.worker_by_name(&spec(kind).name) {
                    self.real.apply_kv_event(id, &KvEvent::Cleared).unwrap();
                    self.given.insert(id, (kind, Given::default()));
                }
            }
            Op::Wait(seconds) => {
                self.now_s += seconds;
                self.real.expire_kv(Time(self.now_s * SECOND));
                for (kind, given) in self.given.values_mut() {
                    given.expire(KINDS[*kind].1, self.now_s);
                }
            }
        }
        for (id, snapshot) in self.real.workers() {
            let given = &self.given[&id].1;
            assert_eq!(snapshot.num_cached_blocks as usize, given.0.len());
        }
        self.real.check_integrity();
    }
}

proptest! {
    #[test]
    fn the_index_claims_what_a_list_by_use_has(ops in prop::collection::vec(op(), 1..100)) {
        let mut pair = Pair::new();
        for op in &ops {
            pair.apply(op);
        }
    }
}

#[test]
fn events_of_a_worker_that_has_none_are_refused() {
    let mut pair = Pair::new();
    pair.route(0, 60);
    let (&id, (_, given)) = pair
        .given
        .iter()
        .find(|(_, (_, it))| !it.0.is_empty())
        .unwrap();
    let num_given = given.0.len();
    let stored = KvEvent::Stored(vec![BlockHash(1)]);
    let refusals = [
        pair.real.apply_kv_event(id, &stored).unwrap_err(),
        pair.real
            .apply_kv_events(id, 0, std::slice::from_ref(&stored))
            .unwrap_err(),
        pair.real.resync_kv(id, 0, &[]).unwrap_err(),
    ];
    for refusal in refusals {
        assert!(matches!(
            refusal,
            SchedulerError::InvalidField {
                field: "kv_source",
                ..
            }
        ));
    }
    let snapshot = pair.real.workers().find(|(of, _)| *of == id).unwrap().1;
    assert_eq!(snapshot.num_cached_blocks as usize, num_given);
}

#[test]
fn as_many_blocks_as_the_worker_has_may_be_assumed() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    for (max_blocks, is_valid) in [(0, false), (1, true), (100, true), (101, false)] {
        let outcome = scheduler.add_worker(WorkerSpec {
            name: format!("worker-{max_blocks}"),
            kv_source: KvSource::Assumed {
                max_blocks,
                ttl_s: 0,
            },
            ..spec(0)
        });
        assert_eq!(outcome.is_ok(), is_valid, "{max_blocks}");
    }
}

#[test]
fn a_remembered_prompt_of_4_kb_costs_less_than_3_kb() {
    // 4 KB of text in chunks of 128 bytes, four bytes to a "token".
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    for name in 0..4 {
        let spec = WorkerSpec {
            name: format!("worker-{name}"),
            block_size: 32,
            num_blocks: 1 << 24,
            max_num_seqs: 1 << 24,
            max_model_len: 2048,
            kv_source: KvSource::Assumed {
                max_blocks: 1 << 20,
                ttl_s: 0,
            },
            ..spec(0)
        };
        scheduler.add_worker(spec).unwrap();
    }
    let idle = scheduler.stats(Time::ZERO).index_bytes;
    for number in 1..=8_000_u32 {
        let token_ids: Vec<u32> = (0..1025).map(|at| at + number * 10_000).collect();
        let request = RouteRequest {
            model: "model",
            token_ids: &token_ids,
            max_tokens: 1,
            ..RouteRequest::default()
        };
        let reservation = scheduler.route(&request, Time::ZERO).unwrap();
        scheduler.release(reservation.id);
        if number % 500 == 0 {
            let stats = scheduler.stats(Time::ZERO);
            assert_eq!(stats.num_index_entries, u64::from(number) * 32);
            let bytes = (stats.index_bytes - idle) / u64::from(number);
            assert!(bytes < 3_000, "{bytes} bytes a prompt at {number} prompts");
        }
    }
}
