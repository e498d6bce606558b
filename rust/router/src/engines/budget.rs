//! A budget for retries: a share of the recent requests, and a few a second for pools that have little traffic.
//!
//! Where much of a pool is sick, each request fails several times; with retries unbounded the pool would get a multiple
//! of its load just when it can bear least. The idea is that of Finagle's retry budgets; here the recent past is ten
//! buckets of a second.

use orchestra_core::Time;

/// Seconds that count as recent.
const WINDOW_SECONDS: usize = 10;
/// Retries per second that are always allowed.
const RETRIES_PER_SECOND_MIN: u32 = 10;

/// The retry budget of the whole pool.
#[derive(Clone, Debug)]
pub(crate) struct RetryBudget {
    /// Retries in percent of requests.
    percent: u32,
    buckets: [Bucket; WINDOW_SECONDS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bucket {
    second: u64,
    requests: u32,
    retries: u32,
}

impl RetryBudget {
    /// Allows `percent` of the recent requests.
    pub(crate) fn new(percent: u32) -> Self {
        Self {
            percent,
            buckets: [Bucket::default(); WINDOW_SECONDS],
        }
    }

    /// A request came in.
    pub(crate) fn request(&mut self, now: Time) {
        let bucket = self.bucket(now);
        bucket.requests = bucket.requests.saturating_add(1);
    }

    /// Takes one retry out of the budget; false where it is used up.
    pub(crate) fn take(&mut self, now: Time) -> bool {
        let second = second(now);
        let recent = self
            .buckets
            .iter()
            .filter(|bucket| second.saturating_sub(bucket.second) < WINDOW_SECONDS as u64);
        let (requests, retries) = recent.fold((0, 0), |(requests, retries), bucket| {
            (
                requests + u64::from(bucket.requests),
                retries + u64::from(bucket.retries),
            )
        });
        let percent = u64::from(self.percent);
        let bucket = self.bucket(now);
        let allowed =
            bucket.retries < RETRIES_PER_SECOND_MIN || (retries + 1) * 100 <= requests * percent;
        if allowed {
            bucket.retries = bucket.retries.saturating_add(1);
        }
        allowed
    }

    fn bucket(&mut self, now: Time) -> &mut Bucket {
        let second = second(now);
        let bucket = &mut self.buckets[(second % WINDOW_SECONDS as u64) as usize];
        if bucket.second != second {
            *bucket = Bucket {
                second,
                ..Bucket::default()
            };
        }
        bucket
    }
}

const fn second(now: Time) -> u64 {
    now.0 / 1_000_000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at_s(seconds: u64) -> Time {
        Time(seconds * 1_000_000)
    }

    fn taken(budget: &mut RetryBudget, now: Time) -> usize {
        (0..1000).take_while(|_| budget.take(now)).count()
    }

    #[test]
    fn without_traffic_a_few_a_second_are_allowed() {
        let mut budget = RetryBudget::new(20);
        assert_eq!(taken(&mut budget, at_s(0)), 10);
        assert_eq!(taken(&mut budget, at_s(1)), 10);
    }

    #[test]
    fn with_traffic_a_share_is_allowed_and_old_traffic_does_not_count() {
        let mut budget = RetryBudget::new(20);
        for _ in 0..1000 {
            budget.request(at_s(5));
        }
        assert_eq!(taken(&mut budget, at_s(6)), 200);
        assert_eq!(taken(&mut budget, at_s(15)), 10);
    }

    proptest! {
        /// Against a list of everything that happened: never more than the share or the floor.
        #[test]
        fn the_window_is_that_of_a_full_record(
            steps in proptest::collection::vec((0..1500_u64, any::<bool>()), 0..400),
            percent in 0..150_u32,
        ) {
            let mut budget = RetryBudget::new(percent);
            let (mut requests, mut retries) = (Vec::new(), Vec::new());
            let mut now = 0;
            for (wait, is_request) in steps {
                now += wait * 1000 / 10;
                let time = Time(now);
                if is_request {
                    budget.request(time);
                    requests.push(second(time));
                    continue;
                }
                let recent = |list: &[u64]| {
                    list.iter().filter(|&&at| second(time) - at < WINDOW_SECONDS as u64).count() as u64
                };
                let this_second = retries.iter().filter(|&&at| at == second(time)).count();
                let expected = this_second < RETRIES_PER_SECOND_MIN as usize
                    || (recent(&retries) + 1) * 100 <= recent(&requests) * u64::from(percent);
                prop_assert_eq!(budget.take(time), expected);
                if expected {
                    retries.push(second(time));
                }
            }
        }
    }
}
