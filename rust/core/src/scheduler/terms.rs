//! What a worker demands of the requests that it takes, besides having room for them.

use super::{
    exchange::{KvExchange, WorkerRole},
    explain::Ineligible,
    route::RouteRequest,
    worker::WorkerSpec,
};

/// Fixed while the worker is registered. Workers of equal terms are searched together.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Terms {
    /// Ascending, each once.
    taints: Box<[String]>,
    /// Ascending, each once.
    slo_classes: Box<[String]>,
    serves_loras: bool,
    /// Not a demand: what makes fetching cost the same for all of a group.
    exchange: Option<KvExchange>,
    role: WorkerRole,
}

impl Terms {
    pub(super) fn of(spec: &WorkerSpec) -> Self {
        let set = |names: &[String]| {
            let mut names = names.to_vec();
            names.sort_unstable();
            names.dedup();
            names.into_boxed_slice()
        };
        Self {
            taints: set(&spec.taints),
            slo_classes: set(&spec.slo_classes),
            serves_loras: spec.max_loras > 0,
            exchange: spec.kv_exchange.clone(),
            role: spec.role,
        }
    }

    pub(super) const fn exchange(&self) -> Option<&KvExchange> {
        self.exchange.as_ref()
    }

    pub(super) const fn role(&self) -> WorkerRole {
        self.role
    }

    /// Why workers of these terms do not take the request; `None`: they do.
    pub(super) fn refusal(&self, request: &RouteRequest<'_>) -> Option<Ineligible> {
        let is_tolerated = |taint: &String| request.tolerations.contains(&taint.as_str());
        if !self.taints.iter().all(is_tolerated) {
            return Some(Ineligible::Tainted);
        }
        let is_dedicated = !self.slo_classes.is_empty();
        if is_dedicated && !self.slo_classes.iter().any(|it| it == request.slo_class) {
            return Some(Ineligible::OtherSloClass);
        }
        (request.lora.is_some() && !self.serves_loras).then_some(Ineligible::NoLoras)
    }
}
