//! Judging every worker: why a request would go where it would go, and why it can go nowhere.

use std::cmp::Reverse;

use super::{
    Scheduler,
    chain::Chain,
    error::SchedulerError,
    exchange::{Source, WorkerRole},
    route::{Candidate, RouteRequest},
    worker::{Worker, WorkerId},
};

/// Why a worker of the right model may not take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ineligible {
    /// The request excludes it.
    Excluded,
    /// It takes no new requests.
    Draining,
    /// It has other weights than the request demands.
    OtherWeightsEpoch,
    /// It has a taint that the request does not tolerate.
    Tainted,
    /// It is reserved for other service classes.
    OtherSloClass,
    /// It serves no LoRA adapters.
    NoLoras,
    /// It computes prompts for others, and there are others.
    PrefillOnly,
    /// Prompt and output exceed its context.
    ContextTooLong {
        /// Prompt plus output tokens.
        requested: u64,
        /// Its `max_model_len`.
        limit: u64,
    },
    /// Prompt and output need more KV blocks than it has in all.
    KvTooLarge {
        /// Blocks needed.
        requested: u64,
        /// Its `num_blocks`.
        limit: u64,
    },
}

impl Ineligible {
    /// The field of the request that does not meet the worker's terms, after the number of those before it that do;
    /// `None` where it is not about terms.
    const fn unmet_term(self) -> Option<(u32, &'static str)> {
        match self {
            Self::OtherWeightsEpoch => Some((0, "weights_epoch")),
            Self::Tainted => Some((1, "tolerations")),
            Self::OtherSloClass => Some((2, "slo_class")),
            Self::NoLoras => Some((3, "lora")),
            Self::Excluded
            | Self::Draining
            | Self::PrefillOnly
            | Self::ContextTooLong { .. }
            | Self::KvTooLarge { .. } => None,
        }
    }

    /// The reason as metrics and Python spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Excluded => "excluded",
            Self::Draining => "draining",
            Self::OtherWeightsEpoch => "other_weights_epoch",
            Self::Tainted => "tainted",
            Self::OtherSloClass => "other_slo_class",
            Self::NoLoras => "no_loras",
            Self::PrefillOnly => "prefill_only",
            Self::ContextTooLong { .. } => "context_too_long",
            Self::KvTooLarge { .. } => "kv_too_large",
        }
    }
}

/// Why a request would go where it would go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// The best candidates, best first. The first is the one that `route` would choose.
    pub candidates: Vec<Candidate>,
    /// How many more workers could take the request.
    pub num_more_candidates: u32,
    /// The workers of the model that could not, and why.
    pub ineligible: Vec<(WorkerId, Ineligible)>,
}

/// All workers of a request's model, judged.
pub(super) struct Survey {
    candidates: Vec<Candidate>,
    ineligible: Vec<(WorkerId, Ineligible)>,
}

impl Survey {
    pub(super) fn best(&self) -> Option<Candidate> {
        self.candidates
            .iter()
            .min_by_key(|candidate| candidate.rank())
            .copied()
    }

    /// Why there is no candidate: what waiting does not help against goes first, a lack of size before other terms.
    pub(super) fn refusal(&self) -> SchedulerError {
        let reasons = self.ineligible.iter().map(|&(_, reason)| reason);
        let kv = reasons.clone().filter_map(|reason| match reason {
            Ineligible::KvTooLarge { requested, limit } => Some((limit, requested)),
            _ => None,
        });
        let context = reasons.clone().filter_map(|reason| match reason {
            Ineligible::ContextTooLong { requested, limit } => Some((limit, requested)),
            _ => None,
        });
        // Of the worker that comes closest.
        let terms: Option<Vec<_>> = reasons.map(Ineligible::unmet_term).collect();
        let unmet = terms.and_then(|terms| terms.into_iter().max());
        match (kv.max(), context.max(), unmet) {
            (Some((limit, requested)), ..) => SchedulerError::KvTooLarge { requested, limit },
            (None, Some((limit, requested)), _) => {
                SchedulerError::ContextTooLong { requested, limit }
            }
            (None, None, Some((_, field))) => SchedulerError::NotServed { field },
            (None, None, _) => SchedulerError::NoWorkers {
                registered: self.ineligible.len() as u32,
            },
        }
    }
}

