//! What becomes of requests: counted, timed, refused.

use orchestra_core::{ErrorCode, step::FinishReason};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

use super::{InFlight, Metrics};

/// Time to first token: 1 ms is a cached prompt on a small model, 60 s a full queue. Steps of about 2, finer
/// around the usual targets of 100 to 500 ms.
pub(super) const TTFT_BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0,
];
/// Time per output token: a decode step, 1 ms to 1 s; the usual targets are 10 to 100 ms.
pub(super) const TPOT_BUCKETS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0,
];
/// Whole requests and waits: 1 ms to the ten minutes that the default deadline allows.
pub(super) const E2E_BUCKETS: [f64; 15] = [
    0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0,
];

/// Why something ended: the spelling of a closed enum.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabel {
    pub(super) reason: &'static str,
}

/// A route of ours (never the path that a client typed) and the status it answered with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResponseLabel {
    route: &'static str,
    status: u16,
}

/// One of the listeners.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct DoorLabel {
    door: &'static str,
}

impl Metrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register_requests(&self, r: &mut Registry) {
        r.register("build", "What is running", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        r.register("requests_running", "Requests being generated", self.requests_running.clone());
        r.register("requests_waiting", "Requests waiting", self.requests_waiting.clone());
        r.register("requests_finished", "Choices that ended", self.requests_finished.clone());
        r.register("requests_rejected", "Requests refused", self.requests_rejected.clone());
        r.register("prompt_tokens", "Prompt tokens dispatched", self.prompt_tokens.clone());
        r.register("generation_tokens", "Tokens generated", self.generation_tokens.clone());
        r.register("prefix_cache_hit_tokens", "Prompt tokens not computed again", self.prefix_cache_hit_tokens.clone());
        r.register("http_responses", "Answers by route and status", self.http_responses.clone());
        r.register("connections", "Open connections", self.connections.clone());
    }

    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register_latencies(&self, registry: &mut Registry) {
        let mut seconds = |name: &str, help: &str, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        seconds("time_to_first_token", "Arrival to first token", &self.time_to_first_token);
        seconds("time_per_output_token", "Mean per later token", &self.time_per_output_token);
        seconds("e2e_request_latency", "Arrival to end", &self.e2e_request_latency);
        seconds("request_queue_time", "Admission to dispatch", &self.request_queue_time);
    }

    /// Creates each series of a closed label set, so that a rate over the first event is seen.
    pub(super) fn start_at_zero(&self) {
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Abort,
            FinishReason::Error,
        ] {
            let _ = self
                .requests_finished
                .get_or_create_owned(&finished_label(reason));
        }
        for code in ErrorCode::ALL
            .into_iter()
            .filter(|&code| code != ErrorCode::InvalidConfig)
        {
            let _ = self
                .requests_rejected
                .get_or_create_owned(&rejected_label(code));
        }
    }

    /// Counts the end of one choice. The corridor calls it, once per choice that was dispatched.
    pub fn finished(&self, reason: FinishReason) {
        self.requests_finished
            .get_or_create(&finished_label(reason))
            .inc();
    }

    /// Counts a request that was refused before its first token. The doors call it where they render the
    /// refusal, so the corridor does not.
    pub fn rejected(&self, code: ErrorCode) {
        self.requests_rejected
            .get_or_create(&rejected_label(code))
            .inc();
    }

    /// Counts one HTTP answer. `route` is a route of ours, not a path.
    pub fn http_response(&self, route: &'static str, status: u16) {
        self.http_responses
            .get_or_create(&ResponseLabel { route, status })
            .inc();
    }

    /// Counts one open connection at `door` until the guard drops.
    pub fn connection(&self, door: &'static str) -> InFlight {
        InFlight::new(&self.connections.get_or_create(&DoorLabel { door }))
    }
}

fn finished_label(reason: FinishReason) -> ReasonLabel {
    ReasonLabel {
        reason: reason.as_str(),
    }
}

fn rejected_label(code: ErrorCode) -> ReasonLabel {
    ReasonLabel {
        reason: code.as_str(),
    }
}
