//! What a router learns of the worker's prefix cache.

use std::collections::BTreeSet;

use orchestra_core::{block_hashes, hash::SeedParts};
use orchestra_proto::v1::{
    KvEvents, StartSequence, kv_event::Event, router_message::Message as Down,
    worker_message::Message as Up,
};

use crate::support::{Engine, FakeRouter, Session, config, eventually, start};

/// What a router would believe.
#[derive(Default)]
struct Mirror {
    blocks: BTreeSet<u64>,
    sequence: u64,
}

impl Mirror {
    fn apply(&mut self, message: KvEvents) {
        self.sequence += 1;
        assert_eq!(message.sequence, self.sequence, "numbers count up by one");
        assert!(!message.events.is_empty());
        for event in message.events {
            match event.event.unwrap() {
                Event::Stored(stored) => self.blocks.extend(stored.block_hashes),
                Event::Removed(removed) => {
                    self.blocks
                        .retain(|hash| !removed.block_hashes.contains(hash));
                }
                Event::Cleared(_) => self.blocks.clear(),
            }
        }
    }

    /// Runs a sequence to its end, and reads every event that it caused.
    fn run(&mut self, session: &mut Session, sequence: StartSequence) {
        let id = sequence.sequence_id;
        session.send(Down::Start(sequence));
        self.read_until_end(session, id);
        // A step's events follow its tokens, so when this one's second token comes, all before have come. It has its
        // one block since the first, and never fills it: it causes no event after that.
        session.send(Down::Start(start(id + 1000, 1, 2)));
        self.read_until_end(session, id + 1000);
    }

    fn read_until_end(&mut self, session: &mut Session, sequence_id: u64) {
        let mut has_ended = false;
        while !has_ended {
            match session.next().unwrap() {
                Up::KvEvents(events) => self.apply(events),
                Up::Tokens(batch) => {
                    has_ended = batch.outputs.iter().any(|output| {
                        output.sequence_id == sequence_id && output.finish_reason != 0
                    });
                }
                _ => {}
            }
        }
    }
}

fn hashes_of(start: &StartSequence) -> Vec<u64> {
    let parts = SeedParts {
        model: "demo",
        weights_epoch: 3,
        salt: &start.cache_salt,
        ..SeedParts::default()
    };
    let hashes = block_hashes(parts.seed(), &start.prompt_token_ids, 4);
    hashes.iter().map(|hash| hash.0).collect()
}

#[test]
fn a_router_computes_the_hashes_that_the_worker_reports() {
    let mut router = FakeRouter::start();
    let engine = Engine::start(config(router.address));
    let (mut session, _) = router.welcome();
    let mut mirror = Mirror::default();
    for (id, salt) in [(1, ""), (2, "tenant")] {
        let mut sequence = start(id, 18, 1);
        sequence.cache_salt = salt.to_owned();
        mirror.run(&mut session, sequence.clone());
        for hash in hashes_of(&sequence) {
            assert!(
                mirror.blocks.contains(&hash),
                "block {hash:x} of sequence {id}"
            );
        }
    }
    assert_eq!(mirror.blocks.len(), 8);
    engine.close();
}

#[test]
fn events_add_up_to_the_next_snapshot_also_with_evictions() {
    let mut router = FakeRouter::start();
    let mut config = config(router.address);
    config.scheduler.num_blocks = 12;
    let engine = Engine::start(config);
    let (mut session, hello) = router.welcome();
    let mut mirror = Mirror {
        blocks: hello.block_hashes.into_iter().collect(),
        sequence: 0,
    };
    for id in 1..=9 {
        mirror.run(&mut session, start(id, 14 + id as u32, 6));
    }
    assert!(mirror.sequence > 9, "blocks came in several steps");
    assert!(mirror.blocks.len() <= 12, "evictions were told");

    // The stream breaks, a new one begins with a snapshot and counts from one again.
    drop(session);
    let (mut session, hello) = router.welcome();
    let snapshot: BTreeSet<u64> = hello.block_hashes.iter().copied().collect();
    assert_eq!(snapshot.len(), hello.block_hashes.len(), "no block twice");
    assert_eq!(snapshot, mirror.blocks);
    assert!(!snapshot.is_empty());

    mirror.sequence = 0;
    mirror.run(&mut session, start(20, 21, 3));
    assert!(mirror.sequence > 0, "the new stream has events of its own");
    eventually("idle", || engine.agent.is_idle());
    engine.close();
}
