//! How long the step scheduler takes to plan a step and to commit it.
//!
//! `cargo bench -p orchestra-core --bench step_time` prints the median and the 99th percentile of each case.
//! With `-- SEQUENCES PROMPT_TOKENS UNMEASURED_STEPS STEPS` it measures so many decodes and prints their medians as
//! JSON, for `benches/step_planner`.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark prints, or fails loudly"
)]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::time::{Duration, Instant};

use orchestra_core::{
    HashSeed, RequestId, SamplingParams, Time, TokenId,
    step::{Request, StepOutput, StepPlan, StepScheduler, StepSchedulerConfig},
};

const NUM_STEPS: usize = 400;

fn main() {
    // Cargo adds a flag of its own.
    let numbers: Vec<u32> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .map(|argument| argument.parse().unwrap())
        .collect();
    match numbers[..] {
        [] => measure_all(),
        [num_seqs, num_tokens, num_unmeasured, num_steps] => {
            let config = StepSchedulerConfig {
                max_num_seqs: 1024,
                ..config()
            };
            let mut scheduler = decoding(config, num_seqs, num_tokens);
            for _ in 0..num_unmeasured {
                step(&mut scheduler);
            }
            assert_eq!(
                scheduler.stats().num_running,
                num_seqs,
                "all of them decode"
            );
            print_medians((0..num_steps).map(|_| step(&mut scheduler)).collect());
        }
        _ => panic!("SEQUENCES PROMPT_TOKENS UNMEASURED_STEPS STEPS"),
    }
}

fn print_medians(times: Vec<(Duration, Duration)>) {
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6
    };
    let both = times
        .iter()
        .map(|(schedule, commit)| *schedule + *commit)
        .collect();
    let (schedule, commit) = times.into_iter().unzip();
    println!(
        "{{\"schedule_us\": {}, \"commit_us\": {}, \"step_us\": {}}}",
        median(schedule),
        median(commit),
        median(both)
    );
}

fn measure_all() {
    println!(
        "{:44} {:>22} {:>22}",
        "case", "schedule p50 / p99 µs", "commit p50 / p99 µs"
    );
    for num_tokens in [128, 1024, 8192] {
        let scheduler = decoding(config(), 256, num_tokens);
        measure(&format!("256 decodes of {num_tokens} tokens"), scheduler);
    }
    measure("the same, 8192 wait for seats", waiting_for_seats());
    measure(
        "64 decodes, 32768 cached tokens wait for room",
        waiting_for_room(),
    );
    measure("254 wait for a prefix of 4096 tokens", waiting_for_prefix());
}

fn config() -> StepSchedulerConfig {
    StepSchedulerConfig {
        num_blocks: 200_000,
        max_model_len: 65_536,
        max_num_batched_tokens: 4096,
        max_num_waiting: 10_000,
        ..StepSchedulerConfig::default()
    }
}

fn add(scheduler: &mut StepScheduler, id: u64, prompt: impl Iterator<Item = TokenId>, max: u32) {
    let request = Request {
        id: RequestId(id),
        prompt_token_ids: prompt.collect(),
        output_token_ids: Vec::new(),
        sampling: SamplingParams {
            max_tokens: max,
            ..SamplingParams::default()
        },
        hash_seed: HashSeed(0),
    };
    scheduler.add_request(request, Time::ZERO).unwrap();
}

fn output_of(plan: &StepPlan) -> StepOutput {
    StepOutput {
        step_id: plan.step_id,
        token_ids: plan.samples.iter().map(|sample| sample.position).collect(),
        logprobs: Vec::new(),
    }
}

fn step(scheduler: &mut StepScheduler) -> (Duration, Duration) {
    let start = Instant::now();
    let plan = scheduler.schedule(Time::ZERO).unwrap();
    let scheduled = start.elapsed();
    let output = output_of(&plan);
    let start = Instant::now();
    scheduler.update_from_output(&output, Time::ZERO).unwrap();
    let committed = start.elapsed();
    scheduler.take_kv_events();
    (scheduled, committed)
}

/// `num_seqs` sequences that have computed their prompts of `num_tokens`.
fn decoding(config: StepSchedulerConfig, num_seqs: u32, num_tokens: u32) -> StepScheduler {
    let mut scheduler = StepScheduler::new(config).unwrap();
    for id in 0..num_seqs {
        let prompt = (0..num_tokens).map(|index| index ^ (id << 16));
        add(&mut scheduler, u64::from(id), prompt, 2000);
    }
    while scheduler.stats().num_waiting > 0 || scheduler.stats().queued_prefill_tokens > 0 {
        step(&mut scheduler);
    }
    scheduler
}

fn waiting_for_seats() -> StepScheduler {
    let mut scheduler = decoding(config(), 256, 1024);
    for id in 0..8192_u32 {
        let prompt = (0..64).map(|index| index ^ (id << 8));
        add(&mut scheduler, 1000 + u64::from(id), prompt, 10);
    }
    scheduler
}

/// The first in the queue is nearly all in the cache, and the pool is too small to let it start.
fn waiting_for_room() -> StepScheduler {
    let prompt = 0x4000_0000..0x4000_8000;
    let mut scheduler = decoding(
        StepSchedulerConfig {
            num_blocks: 8000,
            ..config()
        },
        64,
        1024,
    );
    add(&mut scheduler, 1000, prompt.clone(), 1);
    while scheduler.stats().num_running > 64 || scheduler.stats().num_waiting > 0 {
        step(&mut scheduler);
    }
    add(&mut scheduler, 1001, prompt.chain(0..32_000), 1);
    scheduler
}

/// Many requests share a long prefix that the first computes in small chunks.
fn waiting_for_prefix() -> StepScheduler {
    let config = StepSchedulerConfig {
        max_prefill_chunk: 8,
        max_prefix_wait_steps: 10_000,
        ..config()
    };
    let mut scheduler = StepScheduler::new(config).unwrap();
    for id in 0..255 {
        add(&mut scheduler, id, (0..4096).chain([id as TokenId]), 10);
    }
    scheduler
}

fn measure(name: &str, mut scheduler: StepScheduler) {
    let times: Vec<(Duration, Duration)> = (0..NUM_STEPS).map(|_| step(&mut scheduler)).collect();
    let (schedule, commit) = times.into_iter().unzip();
    println!(
        "{name:44} {:>22} {:>22}",
        percentiles(schedule),
        percentiles(commit)
    );
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let micros = |index: usize| times[index].as_secs_f64() * 1e6;
    format!(
        "{:.1} / {:.1}",
        micros(times.len() / 2),
        micros(times.len() * 99 / 100)
    )
}
