//! The TPOT target against a machine with known costs: decodes keep their time per token, prompts get the rest.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use orchestra_core::{
    HashSeed, RequestId, SamplingParams, Time,
    step::{Request, StepOutput, StepPlan, StepScheduler, StepSchedulerConfig},
};

const TARGET_US: u32 = 50_000;

/// A machine on which a step lasts 3 ms, and 60 µs per decode, 10 ns per token of decodes' context, and 70 µs per
/// prefill token; times a slowness, give or take 8 %.
struct Machine {
    scheduler: StepScheduler,
    now: Time,
    random: u64,
    num_requests: u64,
    slowness: f64,
}

/// What one step did.
#[derive(Clone, Copy)]
struct Step {
    num_decodes: usize,
    num_prefill: usize,
    micros: f64,
    /// Prefill tokens with which the step would last exactly the target, by the true costs.
    num_prefill_ideal: f64,
}

impl Machine {
    fn new(config: StepSchedulerConfig, seed: u64) -> Self {
        let config = StepSchedulerConfig {
            num_blocks: 60_000,
            max_num_seqs: 64,
            max_model_len: 10_000,
            enable_prefix_cache: false,
            ..config
        };
        Self {
            scheduler: StepScheduler::new(config).unwrap(),
            now: Time::ZERO,
            random: seed,
            num_requests: 0,
            slowness: 1.0,
        }
    }

    /// The next number of a linear congruential generator (Knuth's MMIX constants), below `bound`.
    fn random_below(&mut self, bound: u64) -> u64 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }

    fn add(&mut self, num_prompt_tokens: u64, max_tokens: u32) {
        let request = Request {
            id: RequestId(self.num_requests),
            prompt_token_ids: (0..num_prompt_tokens as u32).collect(),
            output_token_ids: Vec::new(),
            sampling: SamplingParams {
                max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            hash_seed: HashSeed(0),
        };
        self.num_requests += 1;
        self.scheduler.add_request(request, self.now).unwrap();
    }

    fn step(&mut self) -> Step {
        let plan = self.scheduler.schedule(self.now).unwrap();
        let noise = 0.92 + self.random_below(1601) as f64 / 10_000.0;
        let step = cost_of(&plan, self.slowness, noise);
        self.now = self.now + Duration::from_micros(step.micros as u64);
        let output = StepOutput {
            step_id: plan.step_id,
            token_ids: vec![1; plan.samples.len()],
            logprobs: Vec::new(),
        };
        self.scheduler
            .update_from_output(&output, self.now)
            .unwrap();
        step
    }

    /// Steps under more requests than the machine can take.
    fn saturated_steps(&mut self, num_steps: usize) -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..num_steps {
            while self.scheduler.stats().num_waiting < 8 {
                let prompt = 500 + self.random_below(6000);
                let output = 50 + self.random_below(300);
                self.add(prompt, output as u32);
            }
            steps.push(self.step());
        }
        steps
    }
}

fn cost_of(plan: &StepPlan, slowness: f64, noise: f64) -> Step {
    let lens = plan.query_start.windows(2).map(|pair| pair[1] - pair[0]);
    let decodes: Vec<u32> = lens
        .zip(&plan.context_lens)
        .filter(|&(len, _)| len == 1)
        .map(|(_, &context)| context)
        .collect();
    let num_prefill = plan.token_ids.len() - decodes.len();
    let context: f64 = decodes.iter().copied().map(f64::from).sum();
    let without_prefill = 3000.0 + 60.0 * decodes.len() as f64 + 0.01 * context;
    let factor = slowness * noise;
    Step {
        num_decodes: decodes.len(),
        num_prefill,
        micros: (without_prefill + 70.0 * num_prefill as f64) * factor,
        num_prefill_ideal: (f64::from(TARGET_US) / slowness - without_prefill) / 70.0,
    }
}

/// The median time of the steps in which something decodes, µs.
fn tpot_p50(steps: &[Step]) -> f64 {
    let decoding = steps.iter().filter(|step| step.num_decodes > 0);
    let mut times: Vec<f64> = decoding.map(|step| step.micros).collect();
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

fn with_target(tpot_target_us: u32) -> StepSchedulerConfig {
    StepSchedulerConfig {
        tpot_target_us,
        ..StepSchedulerConfig::default()
    }
}

#[test]
fn tpot_meets_the_target_and_prompts_get_what_is_left() {
    for seed in 1..=4 {
        let mut machine = Machine::new(with_target(TARGET_US), seed);
        machine.saturated_steps(100);
        let steps = machine.saturated_steps(1000);
        let p50 = tpot_p50(&steps) / f64::from(TARGET_US);
        assert!(
            (0.95..1.05).contains(&p50),
            "seed {seed}: p50 is {p50} of the target"
        );

        let prefill: usize = steps.iter().map(|step| step.num_prefill).sum();
        let ideal: f64 = steps.iter().map(|step| step.num_prefill_ideal).sum();
        let share = prefill as f64 / ideal;
        assert!(
            share > 0.93,
            "seed {seed}: {share} of the ideal prefill throughput"
        );
    }
}

#[test]
fn without_a_target_decodes_wait_for_whole_budgets() {
    let mut machine = Machine::new(with_target(0), 1);
    machine.saturated_steps(100);
    let p50 = tpot_p50(&machine.saturated_steps(500)) / f64::from(TARGET_US);
    assert!(p50 > 1.5, "p50 is {p50} of the target");
}

#[test]
fn follows_a_machine_that_slows_down() {
    let mut machine = Machine::new(with_target(TARGET_US), 1);
    machine.saturated_steps(300);
    machine.slowness = 2.0;
    machine.saturated_steps(50);
    let p50 = tpot_p50(&machine.saturated_steps(300)) / f64::from(TARGET_US);
    assert!((0.93..1.07).contains(&p50), "p50 is {p50} of the target");
}

#[test]
fn without_decodes_the_whole_budget_is_used() {
    let mut machine = Machine::new(with_target(TARGET_US), 1);
    machine.add(5000, 1);
    let chunks = [2048, 2048, 904].map(|_| machine.step().num_prefill);
    assert_eq!(chunks, [2048, 2048, 904]);
}

#[test]
fn a_target_out_of_reach_leaves_prompts_their_least() {
    let config = StepSchedulerConfig {
        min_prefill_tokens: 40,
        ..with_target(1)
    };
    let mut machine = Machine::new(config, 1);
    machine.add(10, 1000);
    machine.step();
    machine.add(1000, 1);
    for _ in 0..25 {
        assert_eq!(machine.step().num_prefill, 40);
    }
    assert_eq!(machine.step().num_prefill, 0);
}
