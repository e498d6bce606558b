//! Numbered KV events over a channel that loses, repeats and delays messages: no block is ever claimed that the worker
//! does not hold, and everything is known again after a resync.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use orchestra_core::{
    BlockHash, Time, block_hashes,
    scheduler::{
        KvFeed, RouteRequest, Scheduler, SchedulerConfig, SchedulerError, WorkerId, WorkerSpec,
    },
    step::KvEvent,
};
use proptest::prelude::*;

const NUM_BLOCKS: u32 = 12;

/// A worker with a cache of its own, and the scheduler that hears of it.
struct Feed {
    scheduler: Scheduler,
    worker: WorkerId,
    /// What the worker holds.
    held: BTreeSet<BlockHash>,
    /// Number of its next message.
    sequence: u64,
}

fn prompt() -> Vec<u32> {
    (0..200).collect()
}

fn chain() -> Vec<BlockHash> {
    block_hashes(spec().hash_seed("", None), &prompt(), 4)
}

fn spec() -> WorkerSpec {
    WorkerSpec {
        name: "worker".into(),
        model: "model".into(),
        block_size: 4,
        num_blocks: NUM_BLOCKS,
        max_num_seqs: 4,
        max_model_len: 48,
        ..WorkerSpec::default()
    }
}

impl Feed {
    fn new() -> Self {
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        let worker = scheduler.add_worker(spec()).unwrap();
        Self {
            scheduler,
            worker,
            held: BTreeSet::new(),
            sequence: 7,
        }
    }

    /// The worker changes what it holds, and numbers the message of it.
    fn change(&mut self, events: Vec<KvEvent>) -> (u64, Vec<KvEvent>) {
        for event in &events {
            match event {
                KvEvent::Stored(hashes) | KvEvent::Kept(hashes) => self.held.extend(hashes),
                KvEvent::Removed(hashes) => self.held.retain(|hash| !hashes.contains(hash)),
                KvEvent::Cleared => self.held.clear(),
            }
        }
        self.sequence += 1;
        (self.sequence - 1, events)
    }

    fn deliver(&mut self, (sequence, events): &(u64, Vec<KvEvent>)) -> KvFeed {
        let feed = self
            .scheduler
            .apply_kv_events(self.worker, *sequence, events);
        feed.unwrap()
    }

    fn num_cached(&self) -> u32 {
        self.scheduler.workers().next().unwrap().1.num_cached_blocks
    }

    /// Blocks of the prompt that a request would find.
    fn depth(&self) -> usize {
        let request = RouteRequest {
            model: "model",
            token_ids: &prompt()[..40],
            max_tokens: 1,
            ..RouteRequest::default()
        };
        let best = self.scheduler.explain(&request, 1).unwrap().candidates[0];
        best.num_cached_tokens as usize / 4
    }

