//! How requests get to a worker, by class. Tenants are not among the labels: their names are not a closed set.

use orchestra_core::scheduler::AdmissionClass;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// How urgent a request is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabel {
    class: &'static str,
}

/// Figures about waiting.
#[derive(Clone, Debug)]
pub struct AdmissionMetrics {
    admitted: Family<ClassLabel, Counter>,
    displaced: Family<ClassLabel, Counter>,
    preempted: Counter,
    resumed: Counter,
}

impl AdmissionMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let metrics = Self {
            admitted: Family::default(), displaced: Family::default(),
            preempted: Counter::default(), resumed: Counter::default(),
        };
        r.register("requests_admitted", "Requests that got a worker", metrics.admitted.clone());
        r.register("requests_displaced", "Requests that left a full queue for others", metrics.displaced.clone());
        r.register("requests_preempted", "Requests stopped for more urgent ones", metrics.preempted.clone());
        r.register("requests_resumed", "Of these, how many went on", metrics.resumed.clone());
        for class in AdmissionClass::ALL {
            let _ = metrics.admitted.get_or_create_owned(&label(class));
            let _ = metrics.displaced.get_or_create_owned(&label(class));
        }
        metrics
    }

    /// A request got a worker.
    pub(crate) fn admitted(&self, class: AdmissionClass) {
        self.admitted.get_or_create(&label(class)).inc();
    }

    /// A running request was stopped for a more urgent one.
    pub(crate) fn preempted(&self) {
        self.preempted.inc();
    }

    /// A stopped request goes on.
    pub(crate) fn resumed(&self) {
        self.resumed.inc();
    }

    /// A waiting request lost its place to one of a higher class.
    pub(crate) fn displaced(&self, class: AdmissionClass) {
        self.displaced.get_or_create(&label(class)).inc();
    }
}

const fn label(class: AdmissionClass) -> ClassLabel {
    ClassLabel {
        class: class.as_str(),
    }
}
