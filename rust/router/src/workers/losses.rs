//! Models that lost a worker a moment ago. It is likely to come back: one of several ranks leaves for the fraction of a second
//! in which a rank is replaced, and one that crashed is started again by whoever looks after it. A worker that drained, or
//! that an operator held back, is not expected.

use rustc_hash::FxHashMap;
use tokio::time::Instant;

use crate::models::MODELS_AWAY_MAX;

/// When each model last lost a worker that took requests.
#[derive(Debug, Default)]
pub(super) struct Losses {
    by_model: FxHashMap<String, Instant>,
}

impl Losses {
    pub(super) fn note(&mut self, model: &str, now: Instant) {
        self.by_model.insert(model.to_owned(), now);
        if self.by_model.len() > MODELS_AWAY_MAX {
            let oldest = self.by_model.iter().min_by_key(|&(_, at)| at);
            if let Some(model) = oldest.map(|(model, _)| model.clone()) {
                self.by_model.remove(&model);
            }
        }
    }

    pub(super) fn last_of(&self, model: &str) -> Option<Instant> {
        self.by_model.get(model).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn of_too_many_models_the_one_that_was_lost_first_is_forgotten() {
        let mut losses = Losses::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        for number in 0..=MODELS_AWAY_MAX {
            losses.note(&format!("m{number}"), at(number as u64));
            // The first is lost again and again, so it is not the oldest.
            losses.note("m0", at(number as u64));
        }
        let last = MODELS_AWAY_MAX as u64;
        assert_eq!(losses.last_of("m0"), Some(at(last)));
        assert_eq!(losses.last_of("m1"), None);
        assert_eq!(losses.last_of("m2"), Some(at(2)));
        assert_eq!(losses.last_of(&format!("m{last}")), Some(at(last)));
    }
}