    fn resync(&mut self) {
        let all: Vec<BlockHash> = self.held.iter().copied().collect();
        let outcome = self
            .scheduler
            .resync_kv(self.worker, self.sequence - 1, &all);
        outcome.unwrap();
        assert_eq!(self.num_cached() as usize, self.held.len());
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Holds the first so many blocks, and says so.
    Grow(usize),
    Shrink(usize),
    Clear,
    Resync,
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    Arrives,
    Repeats,
    IsLost,
    ComesLate,
}

fn step() -> impl Strategy<Value = (Op, Fate)> {
    let op = prop_oneof![
        6 => (1..=NUM_BLOCKS as usize).prop_map(Op::Grow),
        4 => (0..NUM_BLOCKS as usize).prop_map(Op::Shrink),
        1 => Just(Op::Clear),
        1 => Just(Op::Resync),
    ];
    let fate = prop_oneof![
        12 => Just(Fate::Arrives),
        2 => Just(Fate::Repeats),
        2 => Just(Fate::IsLost),
        1 => Just(Fate::ComesLate),
    ];
    (op, fate)
}

proptest! {
    #[test]
    fn nothing_is_claimed_that_is_not_there(steps in prop::collection::vec(step(), 1..60)) {
        let mut feed = Feed::new();
        let chain = chain();
        let first = feed.change(vec![KvEvent::Stored(chain[..1].to_vec())]);
        prop_assert_eq!(feed.deliver(&first), KvFeed::InStep);
        let mut late = None;
        let (mut is_complete, mut highest) = (true, first.0);
        for (op, fate) in steps {
            let events = match op {
                Op::Grow(to) => vec![KvEvent::Stored(chain[..to].to_vec())],
                Op::Shrink(to) => vec![KvEvent::Removed(chain[to..NUM_BLOCKS as usize].to_vec())],
                Op::Clear => vec![KvEvent::Cleared, KvEvent::Stored(chain[..2].to_vec())],
                Op::Resync => {
                    feed.resync();
                    (is_complete, highest) = (true, feed.sequence - 1);
                    continue;
                }
            };
            let message = feed.change(events);
            match fate {
                Fate::IsLost => continue,
                Fate::ComesLate => {
                    late = Some(message);
                    continue;
                }
                Fate::Arrives | Fate::Repeats => {}
            }
            is_complete = (is_complete && message.0 == highest + 1) || matches!(op, Op::Clear);
            highest = message.0;
            let state = feed.deliver(&message);
            prop_assert_eq!(state == KvFeed::InStep, is_complete);
            // Again, or overtaken by this one: it changes nothing.
            let again = matches!(fate, Fate::Repeats).then_some(message);
            for past in [again, late.take()].into_iter().flatten() {
                prop_assert_eq!(feed.deliver(&past), state);
            }
            let num_held = if is_complete { feed.held.len() } else { 0 };
            prop_assert_eq!(feed.num_cached() as usize, num_held);
            prop_assert_eq!(feed.depth(), num_held.min(9));
            feed.scheduler.check_integrity();
        }
        feed.resync();
        prop_assert_eq!(feed.depth(), feed.held.len().min(9));
    }
}

#[test]
fn a_gap_forgets_and_a_cleared_cache_is_known_again() {
    let mut feed = Feed::new();
    let chain = chain();
    let stored = |blocks: usize| vec![KvEvent::Stored(chain[..blocks].to_vec())];
    let message = feed.change(stored(4));
    assert_eq!(feed.deliver(&message), KvFeed::InStep);
    let _lost = feed.change(vec![KvEvent::Removed(chain[2..4].to_vec())]);
    let message = feed.change(stored(1));
    assert_eq!(feed.deliver(&message), KvFeed::Lost { expected: 8 });
    assert_eq!((feed.num_cached(), feed.depth()), (0, 0));
    let message = feed.change(stored(1));
    assert_eq!(feed.deliver(&message), KvFeed::Lost { expected: 8 });

    let message = feed.change(vec![KvEvent::Cleared, KvEvent::Stored(chain[..3].to_vec())]);
    assert_eq!(feed.deliver(&message), KvFeed::InStep);
    assert_eq!((feed.num_cached(), feed.depth()), (3, 3));
    assert_eq!(feed.scheduler.stats(Time::ZERO).num_kv_gaps, 1);
}

#[test]
fn a_refused_message_leaves_nothing_half_known() {
    let mut feed = Feed::new();
    let chain = chain();
    let message = feed.change(vec![KvEvent::Stored(chain[..2].to_vec())]);
    feed.deliver(&message);
    let too_many = vec![
        KvEvent::Removed(chain[1..2].to_vec()),
        KvEvent::Stored(chain[..=NUM_BLOCKS as usize].to_vec()),
    ];
    let outcome = feed.scheduler.apply_kv_events(feed.worker, 8, &too_many);
    assert!(matches!(outcome, Err(SchedulerError::TooManyBlocks { .. })));
    assert_eq!(feed.num_cached(), 0);
    let refused = feed.scheduler.resync_kv(feed.worker, 8, &chain);
    assert!(matches!(refused, Err(SchedulerError::TooManyBlocks { .. })));
    feed.scheduler.check_integrity();
}
