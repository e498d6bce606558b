//! How long a model's outputs are, learned from those that ended.
//!
//! ```text
//! expected = mean + 2 × mean absolute deviation, at least 64, at most max_tokens
//! ```
//!
//! Clients mostly leave `max_tokens` at all that the context has left, and keeping room for all of that would let a few
//! requests fill a worker. Mean and deviation are moving averages with the weights that TCP gives its round trips
//! (Jacobson, 1988). Where lengths are spread exponentially, nine outputs in ten are within the margin; a worker preempts
//! for the others.

use super::Scheduler;

/// Booked at least, and before any output has ended.
const EXPECTED_MIN: u32 = 64;
/// Averages are kept in parts of a token.
const PARTS: u64 = 1 << 10;
/// Deviations above the mean that are booked.
const MARGIN: u64 = 2;

/// Two moving averages of output lengths.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OutputLength {
    /// `None` before the first output.
    averages: Option<Averages>,
}

#[derive(Clone, Copy, Debug)]
struct Averages {
    mean: u64,
    deviation: u64,
}

impl OutputLength {
    /// An output ended after so many tokens.
    pub(super) fn sample(&mut self, num_tokens: u32) {
        let value = u64::from(num_tokens) * PARTS;
        let averages = self.averages.map_or(
            Averages {
                mean: value,
                deviation: value / 2,
            },
            |old| Averages {
                mean: old.mean - old.mean / 8 + value / 8,
                deviation: old.deviation - old.deviation / 4 + value.abs_diff(old.mean) / 4,
            },
        );
        self.averages = Some(averages);
    }

    /// What to book for an output of at most `max_tokens`.
    pub(super) fn expected(&self, max_tokens: u32) -> u32 {
        let expected = self.averages.map_or(0, |averages| {
            (averages.mean + MARGIN * averages.deviation).div_ceil(PARTS)
        });
        let expected = u32::try_from(expected).unwrap_or(u32::MAX);
        expected.max(EXPECTED_MIN).min(max_tokens)
    }
}

impl Scheduler {
    /// Output tokens to [book](super::RouteRequest::booked_tokens) for a request of the model: what its outputs usually
    /// come to, with a margin; at least 64, at most `max_tokens`.
    pub fn expected_output(&self, model: &str, max_tokens: u32) -> u32 {
        let length = self.groups.model(model).map(|model| model.output_length);
        length.unwrap_or_default().expected(max_tokens)
    }

    /// An output of the model came to its own end, which teaches what outputs usually come to. It is forgotten with the
    /// model's last worker.
    pub fn output_ended(&mut self, model: &str, num_output_tokens: u32) {
        if let Some(model) = self.groups.model_mut(model) {
            model.output_length.sample(num_output_tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn learned(samples: &[u32]) -> OutputLength {
        let mut length = OutputLength::default();
        for &sample in samples {
            length.sample(sample);
        }
        length
    }

    proptest! {
        #[test]
        fn it_stays_within_what_was_seen_and_asked(
            samples in prop::collection::vec(any::<u32>(), 0..60),
            max_tokens in 1_u32..,
        ) {
            let expected = learned(&samples).expected(max_tokens);
            prop_assert!(expected <= max_tokens);
            prop_assert!(expected >= EXPECTED_MIN.min(max_tokens));
            // Neither mean nor deviation exceeds the longest.
            let longest = u64::from(samples.iter().copied().max().unwrap_or(0));
            prop_assert!(u64::from(expected) <= (3 * longest).max(EXPECTED_MIN.into()));
        }

        #[test]
        fn equals_are_soon_expected(
            before in prop::collection::vec(0_u32..10_000, 0..20),
            length in 64_u32..10_000,
        ) {
            let samples = [before, vec![length; 120]].concat();
            let expected = learned(&samples).expected(u32::MAX);
            prop_assert!(expected.abs_diff(length) <= 1, "{} for {}", expected, length);
        }
    }

    #[test]
    fn nine_of_ten_exponential_lengths_are_within_what_is_expected() {
        // Quantiles of an exponential distribution of mean 400, in an order that mixes long and short.
        let quantile = |index: u32| {
            let share = f64::from((index * 377) % 1_000) / 1_000.0;
            (-400.0 * (1.0 - share).ln()) as u32
        };
        let mut length = OutputLength::default();
        let mut within = 0;
        for sample in (0..1_000).map(quantile) {
            within += u32::from(sample <= length.expected(u32::MAX));
            length.sample(sample);
        }
        assert!((850..=950).contains(&within), "{within}");
    }
}
