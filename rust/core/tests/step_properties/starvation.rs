//! An adversary sends, step after step, whatever delays one request most. It starts all the same, within the bounds
//! that `docs/step_scheduler.md` states.

use std::collections::BTreeMap;

use orchestra_core::{
    HashSeed, RequestId, SamplingParams, Time, TokenId,
    step::{Request, StepOutput, StepScheduler, StepSchedulerConfig},
};
use proptest::{prelude::*, test_runner::TestRunner};

/// A request of the adversary.
#[derive(Clone, Copy, Debug)]
enum Move {
    /// Short, so that it ranks before others.
    Short { num_tokens: u32 },
    /// Begins as the victim does, so that the victim waits for its blocks, and goes on for itself.
    Shares { num_shared: u32, num_own: u32 },
}

#[derive(Clone, Debug)]
struct Attack {
    config: StepSchedulerConfig,
    /// Requests that are there before the victim.
    before: Vec<(Move, u32)>,
    num_victim_tokens: u32,
    /// What comes with each step, again and again; each with its `max_tokens`.
    moves: Vec<Vec<(Move, u32)>>,
}

/// How the victim fared.
#[derive(Debug)]
struct Outcome {
    num_overtakes: u32,
    num_steps: u64,
}

struct Arena {
    scheduler: StepScheduler,
    num_requests: u32,
    /// Prompt and output tokens of each request that has started.
    started: BTreeMap<u32, u64>,
    sizes: BTreeMap<u32, u64>,
}

impl Arena {
    fn new(config: &StepSchedulerConfig) -> Self {
        Self {
            scheduler: StepScheduler::new(config.clone()).expect("a valid config"),
            num_requests: 0,
            started: BTreeMap::new(),
            sizes: BTreeMap::new(),
        }
    }

    fn send(&mut self, prompt: Vec<TokenId>, max_tokens: u32) {
        let id = self.num_requests;
        let size = prompt.len() as u64 + u64::from(max_tokens);
        let request = Request {
            id: RequestId(u64::from(id)),
            prompt_token_ids: prompt,
            output_token_ids: Vec::new(),
            sampling: SamplingParams {
                max_tokens,
                ignore_eos: true,
                seed: u64::from(id),
                ..SamplingParams::default()
            },
            hash_seed: HashSeed(0),
        };
        // A full queue refuses the adversary, which costs it nothing.
        if self.scheduler.add_request(request, Time::ZERO).is_ok() {
            self.sizes.insert(id, size);
            self.num_requests += 1;
        }
    }

    fn attack(&mut self, (what, max_tokens): (Move, u32)) {
        let own = |count: u32| (0..count).map(|index| 1000 + self.num_requests * 64 + index);
        let prompt = match what {
            Move::Short { num_tokens } => own(num_tokens).collect(),
            Move::Shares {
                num_shared,
                num_own,
            } => (0..num_shared).chain(own(num_own)).collect(),
        };
        self.send(prompt, max_tokens);
    }

    fn step(&mut self) {
        let Some(plan) = self.scheduler.schedule(Time::ZERO) else {
            return;
        };
        for start in &plan.starts {
            let id = start.sampling.seed as u32;
            self.started.insert(id, self.sizes[&id]);
        }
        let output = StepOutput {
            step_id: plan.step_id,
            token_ids: vec![7; plan.samples.len()],
            logprobs: Vec::new(),
        };
        let committed = self.scheduler.update_from_output(&output, Time::ZERO);
        committed.expect("an output");
    }
}

/// Runs until the victim starts; panics where a bound is exceeded.
fn run(attack: &Attack) -> Outcome {
    let config = &attack.config;
    let mut arena = Arena::new(config);
    for &earlier in &attack.before {
        arena.attack(earlier);
    }
    let victim = arena.num_requests;
    arena.send((0..attack.num_victim_tokens).collect(), 1);
    assert_eq!(arena.num_requests, victim + 1, "the victim is accepted");

    let by_prefix = config.max_prefix_wait_steps * (config.max_num_seqs - 1);
    let mut num_steps = 0;
    for moves in attack.moves.iter().cycle() {
        for &next in moves {
            arena.attack(next);
        }
        arena.step();
        let num_overtakes = arena.started.range(victim + 1..).count() as u32;
        let has_started = arena.started.contains_key(&victim);
        // Those that start beside the victim in one step start after it where they rank behind.
        if has_started {
            return Outcome {
                num_overtakes,
                num_steps,
            };
        }
        assert!(
            num_overtakes <= config.max_overtakes + by_prefix,
            "overtaken {num_overtakes} times"
        );
        num_steps += 1;
        // Whoever started before the victim computes a token in each step in which it is the most senior one, once
        // before its last preemption and once after.
        let num_tokens: u64 = arena.started.values().sum();
        let bound = 2 * num_tokens + u64::from(config.max_prefix_wait_steps);
        assert!(num_steps <= bound, "waits for more than {bound} steps");
    }
    unreachable!("the moves go on for ever")
}

