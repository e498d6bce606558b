//! A router that loses streams, aborts and starts over at random: every token is told once and in order.

use std::collections::BTreeMap;

use orchestra_proto::v1::{
    FinishReason, SequenceOutput, router_message::Message as Down, worker_message::Message as Up,
};

use crate::support::{Engine, FakeRouter, Session, abort, config, drawn_token, eventually, start};

const NUM_SEQUENCES: u64 = 60;

/// Numbers that repeat with their seed.
struct Dice(u64);

impl Dice {
    /// True once in `sides` times.
    fn hits(&mut self, sides: u64) -> bool {
        self.below(sides) == 0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// A sequence, as the router that continues it elsewhere keeps it.
struct Kept {
    num_prompt_tokens: u32,
    max_tokens: u32,
    token_ids: Vec<u32>,
}

struct Replayer {
    dice: Dice,
    live: BTreeMap<u64, Kept>,
    num_started: u64,
    num_aborted: u64,
}

impl Replayer {
    fn start_one(&mut self, session: &mut Session) {
        self.num_started += 1;
        let kept = Kept {
            num_prompt_tokens: 1 + self.dice.below(40) as u32,
            max_tokens: 1 + self.dice.below(30) as u32,
            token_ids: Vec::new(),
        };
        self.live.insert(self.num_started, kept);
        self.send(session, self.num_started);
    }

    fn send(&self, session: &mut Session, id: u64) {
        let kept = &self.live[&id];
        let mut message = start(id, kept.num_prompt_tokens, kept.max_tokens);
        message.output_token_ids.clone_from(&kept.token_ids);
        session.send(Down::Start(message));
    }

    fn abort_one(&mut self, session: &mut Session) {
        let index = self.dice.below(self.live.len() as u64) as usize;
        if let Some(&id) = self.live.keys().nth(index) {
            self.live.remove(&id);
            self.num_aborted += 1;
            session.send(abort(id));
        }
    }

    fn take(&mut self, output: &SequenceOutput) {
        // Not live: aborted while the output was under way.
        let Some(kept) = self.live.get_mut(&output.sequence_id) else {
            return;
        };
        assert_eq!(output.error, None);
        assert_eq!(
            output.first_index as usize,
            kept.token_ids.len(),
            "gap or repeat"
        );
        kept.token_ids.extend(&output.token_ids);
        if output.finish_reason() != FinishReason::Unspecified {
            let first = kept.num_prompt_tokens;
            let expected: Vec<u32> = (first..first + kept.max_tokens).map(drawn_token).collect();
            assert_eq!(kept.token_ids, expected, "sequence {}", output.sequence_id);
            self.live.remove(&output.sequence_id);
        }
    }
}

/// Returns how many streams were lost, sequences aborted and preempted.
fn replay(seed: u64) -> [u64; 3] {
    let mut router = FakeRouter::start();
    let mut config = config(router.address);
    // Too small for eight sequences at a time: they are preempted.
    config.scheduler.num_blocks = 40;
    config.scheduler.max_num_waiting = 1000;
    let engine = Engine::start(config);
    let (mut session, _) = router.welcome();
    let mut replayer = Replayer {
        dice: Dice(seed),
        live: BTreeMap::new(),
        num_started: 0,
        num_aborted: 0,
    };
    let mut num_lost = 0;
    while replayer.num_started < NUM_SEQUENCES || !replayer.live.is_empty() {
        if replayer.num_started < NUM_SEQUENCES && replayer.dice.hits(2) {
            replayer.start_one(&mut session);
        }
        if !replayer.live.is_empty() && replayer.dice.hits(40) {
            replayer.abort_one(&mut session);
        }
        if replayer.dice.hits(60) {
            num_lost += 1;
            drop(session);
            session = router.welcome().0;
            let ids: Vec<u64> = replayer.live.keys().copied().collect();
            for id in ids {
                replayer.send(&mut session, id);
            }
        }
        if let Some(Up::Tokens(batch)) = session.next() {
            batch
                .outputs
                .iter()
                .for_each(|output| replayer.take(output));
        }
    }
    eventually("idle", || engine.agent.is_idle());
    let stats = engine.agent.stats();
    assert_eq!(stats.kv_blocks_used, 0);
    assert_eq!(stats.refusals, 0);
    engine.close();
    [num_lost, replayer.num_aborted, stats.preemptions]
}

#[test]
#[expect(clippy::print_stdout, reason = "shown when the test fails")]
fn tokens_are_told_once_and_in_order_across_lost_streams() {
    let mut happened = [0; 3];
    for seed in 1..=8 {
        println!("seed {seed}");
        let counts = replay(seed);
        happened
            .iter_mut()
            .zip(counts)
            .for_each(|(sum, count)| *sum += count);
    }
    assert!(
        happened.iter().all(|&count| count > 0),
        "too tame: {happened:?}"
    );
}
