//! A million steps of random histories, for `make soak`: numbered, so that one that fails can be run again alone.

use std::thread;

use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

const STEPS: usize = 1_000_000;
/// Steps between two lines of progress.
const SHOWN: usize = 100_000;

/// Says which history it was that failed.
struct Numbered(u64);

impl Drop for Numbered {
    fn drop(&mut self) {
        if thread::panicking() {
            say(&format!("history {} failed", self.0));
        }
    }
}

/// Runs histories until all of them together have so many steps; `run` says how many one had.
pub(crate) fn run_histories<T: std::fmt::Debug>(
    histories: impl Strategy<Value = T>,
    run: impl Fn(u64, T) -> usize,
) {
    let (mut num_steps, mut next) = (0, SHOWN);
    for number in 1_u64.. {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&number.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let history = histories.new_tree(&mut runner).unwrap().current();
        let numbered = Numbered(number);
        num_steps += run(number, history);
        drop(numbered);
        if num_steps >= next {
            next += SHOWN;
            say(&format!("{num_steps} steps of {number} histories"));
        }
        if num_steps >= STEPS {
            return;
        }
    }
}

#[expect(
    clippy::print_stdout,
    reason = "whoever waits for minutes sees progress"
)]
fn say(line: &str) {
    println!("{line}");
}
