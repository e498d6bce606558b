//! Whether what we believe of an engine's cache is so: the cached tokens that placements counted on against those that
//! the engine reports with its answers.
//!
//! A router whose picture of the caches is wrong places requests as well as one that has none, and nothing fails. So
//! both figures are kept for the last half to one minute; where they have nothing to do with each other, that is said
//! once, and once more when it is over. Pure: what happened goes in with its time, a change of the verdict comes out.

use orchestra_core::Time;
use parking_lot::Mutex;

use crate::metrics::CacheSeries;

/// Figures are kept for this long and the time like it before.
const WINDOW_US: u64 = 30_000_000;
/// Fewer requests than this prove nothing.
const REQUESTS_MIN: u64 = 16;
/// Fewer cached tokens than this prove nothing: so many may differ by the ends of blocks.
const TOKENS_MIN: u64 = 2048;
/// How many times one figure may be the other. Text that is not tokenised is counted four bytes to a token, and an
/// engine may have evicted what it was taken to hold.
const TIMES_MAX: u64 = 4;

/// What there is to say of an engine's cache as we see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Too little happened.
    #[default]
    Unknown,
    /// The figures go together.
    Alive,
    /// It was to publish events, computes prompts, and none comes.
    NoEvents,
    /// It uses far less of its cache than was counted on, or nothing.
    FewerHits,
    /// It uses far more of its cache than we know of.
    MoreHits,
}

impl Verdict {
    const fn is_dead(self) -> bool {
        matches!(self, Self::NoEvents | Self::FewerHits | Self::MoreHits)
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Alive => "alive",
            Self::NoEvents => "no_events",
            Self::FewerHits => "fewer_hits",
            Self::MoreHits => "more_hits",
        }
    }
}

/// A request that was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Completed {
    pub(crate) prompt_tokens: u32,
    /// Cached tokens that its placement counted on.
    pub(crate) predicted: u32,
    /// Those that the engine reported, where it did.
    pub(crate) reported: Option<u32>,
    /// The engine reported what the request cost.
    pub(crate) has_usage: bool,
}

/// Sums of some time.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    requests: u64,
    events: u64,
    /// Prompt tokens that were not in the cache.
    computed: u64,
    /// Requests with a report, and their figures.
    reports: u64,
    predicted: u64,
    reported: u64,
}

/// One engine's figures.
#[derive(Debug)]
struct Signal {
    has_events: bool,
    /// It has reported cached tokens. vLLM leaves the figure out where it is 0.
    reports: bool,
    verdict: Verdict,
    /// Number of the running window.
    window: u64,
    current: Sums,
    previous: Sums,
}

impl Signal {
    const fn new(has_events: bool) -> Self {
        const NONE: Sums = Sums {
            requests: 0,
            events: 0,
            computed: 0,
            reports: 0,
            predicted: 0,
            reported: 0,
        };
        Self {
            has_events,
            reports: false,
            verdict: Verdict::Unknown,
            window: 0,
            current: NONE,
            previous: NONE,
        }
    }

    fn advance(&mut self, now: Time) {
        let window = now.0 / WINDOW_US;
        if window == self.window {
            return;
        }
        let is_next = window == self.window + 1;
        self.previous = if is_next {
            self.current
        } else {
            Sums::default()
        };
        self.current = Sums::default();
        self.window = window;
    }

    /// A change of what the engine holds arrived.
    fn heard(&mut self, now: Time) {
        self.advance(now);
        self.current.events += 1;
    }

    /// A request was answered. The answer is the verdict before, where it is another one now.
    fn completed(&mut self, request: Completed, now: Time) -> Option<Verdict> {
        self.advance(now);
        self.reports |= request.reported.is_some();
        let none = (self.reports && request.has_usage).then_some(0);
        let reported = request.reported.or(none);
        let sums = &mut self.current;
        sums.requests += 1;
        let cached = reported.unwrap_or(request.predicted);
        sums.computed += u64::from(request.prompt_tokens.saturating_sub(cached));
        if let Some(reported) = reported {
            sums.reports += 1;
            sums.predicted += u64::from(request.predicted);
            sums.reported += u64::from(reported);
        }
        let verdict = self.judge();
        if verdict == Verdict::Unknown || verdict == self.verdict {
            return None;
        }
        Some(std::mem::replace(&mut self.verdict, verdict))
    }

    fn sums(&self) -> Sums {
        let (one, other) = (self.current, self.previous);
        Sums {
            requests: one.requests + other.requests,
            events: one.events + other.events,
            computed: one.computed + other.computed,
            reports: one.reports + other.reports,
            predicted: one.predicted + other.predicted,
            reported: one.reported + other.reported,
        }
    }

    fn judge(&self) -> Verdict {
        let sums = self.sums();
        if sums.requests < REQUESTS_MIN {
            return Verdict::Unknown;
        }
        if self.has_events && sums.events == 0 && sums.computed >= TOKENS_MIN {
            return Verdict::NoEvents;
        }
        let (predicted, reported) = (sums.predicted, sums.reported);
        if sums.reports >= REQUESTS_MIN && predicted.max(reported) >= TOKENS_MIN {
            return if predicted > reported * TIMES_MAX {
                Verdict::FewerHits
            } else if reported > predicted * TIMES_MAX {
                Verdict::MoreHits
            } else {
                Verdict::Alive
            };
        }
        // Events come again, and that is all that is known.
        if self.verdict == Verdict::NoEvents && sums.events > 0 {
            return Verdict::Alive;
        }
        Verdict::Unknown
    }

