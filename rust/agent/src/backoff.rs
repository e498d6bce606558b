//! Pauses between attempts: exponential, capped, with full jitter, so that many workers of one router that returns do
//! not arrive together.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use crate::config::ReconnectConfig;

/// Source of pauses. Equal seeds give equal pauses.
#[derive(Debug)]
pub(crate) struct Backoff {
    initial: Duration,
    max: Duration,
    ceiling: Duration,
    state: u64,
}

impl Backoff {
    /// `worker_id` seeds the jitter where the settings do not.
    pub(crate) fn new(config: &ReconnectConfig, worker_id: &str) -> Self {
        let state = config.seed.unwrap_or_else(|| {
            let mut hasher = DefaultHasher::new();
            worker_id.hash(&mut hasher);
            hasher.finish()
        });
        Self {
            initial: config.initial,
            max: config.max,
            ceiling: config.initial,
            state,
        }
    }

    /// The next pause: anything from zero to the ceiling, which doubles up to the cap.
    pub(crate) fn next_pause(&mut self) -> Duration {
        let pause = self.ceiling.mul_f64(self.next_fraction());
        self.ceiling = self.max.min(self.ceiling * 2);
        pause
    }

    /// Starts over with short pauses.
    pub(crate) fn reset(&mut self) {
        self.ceiling = self.initial;
    }

    /// `SplitMix64`, its upper 53 bits as a number in [0, 1).
    fn next_fraction(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_under_a_doubling_and_capped_ceiling() {
        let config = ReconnectConfig::default();
        let mut backoff = Backoff::new(&config, "w");
        for attempt in 0..20 {
            let ceiling = config.max.min(config.initial * 2_u32.pow(attempt));
            let pause = backoff.next_pause();
            assert!(
                pause <= ceiling,
                "attempt {attempt}: {pause:?} > {ceiling:?}"
            );
        }
        backoff.reset();
        assert!(backoff.next_pause() <= config.initial);
    }

    #[test]
    fn workers_spread_out_and_a_seed_repeats() {
        let pauses = |config: &ReconnectConfig, id| {
            let mut backoff = Backoff::new(config, id);
            [(); 8].map(|()| backoff.next_pause())
        };
        let config = ReconnectConfig::default();
        assert_ne!(pauses(&config, "a"), pauses(&config, "b"));
        let seeded = ReconnectConfig {
            seed: Some(7),
            ..config
        };
        assert_eq!(pauses(&seeded, "a"), pauses(&seeded, "b"));
    }
}