impl Scheduler {
    /// The best `k` workers for the request and what each would cost, and why the others of the model may not
    /// take it. Reserves nothing. O(workers × blocks of the prompt).
    pub fn explain(
        &self,
        request: &RouteRequest<'_>,
        k: usize,
    ) -> Result<Explanation, SchedulerError> {
        let Survey {
            mut candidates,
            ineligible,
        } = self.survey(request)?;
        let chosen = self.choose(request).ok();
        // The chosen one first: among equals, and under policies that do not go by cost, the rank does not decide.
        let is_chosen = |it: &Candidate| chosen.is_some_and(|chosen| chosen.worker == it.worker);
        candidates.sort_unstable_by_key(|candidate| (!is_chosen(candidate), candidate.rank()));
        if let (Some(first), Some(chosen)) = (candidates.first_mut(), chosen) {
            (first.fetch, first.split) = (chosen.fetch, chosen.split);
        }
        let num_more_candidates = candidates.len().saturating_sub(k) as u32;
        candidates.truncate(k);
        Ok(Explanation {
            candidates,
            num_more_candidates,
            ineligible,
        })
    }

    /// Judges every worker of the model.
    pub(super) fn survey(&self, request: &RouteRequest<'_>) -> Result<Survey, SchedulerError> {
        request.validate()?;
        let model = self.groups.model(request.model);
        let model = model.ok_or(SchedulerError::ModelNotFound)?;
        let mut survey = Survey {
            candidates: Vec::new(),
            ineligible: Vec::new(),
        };
        for (key, &group) in &model.groups {
            if let Some(reason) = key.refusal(request) {
                let members = self.groups.get(group).members.iter();
                let ids = members.map(|&slot| (self.workers.standing(slot).id, reason));
                survey.ineligible.extend(ids);
            }
        }
        for chain in self.chains(model, request) {
            self.survey_group(request, &chain, &mut survey);
        }
        self.set_prefill_apart(&mut survey);
        survey.ineligible.sort_unstable_by_key(|&(id, _)| id);
        Ok(survey)
    }

    /// Workers that are there for prompts take whole requests only where nobody else can.
    fn set_prefill_apart(&self, survey: &mut Survey) {
        let is_prefill = |it: &mut Candidate| {
            let worker = self.workers.get(it.worker);
            worker.is_some_and(|worker| worker.spec.role == WorkerRole::Prefill)
        };
        let apart: Vec<Candidate> = survey.candidates.extract_if(.., is_prefill).collect();
        if survey.candidates.is_empty() {
            survey.candidates = apart;
            return;
        }
        let apart = apart.iter().map(|it| (it.worker, Ineligible::PrefillOnly));
        survey.ineligible.extend(apart);
    }

    fn survey_group(&self, request: &RouteRequest<'_>, chain: &Chain<'_>, survey: &mut Survey) {
        let depths = self.index.depths(&chain.blocks, self.workers.num_slots());
        let mut costs = self.cost_model(request, chain);
        if costs.fetch.is_some() {
            costs.source = self.deepest_of(chain, &depths);
        }
        for &slot in &self.groups.get(chain.group).members {
            let Some((worker, standing)) = self.workers.at(slot) else {
                continue;
            };
            if let Some(reason) = judge(standing.id, worker, request) {
                survey.ineligible.push((standing.id, reason));
                continue;
            }
            let depth = depths[slot as usize] as usize;
            let candidate = self.candidate(request, chain, slot, depth, &costs);
            survey.candidates.extend(candidate);
        }
    }
}

impl Scheduler {
    /// The deepest holder that the workers of the chain's group can fetch from, where each one's depth is known. It need
    /// not take the request itself.
    fn deepest_of(&self, chain: &Chain<'_>, depths: &[u32]) -> Source {
        let exchange = self.groups.get(chain.group).key.terms.exchange();
        let holders = (0_u32..).zip(depths).filter(|&(slot, &depth)| {
            let worker = self.workers.at(slot).filter(|_| depth > 0);
            worker.is_some_and(|(worker, _)| {
                exchange.is_none() || worker.spec.kv_exchange.as_ref() == exchange
            })
        });
        let least_busy = |slot: u32| Reverse((self.workers.standing(slot).batch, slot));
        let deepest = holders.max_by_key(|&(slot, depth)| (depth, least_busy(slot)));
        deepest.map_or_else(Source::default, |(slot, &depth)| Source {
            worker: exchange.map(|_| self.workers.standing(slot).id),
            depth: depth.into(),
        })
    }
}

/// Whether the worker could ever take the request; `None`: it could.
pub(super) fn judge(
    id: WorkerId,
    worker: &Worker,
    request: &RouteRequest<'_>,
) -> Option<Ineligible> {
    if request.exclude.contains(&id) {
        return Some(Ineligible::Excluded);
    }
    if worker.is_draining {
        return Some(Ineligible::Draining);
    }
    let (requested, limit) = (request.num_tokens(), u64::from(worker.spec.max_model_len));
    if requested > limit {
        return Some(Ineligible::ContextTooLong { requested, limit });
    }
    let requested = requested.div_ceil(u64::from(worker.spec.block_size));
    let limit = u64::from(worker.spec.num_blocks);
    (requested > limit).then_some(Ineligible::KvTooLarge { requested, limit })
}
