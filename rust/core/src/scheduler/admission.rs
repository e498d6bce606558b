//! Classes of waiting requests, and the share of the grants that each gets.

use serde::{Deserialize, Serialize};

use super::config::SchedulerConfig;

/// How urgent a request is while it waits for a worker.
///
/// Classes share a queue's grants by their weights, so a lower one gets less and never nothing.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum AdmissionClass {
    /// Somebody watches.
    Interactive,
    /// Everything that says nothing else.
    #[default]
    Standard,
    /// Nobody waits for the single answer.
    Batch,
}

impl AdmissionClass {
    /// Every class, the most urgent first.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Standard, Self::Batch];

    /// The class as settings, metrics and Python spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Standard => "standard",
            Self::Batch => "batch",
        }
    }

    /// The class with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == name)
    }
}

/// What the order of a queue depends on; the same for all queues of a scheduler.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// [`SchedulerConfig::max_overtakes`].
    pub(super) max_overtakes: u64,
    /// [`SchedulerConfig::max_tenant_overtakes`].
    pub(super) max_tenant_overtakes: u64,
    /// [`SchedulerConfig::max_num_tenants`].
    pub(super) max_num_tenants: usize,
    /// By class.
    pub(super) class_weights: [u64; 3],
}

impl Rules {
    pub(super) fn new(config: &SchedulerConfig) -> Self {
        Self {
            max_overtakes: config.max_overtakes.into(),
            max_tenant_overtakes: config.max_tenant_overtakes.into(),
            max_num_tenants: config.max_num_tenants as usize,
            class_weights: [
                config.interactive_weight.into(),
                config.standard_weight.into(),
                config.batch_weight.into(),
            ],
        }
    }

    /// How far a grant moves a class: the product of the other weights, which is in proportion to one over its own and
    /// a whole number.
    pub(super) fn stride(&self, class: AdmissionClass) -> u64 {
        let product: u64 = self.class_weights.iter().product();
        product / self.weight(class)
    }

    pub(super) fn weight(&self, class: AdmissionClass) -> u64 {
        self.class_weights[class as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_class() {
        for class in AdmissionClass::ALL {
            assert_eq!(AdmissionClass::parse(class.as_str()), Some(class));
        }
        assert_eq!(AdmissionClass::parse("urgent"), None);
    }
}
