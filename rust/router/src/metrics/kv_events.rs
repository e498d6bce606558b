//! What engines say about their prefix caches, and what becomes of it. Series of a worker go when it detaches.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{InFlight, RatioGauge, requests::ReasonLabel, workers::WorkerLabel};
use crate::kv_events::{Ignored, Loss};

/// Families about the KV events of foreign engines. Cloning shares them.
#[derive(Clone, Debug)]
pub struct KvEventMetrics {
    streams: Gauge,
    batches: Family<WorkerLabel, Counter>,
    ignored: Family<ReasonLabel, Counter>,
    losses: Family<ReasonLabel, Counter>,
    gaps_replayed: Counter,
    predicted: Family<WorkerLabel, Counter>,
    reported: Family<WorkerLabel, Counter>,
    reported_ratio: Family<WorkerLabel, RatioGauge>,
    signal: Family<WorkerLabel, Gauge>,
}

impl KvEventMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let metrics = Self {
            streams: Gauge::default(),
            batches: Family::default(),
            ignored: Family::default(),
            losses: Family::default(),
            gaps_replayed: Counter::default(),
            predicted: Family::default(),
            reported: Family::default(),
            reported_ratio: Family::default(),
            signal: Family::default(),
        };
        r.register("kv_event_streams", "Engines whose KV events arrive", metrics.streams.clone());
        r.register("kv_event_batches", "Messages of KV events taken", metrics.batches.clone());
        r.register("kv_events_ignored", "KV events left out", metrics.ignored.clone());
        r.register("kv_event_losses", "Times that an engine's cache became unknown", metrics.losses.clone());
        r.register("kv_event_gaps_replayed", "Gaps that the engine's replay filled", metrics.gaps_replayed.clone());
        r.register("cached_tokens_predicted", "Cached prompt tokens that placements counted on", metrics.predicted.clone());
        r.register("cached_tokens_reported", "Cached prompt tokens that engines reported", metrics.reported.clone());
        r.register("cached_tokens_reported_ratio", "Reported for each predicted, lately", metrics.reported_ratio.clone());
        r.register("cache_signal", "Whether prediction and report agree", metrics.signal.clone());
        for ignored in Ignored::ALL {
            let _ = metrics.ignored.get_or_create_owned(&ReasonLabel { reason: ignored.as_str() });
        }
        for loss in Loss::ALL {
            let _ = metrics.losses.get_or_create_owned(&ReasonLabel { reason: loss.as_str() });
        }
        metrics
    }

    /// The series of one worker; they go when the handle drops.
    pub fn worker(&self, name: &str) -> KvEventSeries {
        let label = WorkerLabel {
            worker: name.to_owned(),
        };
        KvEventSeries {
            batches: self.batches.get_or_create_owned(&label),
            metrics: self.clone(),
            label,
        }
    }
}

impl KvEventMetrics {
    /// The series about one engine's cached tokens; they go when the handle drops.
    pub fn cache(&self, name: &str) -> CacheSeries {
        let label = WorkerLabel {
            worker: name.to_owned(),
        };
        let series = CacheSeries {
            predicted: self.predicted.get_or_create_owned(&label),
            reported: self.reported.get_or_create_owned(&label),
            metrics: self.clone(),
            label,
        };
        series.set_alive(true);
        series
    }
}

/// Cached tokens of one engine, as we believe and as it says.
#[derive(Debug)]
pub struct CacheSeries {
    metrics: KvEventMetrics,
    label: WorkerLabel,
    predicted: Counter,
    reported: Counter,
}

impl CacheSeries {
    /// Counts an answered request; `ratio` is the reported tokens for each that was predicted, lately.
    pub fn completed(&self, predicted: u32, reported: Option<u32>, ratio: Option<f64>) {
        self.predicted.inc_by(predicted.into());
        self.reported.inc_by(reported.unwrap_or(0).into());
        if let Some(ratio) = ratio {
            let family = &self.metrics.reported_ratio;
            family.get_or_create(&self.label).set(ratio);
        }
    }

    /// Shows whether the two have something to do with each other.
    pub fn set_alive(&self, is_alive: bool) {
        let signal = self.metrics.signal.get_or_create(&self.label);
        signal.set(is_alive.into());
    }
}

impl Drop for CacheSeries {
    fn drop(&mut self) {
        self.metrics.predicted.remove(&self.label);
        self.metrics.reported.remove(&self.label);
        self.metrics.reported_ratio.remove(&self.label);
        self.metrics.signal.remove(&self.label);
    }
}

/// What is counted of one engine's events.
#[derive(Debug)]
pub struct KvEventSeries {
    metrics: KvEventMetrics,
    label: WorkerLabel,
    batches: Counter,
}

impl KvEventSeries {
    /// Counts the engine in among those whose events arrive, until the guard drops.
    pub fn connected(&self) -> InFlight {
        InFlight::new(&self.metrics.streams)
    }

    /// Counts a message that was taken.
    pub fn batch(&self) {
        self.batches.inc();
    }

    /// Counts an event that was left out.
    pub fn ignored(&self, ignored: Ignored) {
        let reason = ignored.as_str();
        self.metrics
            .ignored
            .get_or_create(&ReasonLabel { reason })
            .inc();
    }

    /// Counts that what the engine holds became unknown.
    pub fn lost(&self, loss: Loss) {
        let reason = loss.as_str();
        self.metrics
            .losses
            .get_or_create(&ReasonLabel { reason })
            .inc();
    }

    /// Counts a gap that was filled.
    pub fn gap_replayed(&self) {
        self.metrics.gaps_replayed.inc();
    }
}

impl Drop for KvEventSeries {
    fn drop(&mut self) {
        self.metrics.batches.remove(&self.label);
    }
}