    /// Reported tokens for each that was predicted.
    fn ratio(&self) -> Option<f64> {
        let sums = self.sums();
        (sums.predicted > 0).then(|| sums.reported as f64 / sums.predicted as f64)
    }
}

/// The figures of one model on one engine, published.
#[derive(Debug)]
pub(crate) struct Caching {
    worker: String,
    signal: Mutex<Signal>,
    series: CacheSeries,
}

impl Caching {
    /// `has_events`: the engine is to publish what it holds.
    pub(crate) fn new(worker: String, has_events: bool, series: CacheSeries) -> Self {
        Self {
            worker,
            signal: Mutex::new(Signal::new(has_events)),
            series,
        }
    }

    /// A change of what the engine holds arrived.
    pub(crate) fn heard(&self, now: Time) {
        self.signal.lock().heard(now);
    }

    /// A request was answered.
    pub(crate) fn completed(&self, request: Completed, now: Time) {
        let mut signal = self.signal.lock();
        let before = signal.completed(request, now);
        let (verdict, ratio) = (signal.verdict, signal.ratio());
        drop(signal);
        self.series
            .completed(request.predicted, request.reported, ratio);
        let Some(before) = before else { return };
        self.series.set_alive(!verdict.is_dead());
        let (worker, reason) = (&self.worker, verdict.as_str());
        if verdict.is_dead() {
            tracing::warn!(
                worker,
                reason,
                "predicted and reported cached tokens do not agree"
            );
        } else if before.is_dead() {
            tracing::info!(worker, "predicted and reported cached tokens agree again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn request(predicted: u32, reported: impl Into<Option<u32>>) -> Completed {
        Completed {
            prompt_tokens: 1000,
            predicted,
            reported: reported.into(),
            has_usage: true,
        }
    }

    /// As many requests as prove something, one a second; what the verdict came to.
    fn play(signal: &mut Signal, from: u64, request: Completed) -> Verdict {
        for second in from..from + 20 {
            signal.completed(request, Time(second * SECOND));
        }
        signal.verdict
    }

    #[test]
    fn figures_that_have_nothing_to_do_with_each_other_are_told() {
        let cases = [
            (request(500, 480), Verdict::Alive),
            (request(500, 130), Verdict::Alive),
            (request(500, 0), Verdict::FewerHits),
            (request(500, 100), Verdict::FewerHits),
            (request(0, 500), Verdict::MoreHits),
            (request(100, 500), Verdict::MoreHits),
            // Without a report, or with hardly anything cached, there is nothing to compare.
            (request(500, None), Verdict::Unknown),
            (request(16, 0), Verdict::Unknown),
        ];
        for (request, verdict) in cases {
            assert_eq!(
                play(&mut Signal::new(false), 0, request),
                verdict,
                "{request:?}"
            );
        }
    }

    #[test]
    fn an_engine_that_leaves_zeros_out_reports_them() {
        let mut signal = Signal::new(false);
        play(&mut signal, 0, request(500, 500));
        assert_eq!(
            play(&mut signal, 100, request(500, None)),
            Verdict::FewerHits
        );
        let mut signal = Signal::new(false);
        play(&mut signal, 0, request(500, 500));
        let without_usage = Completed {
            has_usage: false,
            ..request(500, None)
        };
        assert_eq!(play(&mut signal, 100, without_usage), Verdict::Alive);
    }

    #[test]
    fn a_few_requests_prove_nothing() {
        let mut signal = Signal::new(true);
        for second in 0..15 {
            let changed = signal.completed(request(500, 0), Time(second * SECOND));
            assert_eq!(changed, None);
        }
        let changed = signal.completed(request(500, 0), Time(15 * SECOND));
        assert_eq!(changed, Some(Verdict::Unknown));
        assert_eq!(signal.verdict, Verdict::NoEvents);
    }

    #[test]
    fn events_that_were_due_and_did_not_come_are_told_and_that_they_come_again() {
        let mut signal = Signal::new(true);
        assert_eq!(play(&mut signal, 0, request(0, None)), Verdict::NoEvents);
        signal.heard(Time(100 * SECOND));
        assert_eq!(play(&mut signal, 100, request(0, None)), Verdict::Alive);
        // What is cached is not stored again: no event is due.
        let cached = Completed {
            prompt_tokens: 1000,
            predicted: 999,
            reported: Some(999),
            has_usage: true,
        };
        assert_eq!(play(&mut Signal::new(true), 0, cached), Verdict::Alive);
    }

    #[test]
    fn a_change_is_told_once_and_old_figures_do_not_count() {
        let mut signal = Signal::new(false);
        let mut changes = Vec::new();
        for second in 0..600 {
            let reported = if (200..400).contains(&second) { 0 } else { 500 };
            let changed = signal.completed(request(500, reported), Time(second * SECOND));
            changes.extend(changed.map(|before| (before, signal.verdict)));
        }
        let expected = [
            (Verdict::Unknown, Verdict::Alive),
            (Verdict::Alive, Verdict::FewerHits),
            (Verdict::FewerHits, Verdict::Alive),
        ];
        assert_eq!(changes, expected);
        assert_eq!(signal.ratio(), Some(1.0));
    }
}
