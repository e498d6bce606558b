//! Whether whoever executes the steps comes late: what it does between the end of a step and the plan of the next one,
//! while there is work, keeps the engine waiting.
//!
//! Both times are means with exponential weights, so that one slow step says little. Work that can wait has to, as long
//! as this is so.

use std::time::Duration;

use super::scheduler::StepScheduler;
use crate::time::Time;

/// A sample weighs so much less than the mean of those before it.
const WINDOW: u64 = 16;
/// The longest pause that is not late is a step's time divided by this,
const SHARE: u64 = 10;
/// and never less than this, microseconds: steps of a small model last little longer than it takes to plan them.
const PAUSE_MIN_US: u64 = 1_000;
/// Who was late is so until the pauses are this much shorter.
const HYSTERESIS: u64 = 2;

/// A mean, microseconds with so many parts that a small sample counts too.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(u64);

impl Mean {
    const PARTS: u64 = 1 << 10;

    fn sample(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let sample = micros.saturating_mul(Self::PARTS);
        self.0 = (self.0 - self.0 / WINDOW).saturating_add(sample / WINDOW);
    }

    const fn micros(self) -> u64 {
        self.0 / Self::PARTS
    }
}

/// How late it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Lateness {
    /// From a commit to the next plan.
    pause: Mean,
    /// From a plan to its commit.
    step: Mean,
    /// Since when no step executes, where there may be work.
    idle_since: Option<Time>,
    is_late: bool,
}

impl Lateness {
    /// A step is planned.
    pub(super) fn planned(&mut self, now: Time) {
        let Some(since) = self.idle_since.take() else {
            return;
        };
        self.pause.sample(now.since(since));
        let bound = (self.step.micros() / SHARE).max(PAUSE_MIN_US);
        let bound = if self.is_late {
            bound / HYSTERESIS
        } else {
            bound
        };
        self.is_late = self.pause.micros() > bound;
    }

    /// A step that took so long is committed, and others execute or not.
    pub(super) fn committed(&mut self, took: Duration, executes: bool, now: Time) {
        self.step.sample(took);
        self.idle_since = (!executes).then_some(now);
    }

    /// There was nothing to plan: whoever waits now keeps nobody waiting.
    pub(super) fn found_nothing(&mut self) {
        self.idle_since = None;
        self.pause = Mean::default();
        self.is_late = false;
    }
}

impl StepScheduler {
    /// Whether the engine is kept waiting between steps for too long: more than a tenth of what the steps take, and more
    /// than a millisecond. What nobody waits for is better left until it is not.
    pub fn is_late(&self) -> bool {
        self.lateness.is_late
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps and the pauses between them, microseconds each.
    fn run(lateness: &mut Lateness, steps: usize, step_us: u64, pause_us: u64) {
        let mut now = Time(1);
        for _ in 0..steps {
            lateness.planned(now);
            now = Time(now.0 + step_us);
            lateness.committed(Duration::from_micros(step_us), false, now);
            now = Time(now.0 + pause_us);
        }
        lateness.planned(now);
    }

    #[test]
    fn late_is_who_needs_a_tenth_of_a_step_and_a_millisecond() {
        for (step_us, pause_us, is_late) in [
            (20_000, 1_900, false),
            (20_000, 2_100, true),
            (1_000, 900, false),
            (1_000, 1_100, true),
        ] {
            let mut lateness = Lateness::default();
            run(&mut lateness, 200, step_us, pause_us);
            assert_eq!(lateness.is_late, is_late, "{step_us} and {pause_us}");
        }
    }

    #[test]
    fn one_slow_turn_is_not_late_and_who_was_late_recovers_well_below_the_bound() {
        let mut lateness = Lateness::default();
        run(&mut lateness, 100, 20_000, 100);
        run(&mut lateness, 1, 20_000, 20_000);
        assert!(!lateness.is_late);
        run(&mut lateness, 100, 20_000, 3_000);
        assert!(lateness.is_late);
        run(&mut lateness, 200, 20_000, 1_500);
        assert!(lateness.is_late, "below the bound, but not by half");
        run(&mut lateness, 200, 20_000, 900);
        assert!(!lateness.is_late);
    }

    #[test]
    fn waiting_for_work_and_steps_in_flight_are_no_pauses() {
        let mut lateness = Lateness::default();
        let step = Duration::from_millis(10);
        let mut now = Time(1);
        for _ in 0..100 {
            lateness.planned(now);
            now = now + step;
            lateness.committed(step, true, now);
            now = now + step;
        }
        assert!(!lateness.is_late, "another step executed meanwhile");
        run(&mut lateness, 100, 10_000, 10_000);
        assert!(lateness.is_late);
        lateness.found_nothing();
        assert!(!lateness.is_late);
        lateness.planned(now + Duration::from_secs(9));
        assert!(!lateness.is_late, "nothing was there to plan");
    }
}
