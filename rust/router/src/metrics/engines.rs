//! Foreign engines, and what became of the requests that were sent to them.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// An engine, by its URL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineLabel {
    engine: String,
}

/// An engine and a state of its circuit breaker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BreakerLabel {
    engine: String,
    state: &'static str,
}

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Why something was done.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabel {
    cause: &'static str,
}

/// The states of a circuit breaker.
const BREAKER_STATES: [&str; 3] = ["closed", "open", "half_open"];
/// How an attempt on an engine ends: with an answer, without anyone waiting for it, for a more urgent request, or with a
/// failure.
pub(crate) const ANSWERED: &str = "answered";
pub(crate) const ABANDONED: &str = "abandoned";
pub(crate) const STOPPED: &str = "stopped";
/// How an engine fails a request.
const FAILURES: [&str; 6] = [
    "connect", "broken", "timeout", "status", "garbage", "removed",
];
/// How a stream that broke goes on.
const REPLAYS: [&str; 3] = ["continued", "not_continuable", "failed"];

/// Figures about foreign engines.
#[derive(Clone, Debug)]
pub struct EngineMetrics {
    up: Family<EngineLabel, Gauge>,
    breaker: Family<BreakerLabel, Gauge>,
    running: Family<EngineLabel, Gauge>,
    ejections: Counter,
    attempts: Family<OutcomeLabel, Counter>,
    retried: Family<CauseLabel, Counter>,
    replayed: Family<OutcomeLabel, Counter>,
    budget_exhausted: Counter,
    answered: Counter,
}

impl EngineMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let attempts = Family::<OutcomeLabel, Counter>::default();
        let metrics = Self {
            up: Family::default(), breaker: Family::default(), running: Family::default(), ejections: Counter::default(),
            retried: Family::default(), replayed: Family::default(), budget_exhausted: Counter::default(),
            answered: attempts.get_or_create_owned(&OutcomeLabel { outcome: ANSWERED }), attempts,
        };
        r.register("engine_up", "Whether a foreign engine answers", metrics.up.clone());
        r.register("engine_breaker_state", "State of an engine's circuit breaker", metrics.breaker.clone());
        r.register("engine_requests_running", "Requests on a foreign engine", metrics.running.clone());
        r.register("engine_ejections", "Engines ejected as outliers", metrics.ejections.clone());
        r.register("engine_attempts", "Requests sent to engines", metrics.attempts.clone());
        r.register("requests_retried", "Requests sent to another engine", metrics.retried.clone());
        r.register("requests_replayed", "Broken streams", metrics.replayed.clone());
        r.register("retry_budget_exhausted", "Retries that were not made", metrics.budget_exhausted.clone());
        metrics.start_at_zero();
        metrics
    }

    /// Creates each series of a closed label set, so that a rate over the first event is seen.
    fn start_at_zero(&self) {
        for outcome in [ABANDONED, STOPPED] {
            let _ = self.attempts.get_or_create_owned(&OutcomeLabel { outcome });
        }
        for failure in FAILURES {
            let _ = self
                .attempts
                .get_or_create_owned(&OutcomeLabel { outcome: failure });
            let _ = self
                .retried
                .get_or_create_owned(&CauseLabel { cause: failure });
        }
        for outcome in REPLAYS {
            let _ = self.replayed.get_or_create_owned(&OutcomeLabel { outcome });
        }
    }

    /// The series of one engine; they go when the handle drops.
    pub(crate) fn engine(&self, url: &str) -> EngineSeries {
        let label = EngineLabel {
            engine: url.to_owned(),
        };
        EngineSeries {
            metrics: self.clone(),
            up: self.up.get_or_create_owned(&label),
            running: self.running.get_or_create_owned(&label),
            label,
        }
    }

    /// An attempt on an engine ended: [`ANSWERED`], [`ABANDONED`], [`STOPPED`] or a failure.
    pub(crate) fn attempt(&self, outcome: &'static str) {
        if outcome == ANSWERED {
            self.answered.inc();
        } else {
            self.attempts.get_or_create(&OutcomeLabel { outcome }).inc();
        }
    }

    /// A request goes to another engine after this failure.
    pub(crate) fn retried(&self, cause: &'static str) {
        self.retried.get_or_create(&CauseLabel { cause }).inc();
    }

    /// A broken stream went on, or did not.
    pub(crate) fn replayed(&self, outcome: &'static str) {
        self.replayed.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// A retry was not made, because the pool has had its share.
    pub(crate) fn budget_exhausted(&self) {
        self.budget_exhausted.inc();
    }

    /// An engine was ejected.
    pub(crate) fn ejected(&self) {
        self.ejections.inc();
    }
}

/// The series of one engine.
#[derive(Debug)]
pub(crate) struct EngineSeries {
    metrics: EngineMetrics,
    label: EngineLabel,
    up: Gauge,
    /// Requests on it now.
    pub(crate) running: Gauge,
}

impl EngineSeries {
    /// It answers, or it does not; and the state of its breaker.
    pub(crate) fn report(&self, is_up: bool, breaker: &'static str) {
        self.up.set(is_up.into());
        for state in BREAKER_STATES {
            let is_it = state == breaker;
            self.metrics
                .breaker
                .get_or_create(&self.breaker_label(state))
                .set(is_it.into());
        }
    }

    fn breaker_label(&self, state: &'static str) -> BreakerLabel {
        BreakerLabel {
            engine: self.label.engine.clone(),
            state,
        }
    }
}

impl Drop for EngineSeries {
    fn drop(&mut self) {
        self.metrics.up.remove(&self.label);
        self.metrics.running.remove(&self.label);
        for state in BREAKER_STATES {
            self.metrics.breaker.remove(&self.breaker_label(state));
        }
    }
}
