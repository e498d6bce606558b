//! What operators do to the router.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// How something that was tried ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Figures about operating the router.
#[derive(Clone, Debug)]
pub struct OperationMetrics {
    config_reloads: Family<OutcomeLabel, Counter>,
    config_read: Gauge<f64, AtomicU64>,
}

impl OperationMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let metrics = Self { config_reloads: Family::default(), config_read: Gauge::default() };
        r.register("config_reloads", "Settings read again", metrics.config_reloads.clone());
        r.register_with_unit("config_read_timestamp", "When they were last read", Unit::Seconds, metrics.config_read.clone());
        for outcome in ["applied", "refused"] {
            let _ = metrics.config_reloads.get_or_create_owned(&OutcomeLabel { outcome });
        }
        metrics
    }

    /// The settings were read again: they count now, or could not be used.
    pub(crate) fn reloaded(&self, is_applied: bool) {
        let outcome = if is_applied { "applied" } else { "refused" };
        self.config_reloads
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
    }

    /// The settings in effect are of this time, seconds since 1970.
    pub(crate) fn settings_read_at(&self, seconds: f64) {
        self.config_read.set(seconds);
    }
}
