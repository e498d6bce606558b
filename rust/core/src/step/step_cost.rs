//! What a step costs, learnt from the steps that ran.
//!
//! A step of `d` sequences that decode and `p` prefill tokens is taken to last `fixed + a * d + b * p`. The three
//! numbers are the least-squares fit over the steps so far, each forgotten by a sixteenth with every new one: means
//! and co-moments are kept by the incremental update for exponential weights (Finch, "Incremental calculation of
//! weighted mean and variance", 2009). Where the steps were too much alike to tell `a` or `b`, the last estimate
//! counts as if it had been observed (ridge regression towards it), so neither runs away.
//!
//! The context of the decodes is no term of its own: it grows by a token per sequence and step, slowly beside what
//! is forgotten, and so it is part of `a`.
//!
//! Numbers are integers in fixed point: counts, times and their products have 8 fractional bits, prices have 16.

use std::time::Duration;

/// Steps after which an observation weighs `1 / e`.
const WINDOW: i64 = 16;
/// Longest step that is believed, µs: two minutes. This and the next two keep every product within an `i128`.
const MICROS_MAX: u128 = 1 << 27;
/// Most sequences and tokens of a step that are counted.
const COUNT_MAX: usize = 1 << 17;
/// Highest price that is believed: a second for one token, in its fixed point.
const PRICE_MAX: i128 = 1 << (20 + 16);
/// A step that lasts longer than so many times the mean is an accident (a page fault, a garbage collection): its
/// excess is not counted. Costs that stay high are followed all the same, within a few steps.
const OUTLIER_FACTOR: i64 = 4;
/// Differences below these many decodes and prefill tokens tell little of a price.
const DECODES_SPREAD_MIN: i64 = 4;
const PREFILL_SPREAD_MIN: i64 = 64;

/// 1 of a count or a time.
const ONE: i64 = 1 << 8;
/// 1 µs per unit.
const PRICE_ONE: i128 = 1 << 16;

/// The model of a step's cost.
#[derive(Clone, Debug, Default)]
pub(super) struct StepCost {
    num_steps: i64,
    mean: Observation,
    variance_decodes: i128,
    variance_prefill: i128,
    covariance_inputs: i128,
    covariance_decodes: i128,
    covariance_prefill: i128,
    /// `a`, µs.
    per_decode: i64,
    /// `b`, µs; 0 until a step with prefill tokens was seen.
    per_prefill_token: i64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Observation {
    decodes: i64,
    prefill: i64,
    micros: i64,
}

impl StepCost {
    /// Learns from a step of so many decodes and prefill tokens.
    pub(super) fn observe(&mut self, num_decodes: usize, num_prefill: usize, elapsed: Duration) {
        let mut seen = Observation {
            decodes: fixed_point(num_decodes),
            prefill: fixed_point(num_prefill),
            micros: elapsed.as_micros().min(MICROS_MAX) as i64 * ONE,
        };
        if self.num_steps > 0 {
            seen.micros = seen.micros.min(self.mean.micros * OUTLIER_FACTOR + ONE);
        }
        if self.per_prefill_token == 0 && num_prefill > 0 {
            // All of it is the prefill's until more is known: rather too dear than too cheap.
            let price = i128::from(seen.micros) * PRICE_ONE / i128::from(seen.prefill);
            self.per_prefill_token = price.clamp(1, PRICE_MAX) as i64;
        }
        self.num_steps = (self.num_steps + 1).min(WINDOW);
        self.update_moments(seen);
        self.fit();
    }

    /// Prefill tokens with which a step of `num_decodes` lasts `target`: 0 where it lasts longer without any, and
    /// while no prefill was seen.
    pub(super) fn prefill_within(&self, num_decodes: usize, target: Duration) -> usize {
        if self.per_prefill_token == 0 {
            return 0;
        }
        let decodes = fixed_point(num_decodes) - self.mean.decodes;
        let without_prefill = i128::from(self.mean.micros) + cost(self.per_decode, decodes)
            - cost(self.per_prefill_token, self.mean.prefill);
        let target = target.as_micros().min(MICROS_MAX) as i128 * i128::from(ONE);
        let room = target - without_prefill.max(0);
        let tokens =
            room.max(0) * (PRICE_ONE / i128::from(ONE)) / i128::from(self.per_prefill_token);
        usize::try_from(tokens).unwrap_or(usize::MAX)
    }

    fn update_moments(&mut self, seen: Observation) {
        let weight = self.num_steps;
        let decodes = seen.decodes - self.mean.decodes;
        let prefill = seen.prefill - self.mean.prefill;
        let micros = seen.micros - self.mean.micros;
        self.mean.decodes += decodes / weight;
        self.mean.prefill += prefill / weight;
        self.mean.micros += micros / weight;
        let moments = [
            (&mut self.variance_decodes, decodes, decodes),
            (&mut self.variance_prefill, prefill, prefill),
            (&mut self.covariance_inputs, decodes, prefill),
            (&mut self.covariance_decodes, decodes, micros),
            (&mut self.covariance_prefill, prefill, micros),
        ];
        for (moment, left, right) in moments {
            let product = (i128::from(left) * i128::from(right)) >> 8;
            let grown = *moment + product / i128::from(weight);
            *moment = grown * i128::from(weight - 1) / i128::from(weight);
        }
    }

