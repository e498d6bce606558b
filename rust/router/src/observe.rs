//! What is left of a request when it is gone: a line in the access log, a decision that can be asked for, a warning
//! where it was slow.
//!
//! A [`Record`] goes with each request from its door to its last token and takes down facts as they arise: a few words
//! under a lock that nobody else wants. The last holder's drop is the request's end, and only then is anything written
//! ([`Observers`]), so that no request waits for its record.

mod access_log;
mod decisions;
mod exporter;
mod record;
mod spans;
mod throttle;
mod trace_context;

use std::{sync::Arc, time::Duration};

use parking_lot::RwLock;

pub use self::record::Record;
pub(crate) use self::trace_context::{TRACEPARENT_KEY, TRACESTATE_KEY};
pub(crate) use self::{
    access_log::AccessLog,
    decisions::DecisionView,
    exporter::{Exporter, ExporterError},
    record::{Arrival, Candidate, Explained, KvMove, Passed, Stage},
};
use self::{decisions::Decisions, record::Entry, throttle::Throttle, trace_context::TraceContext};
use crate::{config::ObserveConfig, metrics::Metrics};

/// HTTP header and gRPC metadata: `1` asks for a full explanation of the request's placement.
pub(crate) const EXPLAIN_KEY: &str = "x-orchestra-explain";
/// The least time between two full explanations, and between two warnings of slow requests.
const PAUSE: Duration = Duration::from_millis(100);

/// What may change while the router runs.
#[derive(Clone, Copy, Debug, Default)]
struct Limits {
    slow_ttft: Option<Duration>,
    slow_total: Option<Duration>,
    explain_share: f64,
    trace_share: f64,
}

impl From<&ObserveConfig> for Limits {
    fn from(config: &ObserveConfig) -> Self {
        Self {
            slow_ttft: config.slow_ttft.map(|span| span.0),
            slow_total: config.slow_total.map(|span| span.0),
            explain_share: config.explain_share,
            trace_share: config.otlp_sample_share,
        }
    }
}

/// Where the records of requests go.
#[derive(Debug)]
pub(crate) struct Observers {
    metrics: Metrics,
    limits: RwLock<Limits>,
    decisions: Decisions,
    access_log: Option<AccessLog>,
    exporter: Option<Exporter>,
    explanations: Throttle,
    warnings: Throttle,
}

impl Observers {
    pub(crate) fn new(
        config: &ObserveConfig,
        metrics: Metrics,
        access_log: Option<AccessLog>,
        exporter: Option<Exporter>,
    ) -> Self {
        Self {
            metrics,
            limits: RwLock::new(config.into()),
            decisions: Decisions::new(config.decisions),
            access_log,
            exporter,
            explanations: Throttle::new(PAUSE),
            warnings: Throttle::new(PAUSE),
        }
    }

    /// From the next request on these limits count.
    pub(crate) fn set_limits(&self, config: &ObserveConfig) {
        *self.limits.write() = config.into();
    }

    /// Opens the access log anew, as after a rotation.
    pub(crate) fn reopen(&self) {
        if let Some(log) = &self.access_log {
            log.reopen();
        }
    }

    /// The record of a request that has just arrived; an empty one where nobody would look at it.
    pub(crate) fn record(self: &Arc<Self>, arrival: &Arrival<'_>) -> Record {
        let Limits {
            explain_share,
            trace_share,
            slow_ttft,
            slow_total,
        } = *self.limits.read();
        let is_watched = self.access_log.is_some() || slow_ttft.or(slow_total).is_some();
        if !is_watched && !self.has_traces() && self.decisions.are_off() {
            return Record::default();
        }
        let is_asked = arrival.wants_explanation || is_drawn(explain_share);
        let is_explained = is_asked && self.explanations.may_pass();
        let trace = TraceContext::from_caller(arrival.traceparent, arrival.tracestate);
        let trace = match trace {
            None if self.has_traces() => Some(TraceContext::new(is_drawn(trace_share))),
            trace => trace,
        };
        Record::new(arrival, is_explained, trace, Arc::clone(self))
    }

    /// Whether spans are sent anywhere.
    fn has_traces(&self) -> bool {
        self.exporter.is_some()
    }

    /// What is remembered of the request with this id; of several, the last.
    pub(crate) fn decision(&self, request_id: &str) -> Option<DecisionView> {
        self.decisions.find(request_id)
    }

    /// A request was placed, so it can be asked for.
    fn remember(&self, entry: &Arc<Entry>) {
        self.decisions.push(Arc::clone(entry));
    }

    /// A request is over.
    fn ended(&self, entry: &Arc<Entry>) {
        let passed = entry.passed();
        self.warn_if_slow(entry, &passed);
        if let Some(log) = &self.access_log {
            log.write(entry, &passed);
        }
        if let Some(exporter) = &self.exporter {
            exporter.send(entry);
        }
    }

    fn warn_if_slow(&self, entry: &Entry, passed: &Passed) {
        let Limits {
            slow_ttft,
            slow_total,
            ..
        } = *self.limits.read();
        let exceeds = |time: Option<Duration>, limit: Option<Duration>| {
            time.zip(limit).is_some_and(|(time, limit)| time > limit)
        };
        let is_slow_ttft = exceeds(passed.ttft, slow_ttft);
        let is_slow_total = exceeds(Some(passed.total), slow_total);
        let metrics = &self.metrics.observe;
        if is_slow_ttft {
            metrics.slow("ttft");
        }
        if is_slow_total {
            metrics.slow("total");
        }
        if (is_slow_ttft || is_slow_total) && self.warnings.may_pass() {
            entry.warn_slow(passed);
        }
    }
}

/// Whether this one belongs to the share.
fn is_drawn(share: f64) -> bool {
    share > 0.0 && fastrand::f64() < share
}