fn any_move() -> impl Strategy<Value = (Move, u32)> {
    let short = (1..4_u32).prop_map(|num_tokens| Move::Short { num_tokens });
    let shares = (4..24_u32, 0..8_u32).prop_map(|(num_shared, num_own)| Move::Shares {
        num_shared,
        num_own,
    });
    (prop_oneof![short, shares], 1..6_u32)
}

fn any_attack() -> impl Strategy<Value = Attack> {
    let config = (
        1..=4_u32,
        40..=90_u32,
        1..=6_u32,
        0..=4_u32,
        0..=6_u32,
        0..=4_u32,
    );
    let config = config.prop_map(
        |(block_size, num_kv_slots, max_num_seqs, spare, overtakes, waits)| StepSchedulerConfig {
            block_size,
            num_blocks: num_kv_slots / block_size,
            max_num_seqs,
            max_num_batched_tokens: max_num_seqs + spare,
            max_model_len: 40,
            max_num_waiting: 24,
            max_prefill_chunk: spare,
            max_overtakes: overtakes,
            max_prefix_wait_steps: waits,
            ..StepSchedulerConfig::default()
        },
    );
    (
        config,
        proptest::collection::vec(any_move(), 0..12),
        8..30_u32,
        proptest::collection::vec(proptest::collection::vec(any_move(), 0..5), 1..20),
    )
        .prop_map(|(config, before, num_victim_tokens, mut moves)| {
            // Somebody always comes: without pressure there is nothing to see.
            moves[0].push((Move::Short { num_tokens: 1 }, 1));
            Attack {
                config,
                before,
                num_victim_tokens,
                moves,
            }
        })
}

proptest! {
    #[test]
    fn no_request_starves(attack in any_attack()) {
        run(&attack);
    }
}

/// One that computes the victim's prefix in small chunks, and others that finish at once.
fn flood(max_overtakes: u32, max_prefix_wait_steps: u32) -> Outcome {
    let config = StepSchedulerConfig {
        block_size: 4,
        num_blocks: 100,
        max_num_seqs: 3,
        max_num_batched_tokens: 64,
        max_model_len: 200,
        max_num_waiting: 100,
        max_prefill_chunk: 4,
        max_overtakes,
        max_prefix_wait_steps,
        ..StepSchedulerConfig::default()
    };
    let one_token = (Move::Short { num_tokens: 1 }, 1);
    let leader = Move::Shares {
        num_shared: 160,
        num_own: 1,
    };
    run(&Attack {
        config,
        before: vec![(leader, 1)],
        num_victim_tokens: 160,
        moves: vec![vec![one_token; 4]],
    })
}

#[test]
fn a_flood_of_short_requests_overtakes_as_often_as_it_may() {
    for max_overtakes in [0, 5, 20] {
        let outcome = flood(max_overtakes, 0);
        // Those that start in the victim's own step, behind it, count as well: at most one, the other seats are taken.
        assert!(
            (max_overtakes..=max_overtakes + 1).contains(&outcome.num_overtakes),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_request_that_waits_for_a_prefix_is_passed_for_as_long_as_it_waits() {
    // While it is held back, one seat is the leader's and one is kept for it: one other passes in each step.
    let waiting = flood(0, 10);
    assert!((10..=11).contains(&waiting.num_overtakes), "{waiting:?}");
    assert_eq!(waiting.num_steps, 10);
}

#[test]
fn the_random_attacks_delay_their_victims() {
    let mut runner = TestRunner::deterministic();
    let (mut overtakes, mut steps) = (0, 0);
    for _ in 0..64 {
        let attack = any_attack().new_tree(&mut runner).expect("an attack");
        let outcome = run(&proptest::strategy::ValueTree::current(&attack));
        overtakes += u32::from(outcome.num_overtakes > 0);
        steps += u32::from(outcome.num_steps > 5);
    }
    assert!(
        overtakes > 20 && steps > 20,
        "{overtakes} overtaken, {steps} delayed"
    );
}
