//! How long a driver sleeps: plain data, so that it can be tried without waiting.

use std::time::Duration;

/// The first nap of a driver whose transports cannot be slept on, and the longest one.
const NAP_MIN: Duration = Duration::from_micros(50);
const NAP_MAX: Duration = Duration::from_millis(5);
/// Sleeps that ended at once, and with nothing to do, before transports are left alone for a while.
const FRUITLESS_MAX: u32 = 4;
/// That while; also what counts as having slept.
const PAUSE: Duration = Duration::from_millis(1);

/// What the next sleep is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sleep {
    /// The most that it may last; for ever where `None`.
    pub(super) at_most: Option<Duration>,
    /// Whether transports may end it.
    pub(super) hears_transports: bool,
}

/// What the last rounds came to.
#[derive(Debug, Default)]
pub(super) struct Rest {
    naps: u32,
    fruitless: u32,
}

impl Rest {
    /// Something moved, or somebody called.
    pub(super) const fn moved(&mut self) {
        self.naps = 0;
        self.fruitless = 0;
    }

    /// The sleep after a round in which nothing moved. `due` is when something has to be done at the latest;
    /// `is_blind` says that a transport cannot wake the driver.
    pub(super) fn next(&mut self, due: Option<Duration>, is_blind: bool) -> Sleep {
        let nap = is_blind.then(|| NAP_MAX.min(NAP_MIN * (1 << self.naps.min(10))));
        self.naps = self.naps.saturating_add(1);
        let hears_transports = self.fruitless < FRUITLESS_MAX;
        let pause = (!hears_transports).then_some(PAUSE);
        Sleep {
            at_most: [due, nap, pause].into_iter().flatten().min(),
            hears_transports,
        }
    }

    /// The sleep is over, and not because somebody called.
    pub(super) fn slept(&mut self, sleep: Sleep, lasted: Duration) {
        let was_cut_short = lasted < PAUSE && sleep.at_most.is_none_or(|most| lasted < most);
        self.fruitless = if was_cut_short { self.fruitless + 1 } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_can_be_woken_sleeps_until_something_is_due() {
        let mut rest = Rest::default();
        let asleep = Sleep {
            at_most: None,
            hears_transports: true,
        };
        assert_eq!(rest.next(None, false), asleep);
        let due = Duration::from_secs(3);
        assert_eq!(rest.next(Some(due), false).at_most, Some(due));
        assert!(rest.next(Some(due), true).at_most < Some(due));
    }

    #[test]
    fn naps_double_up_to_a_limit_and_start_again_when_something_moves() {
        let mut rest = Rest::default();
        let naps: Vec<_> = (0..40)
            .filter_map(|_| rest.next(None, true).at_most)
            .collect();
        assert_eq!(naps[..3], [NAP_MIN, 2 * NAP_MIN, 4 * NAP_MIN]);
        assert_eq!(naps[39], NAP_MAX);
        rest.moved();
        assert_eq!(rest.next(None, true).at_most, Some(NAP_MIN));
    }

    #[test]
    fn transports_that_wake_for_nothing_are_left_alone_for_a_while() {
        let mut rest = Rest::default();
        for _ in 0..FRUITLESS_MAX {
            let sleep = rest.next(None, false);
            assert!(sleep.hears_transports);
            rest.slept(sleep, Duration::ZERO);
        }
        let pause = rest.next(None, false);
        assert_eq!(
            (pause.at_most, pause.hears_transports),
            (Some(PAUSE), false)
        );
        rest.slept(pause, PAUSE);
        assert!(rest.next(None, false).hears_transports);
    }
}
