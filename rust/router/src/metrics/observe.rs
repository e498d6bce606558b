//! What the router's own observers did.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Which time was too long.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabel {
    limit: &'static str,
}

/// Figures about logs and traces.
#[derive(Clone, Debug, Default)]
pub struct ObserveMetrics {
    /// Lines that the access log lost.
    pub access_log_dropped: Counter,
    /// Spans that the collector took.
    pub spans_exported: Counter,
    /// Spans that were lost.
    pub spans_dropped: Counter,
    slow_requests: Family<LimitLabel, Counter>,
}

impl ObserveMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let metrics = Self::default();
        r.register("access_log_dropped", "Lines that the access log lost", metrics.access_log_dropped.clone());
        r.register("spans_exported", "Spans that the collector took", metrics.spans_exported.clone());
        r.register("spans_dropped", "Spans that were lost", metrics.spans_dropped.clone());
        r.register("slow_requests", "Requests above a limit of time", metrics.slow_requests.clone());
        for limit in ["ttft", "total"] {
            let _ = metrics.slow_requests.get_or_create_owned(&LimitLabel { limit });
        }
        metrics
    }

    /// A request took longer than the limit of this name.
    pub(crate) fn slow(&self, limit: &'static str) {
        self.slow_requests
            .get_or_create(&LimitLabel { limit })
            .inc();
    }
}