    /// Corrects both prices by the solution of the normal equations of what they leave unexplained, each with its
    /// ridge.
    fn fit(&mut self) {
        let (per_decode, per_prefill) = (
            i128::from(self.per_decode),
            i128::from(self.per_prefill_token),
        );
        let both = self.covariance_inputs;
        let explained = per_decode * self.variance_decodes + per_prefill * both;
        let left_decodes = self.covariance_decodes - explained / PRICE_ONE;
        let explained = per_decode * both + per_prefill * self.variance_prefill;
        let left_prefill = self.covariance_prefill - explained / PRICE_ONE;

        let decodes = self.variance_decodes + ridge(self.mean.decodes, DECODES_SPREAD_MIN);
        let prefill = self.variance_prefill + ridge(self.mean.prefill, PREFILL_SPREAD_MIN);
        // Positive: by Cauchy and Schwarz without the ridges, and they add to the first product only.
        let determinant = (decodes * prefill - both * both).max(1);
        let corrected = |price: i128, numerator: i128, least: i128| {
            (price + numerator * PRICE_ONE / determinant).clamp(least, PRICE_MAX) as i64
        };
        let numerator = left_decodes * prefill - left_prefill * both;
        self.per_decode = corrected(per_decode, numerator, 0);
        if per_prefill > 0 {
            let numerator = left_prefill * decodes - left_decodes * both;
            self.per_prefill_token = corrected(per_prefill, numerator, 1);
        }
    }
}

fn fixed_point(count: usize) -> i64 {
    count.min(COUNT_MAX) as i64 * ONE
}

/// A price times a number of units, with 8 fractional bits.
fn cost(price: i64, units: i64) -> i128 {
    i128::from(price) * i128::from(units) / PRICE_ONE
}

/// The weight of the last estimate: as much as a spread of a quarter of the mean, or of the least that tells
/// something.
fn ridge(mean: i64, spread_min: i64) -> i128 {
    let spread = i128::from(mean.max(spread_min * ONE) / 4);
    (spread * spread) >> 8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 ms, and 50 µs per decode, and 70 µs per prefill token.
    fn true_cost(num_decodes: usize, num_prefill: usize) -> Duration {
        Duration::from_micros((2000 + 50 * num_decodes + 70 * num_prefill) as u64)
    }

    fn allowance(cost: &StepCost, num_decodes: usize) -> usize {
        let target = Duration::from_millis(30);
        cost.prefill_within(num_decodes, target)
    }

    #[test]
    fn the_first_prefill_is_taken_to_cost_all_the_time() {
        let mut cost = StepCost::default();
        assert_eq!(allowance(&cost, 0), 0);
        cost.observe(0, 100, Duration::from_millis(10));
        assert_eq!(allowance(&cost, 0), 300);
    }

    #[test]
    fn finds_the_prices_of_steps_that_differ() {
        let mut cost = StepCost::default();
        for step in 0..200 {
            let (decodes, prefill) = (20 + step % 7 * 10, 100 + step % 5 * 50);
            cost.observe(decodes, prefill, true_cost(decodes, prefill));
        }
        for decodes in [10, 50, 200] {
            let exact = (30_000 - 2000 - 50 * decodes) / 70;
            assert!(
                allowance(&cost, decodes).abs_diff(exact) <= exact / 50,
                "{decodes} decodes"
            );
        }
    }

    #[test]
    fn steps_all_alike_leave_the_prices_as_they_were() {
        let mut cost = StepCost::default();
        for step in 0..100 {
            let prefill = 100 + step % 5 * 50;
            cost.observe(50, prefill, true_cost(50, prefill));
        }
        let before = allowance(&cost, 50);
        for _ in 0..1000 {
            cost.observe(50, 0, true_cost(50, 0));
        }
        assert!(allowance(&cost, 50).abs_diff(before) <= before / 50);
    }

    #[test]
    fn an_accident_is_soon_forgotten_and_a_slower_machine_is_noticed() {
        let mut cost = StepCost::default();
        let mut run = |num_steps: usize, factor: u32| {
            for step in 0..num_steps {
                let prefill = 100 + step % 5 * 50;
                cost.observe(50, prefill, true_cost(50, prefill) * factor);
            }
            allowance(&cost, 50)
        };
        let before = run(100, 1);
        run(1, 1000);
        assert!(run(60, 1).abs_diff(before) <= before / 20);
        // Twice the price of everything: (30 - 9) / 0.14 tokens instead of (30 - 4.5) / 0.07.
        assert!(run(100, 2).abs_diff(150) <= 8);
    }

    #[test]
    fn the_largest_numbers_overflow_nothing() {
        let mut cost = StepCost::default();
        for step in 0..100 {
            let (decodes, prefill) = [(usize::MAX, 0), (0, usize::MAX), (1, 1)][step % 3];
            cost.observe(decodes, prefill, Duration::MAX);
            cost.prefill_within(decodes, Duration::MAX);
        }
    }
}
