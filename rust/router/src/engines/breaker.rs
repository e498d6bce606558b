//! A circuit breaker: an engine that fails again and again gets a pause, then one request on trial.
//!
//! ```text
//!            failures in a row               the pause is over
//!  ┌──────► closed ───────────────► open ──────────────────────► half open
//!  │                                 ▲                               │ one trial
//!  │                                 └──────── it fails: twice the pause
//!  └──────────────────────────────────────────────── it succeeds ────┘
//! ```

use std::time::Duration;

use orchestra_core::Time;

/// Failures in a row that open it.
const FAILURES_MAX: u32 = 3;
/// The first pause, and the longest.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The breaker of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Breaker {
    state: State,
    /// Pauses since the last success.
    num_pauses: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Requests flow.
    Closed { failures: u32 },
    /// None does.
    Open { until: Time },
    /// One may.
    HalfOpen { is_trying: bool },
}

/// A breaker's state, as operators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Requests flow.
    Closed,
    /// None does.
    Open,
    /// One is on trial, or may be.
    HalfOpen,
}

impl BreakerState {
    /// As metrics and the admin API spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            state: State::Closed { failures: 0 },
            num_pauses: 0,
        }
    }
}

impl Breaker {
    /// Whether a request may go to the engine now.
    pub(crate) const fn is_passable(&self) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { .. } => false,
            State::HalfOpen { is_trying } => !is_trying,
        }
    }

    pub(crate) const fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// A request goes to the engine; false where it must not. Where it is on trial, one of [`Self::succeed`],
    /// [`Self::fail`] and [`Self::abandon`] has to follow.
    pub(crate) fn begin(&mut self) -> bool {
        let passes = self.is_passable();
        if passes && let State::HalfOpen { is_trying } = &mut self.state {
            *is_trying = true;
        }
        passes
    }

    /// A request was answered.
    pub(crate) fn succeed(&mut self) {
        // What was sent before it opened says nothing about now.
        if !matches!(self.state, State::Open { .. }) {
            *self = Self::default();
        }
    }

    /// A request failed by the engine's fault. Where `may_open` is false, failures in a row do not open it.
    pub(crate) fn fail(&mut self, now: Time, may_open: bool) {
        match &mut self.state {
            State::Closed { failures } => {
                *failures = failures.saturating_add(1);
                if *failures >= FAILURES_MAX && may_open {
                    self.open(now);
                }
            }
            State::HalfOpen { .. } => self.open(now),
            State::Open { .. } => {}
        }
    }

    /// A request ended without saying anything about the engine.
    pub(crate) fn abandon(&mut self) {
        if let State::HalfOpen { is_trying } = &mut self.state {
            *is_trying = false;
        }
    }

    /// Opens it, for twice as long as the last time.
    pub(crate) fn open(&mut self, now: Time) {
        let factor = 1_u32.checked_shl(self.num_pauses).unwrap_or(u32::MAX);
        let pause = PAUSE.saturating_mul(factor).min(PAUSE_MAX);
        self.num_pauses = self.num_pauses.saturating_add(1).min(16);
        self.state = State::Open {
            until: Time(now.0.saturating_add(pause.as_micros() as u64)),
        };
    }

    /// Lets a request on trial where the pause is over.
    pub(crate) fn advance(&mut self, now: Time) {
        if let State::Open { until } = self.state
            && now >= until
        {
            self.state = State::HalfOpen { is_trying: false };
        }
    }

    /// The engine was away and is back: what it did before says little, so one request may try at once.
    pub(crate) fn come_back(&mut self) {
        if matches!(self.state, State::Open { .. }) {
            self.state = State::HalfOpen { is_trying: false };
        }
        self.num_pauses = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at_ms(milliseconds: u64) -> Time {
        Time(milliseconds * 1000)
    }

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES_MAX {
            assert!(breaker.begin());
            breaker.fail(at_ms(0), true);
        }
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_them_does_not() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.fail(at_ms(0), true);
            breaker.fail(at_ms(0), true);
            breaker.succeed();
        }
        assert!(breaker.is_passable());
        assert!(!opened().is_passable());
    }

    #[test]
    fn one_request_is_on_trial_and_decides() {
        let mut breaker = opened();
        breaker.advance(at_ms(499));
        assert!(!breaker.begin());
        breaker.advance(at_ms(500));
        assert!(breaker.begin());
        assert!(!breaker.begin(), "only one");
        breaker.abandon();
        assert!(breaker.begin(), "the client of the first left");
        breaker.succeed();
        assert_eq!(breaker, Breaker::default());
    }

    #[test]
    fn each_failed_trial_doubles_the_pause_up_to_a_limit() {
        let mut breaker = opened();
        let mut now = 0;
        for pause in [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000] {
            breaker.advance(at_ms(now + pause - 1));
            assert_eq!(breaker.state(), BreakerState::Open, "{pause}");
            now += pause;
            breaker.advance(at_ms(now));
            assert!(breaker.begin());
            breaker.fail(at_ms(now), true);
        }
    }

    #[test]
    fn an_engine_that_came_back_is_tried_at_once() {
        let mut breaker = opened();
        breaker.come_back();
        assert!(breaker.begin());
        breaker.fail(at_ms(0), true);
        breaker.advance(at_ms(500));
        assert!(breaker.begin(), "the pauses began anew");
    }

    #[test]
    fn where_it_may_not_open_failures_change_nothing() {
        let mut breaker = Breaker::default();
        for _ in 0..100 {
            breaker.fail(at_ms(0), false);
        }
        assert!(breaker.is_passable());
    }

    proptest! {
        /// Whatever happens: no request passes an open breaker, at most one is on trial, and it opens again to
        /// requests within the longest pause.
        #[test]
        fn any_history_keeps_its_promises(history in proptest::collection::vec((0..6_u8, 0_u64..2000), 0..200)) {
            let mut breaker = Breaker::default();
            let (mut now, mut on_trial) = (0, false);
            for (action, wait) in history {
                now += wait;
                breaker.advance(at_ms(now));
                let before = breaker.state();
                match action {
                    0 => {
                        let passes = breaker.begin();
                        prop_assert_eq!(passes, match before {
                            BreakerState::Closed => true,
                            BreakerState::Open => false,
                            BreakerState::HalfOpen => !on_trial,
                        });
                        on_trial |= passes && before == BreakerState::HalfOpen;
                    }
                    1 => breaker.succeed(),
                    2 => breaker.fail(at_ms(now), true),
                    3 => breaker.fail(at_ms(now), false),
                    4 => { breaker.abandon(); on_trial = false; }
                    _ => breaker.come_back(),
                }
                if breaker.state() != BreakerState::HalfOpen {
                    on_trial = false;
                }
                let mut later = breaker;
                later.advance(at_ms(now + 30_000));
                prop_assert_ne!(later.state(), BreakerState::Open);
            }
        }
    }
}
