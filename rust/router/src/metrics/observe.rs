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
#[derive(Clone, Debug)]
pub struct ObserveMetrics {
    /// Lines that the access log lost.
    pub access_log_dropped: Counter,
    slow_requests: Family<LimitLabel, Counter>,
}

impl ObserveMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let metrics = Self { access_log_dropped: Counter::default(), slow_requests: Family::default() };
        r.register("access_log_dropped", "Lines that the access log lost", metrics.access_log_dropped.clone());
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
