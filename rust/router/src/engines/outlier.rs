//! Outlier ejection: an engine that fails much more often than the others gets a pause, though it answers in between.
//!
//! A breaker sees failures in a row; an engine that fails every second request never has three. Here each engine's share
//! of failures is compared with that of the others. Never is more than half of a pool out by this: where most fail, the
//! fault is in the requests, or there is nowhere else to go.

use orchestra_core::Time;

/// Seconds that count.
const WINDOW_SECONDS: usize = 10;
/// Fewer requests than this within the window prove nothing.
const REQUESTS_MIN: u32 = 10;
/// An outlier fails at least this share of its requests, percent.
const FAILURES_PERCENT_MIN: u64 = 20;
/// And so many times the others' share.
const TIMES_OTHERS: u64 = 3;

/// How the requests of one engine ended, over the last seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Window {
    buckets: [(u64, Tally); WINDOW_SECONDS],
}

/// Requests that ended, and those among them that failed by the engine's fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) requests: u32,
    pub(crate) failures: u32,
}

impl Window {
    /// A request ended.
    pub(crate) fn record(&mut self, now: Time, has_failed: bool) {
        let second = now.0 / 1_000_000;
        let (at, tally) = &mut self.buckets[(second % WINDOW_SECONDS as u64) as usize];
        if *at != second {
            (*at, *tally) = (second, Tally::default());
        }
        tally.requests = tally.requests.saturating_add(1);
        tally.failures = tally.failures.saturating_add(u32::from(has_failed));
    }

    /// What is within the window.
    pub(crate) fn tally(&self, now: Time) -> Tally {
        let second = now.0 / 1_000_000;
        let recent = self
            .buckets
            .iter()
            .filter(|(at, _)| second.saturating_sub(*at) < WINDOW_SECONDS as u64);
        recent.fold(Tally::default(), |sum, (_, tally)| Tally {
            requests: sum.requests.saturating_add(tally.requests),
            failures: sum.failures.saturating_add(tally.failures),
        })
    }

    /// Forgets: after a pause the engine begins anew.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Which of a pool's engines to eject, worst first. `num_out` of them take no requests already.
///
/// Each is compared with those that are not ejected before it, so that two bad ones do not hide each other.
pub(crate) fn outliers(pool: &[Tally], num_out: usize) -> Vec<usize> {
    let mut by_share: Vec<usize> = (0..pool.len())
        .filter(|&index| pool[index].requests >= REQUESTS_MIN)
        .collect();
    by_share.sort_by_key(|&index| {
        let tally = pool[index];
        std::cmp::Reverse(u64::from(tally.failures) * 1_000_000 / u64::from(tally.requests))
    });
    let sum = |pick: fn(&Tally) -> u32| pool.iter().map(|tally| u64::from(pick(tally))).sum();
    let (mut requests, mut failures): (u64, u64) = (sum(|it| it.requests), sum(|it| it.failures));
    let is_outlier = |&index: &usize| {
        let own = (
            u64::from(pool[index].requests),
            u64::from(pool[index].failures),
        );
        requests -= own.0;
        failures -= own.1;
        own.1 * 100 >= own.0 * FAILURES_PERCENT_MIN
            && own.1 * requests.max(1) > failures * own.0 * TIMES_OTHERS
    };
    let room = (pool.len() / 2).saturating_sub(num_out);
    by_share
        .into_iter()
        .take(room)
        .take_while(is_outlier)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn tally(requests: u32, failures: u32) -> Tally {
        Tally { requests, failures }
    }

    #[test]
    fn one_that_fails_more_than_the_others_is_out() {
        assert_eq!(
            outliers(&[tally(100, 0), tally(100, 50), tally(100, 1)], 0),
            [1]
        );
        assert_eq!(
            outliers(
                &[tally(100, 60), tally(100, 0), tally(100, 50), tally(100, 0)],
                0
            ),
            [0, 2]
        );
    }

    #[test]
    fn few_requests_and_shared_faults_prove_nothing() {
        assert!(outliers(&[tally(100, 0), tally(9, 9)], 0).is_empty());
        assert!(outliers(&[tally(100, 50), tally(100, 60), tally(100, 40)], 0).is_empty());
        assert!(outliers(&[tally(100, 0), tally(100, 19)], 0).is_empty());
        assert!(
            outliers(&[tally(100, 100)], 0).is_empty(),
            "there is no other"
        );
    }

    #[test]
    fn the_window_forgets() {
        let mut window = Window::default();
        window.record(Time(0), true);
        window.record(Time(5_000_000), false);
        assert_eq!(window.tally(Time(9_000_000)), tally(2, 1));
        assert_eq!(window.tally(Time(10_000_000)), tally(1, 0));
        window.record(Time(15_000_000), true);
        assert_eq!(window.tally(Time(15_000_000)), tally(1, 1));
    }

    proptest! {
        /// Never is more than half of the pool out, each ejected one failed, and none twice.
        #[test]
        fn half_of_the_pool_stays(
            pool in proptest::collection::vec((0..200_u32, 0..200_u32), 0..20),
            num_out in 0..10_usize,
        ) {
            let pool: Vec<Tally> = pool.iter().map(|&(a, b)| tally(a.max(b), b)).collect();
            let found = outliers(&pool, num_out);
            prop_assert!(found.is_empty() || found.len() + num_out <= pool.len() / 2);
            prop_assert!(found.iter().all(|&index| pool[index].failures > 0));
            let mut distinct = found.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), found.len());
        }
    }
}
