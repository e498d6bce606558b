//! How long things take, learned from how long they took.

use std::time::Duration;

/// A sample's weight is that of the next one less an eighth.
const DECAY: u64 = 8;
/// Sums are kept in parts of a unit, so that small ones decay too.
const PARTS: u64 = 1 << 10;

/// Time for an amount of work: two sums with exponential decay, and their quotient.
///
/// Sums and not a mean of quotients, so that a sample weighs as much as it measured: a prompt of one token that took a
/// whole step says little about the speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pace {
    amount: u64,
    micros: u64,
}

impl Pace {
    /// The amount took that long.
    pub(super) fn sample(&mut self, amount: u64, took: Duration) {
        let add = |sum: &mut u64, value: u64| {
            *sum = (*sum - *sum / DECAY).saturating_add(value.saturating_mul(PARTS));
        };
        add(&mut self.amount, amount);
        add(
            &mut self.micros,
            u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        );
    }

    /// What the amount will take; `None` before anything took time.
    pub(super) fn time_for(&self, amount: u64) -> Option<Duration> {
        if self.micros == 0 {
            return None;
        }
        let micros = u128::from(amount) * u128::from(self.micros);
        let micros = micros.checked_div(self.amount.into())?;
        Some(Duration::from_micros(
            u64::try_from(micros).unwrap_or(u64::MAX),
        ))
    }

    /// Whole units in a second; 0 before anything took time.
    pub(super) fn per_second(&self) -> u64 {
        let amount = u128::from(self.amount) * 1_000_000;
        let rate = amount.checked_div(self.micros.into()).unwrap_or(0);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_samples_weigh_more_and_old_ones_less() {
        let mut pace = Pace::default();
        assert_eq!((pace.time_for(1), pace.per_second()), (None, 0));
        pace.sample(1, Duration::ZERO);
        assert_eq!(pace.time_for(1), None, "nothing has taken time yet");

        let mut pace = Pace::default();
        pace.sample(1_000, Duration::from_millis(100));
        assert_eq!(pace.time_for(50), Some(Duration::from_millis(5)));
        pace.sample(1, Duration::from_millis(1));
        assert_eq!(
            pace.per_second(),
            9_898,
            "(7/8 of 1000 + 1) in (7/8 of 100 + 1) ms"
        );
        for _ in 0..100 {
            pace.sample(2_000, Duration::from_millis(100));
        }
        assert!((19_990..=20_000).contains(&pace.per_second()), "{pace:?}");
    }

    #[test]
    fn extremes_do_not_run_over() {
        let mut pace = Pace::default();
        for _ in 0..3 {
            pace.sample(u64::MAX, Duration::MAX);
        }
        assert_eq!(
            pace.time_for(u64::MAX),
            Some(Duration::from_micros(u64::MAX))
        );
        assert_eq!(pace.per_second(), 1_000_000);
    }
}
