//! Whether another worker computes a request's prompt and gives it the KV.
//!
//! The request runs on one worker, `d`, in any case. Where workers of role `prefill` can give it blocks, the whole blocks of
//! its prompt may be computed on the best of these, `p`. Both ways are compared in tokens of prefill, as time that somebody
//! waits:
//!
//! ```text
//! alone = (left(d) + queued(d)) × crowd(d) + fetch          left(d): what d would compute itself, after a fetch
//! split = left(p) + queued(p) + blocks that d lacks, moved + (tail + queued(d)) × crowd(d)
//! crowd(d) = sequences on d + 1, and 1 more where d is of role decode
//! ```
//!
//! A prompt that `d` computes holds up everybody who decodes there, so its tokens count once for each; on `p` nobody decodes,
//! so there the request waits alone. A decode worker counts one sequence more than it has: the one that is about to
//! come. Prompts of which `d` lacks less than [`split_min_tokens`](super::SchedulerConfig::split_min_tokens) are not split.

use super::{
    Scheduler,
    chain::Chain,
    exchange::WorkerRole,
    policy::{CostModel, RoutePolicy},
    route::{Candidate, RouteRequest},
    worker::WorkerId,
};

/// Who computes a prompt for another worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// The worker.
    pub worker: WorkerId,
    /// Leading blocks of the prompt that it computes and gives away: all but the tail.
    pub num_blocks: u32,
    /// Prompt tokens whose KV it holds already.
    pub num_cached_tokens: u32,
    /// Prompt tokens that are before it there, its own included.
    pub cost: u64,
}

impl Scheduler {
    /// The candidate with its prompt computed elsewhere, if that is better. `prefill` are the request's chains on workers
    /// that are there for it, `home` is the candidate's own.
    pub(super) fn split(
        &self,
        request: &RouteRequest<'_>,
        prefill: &[Chain<'_>],
        home: &Chain<'_>,
        mut candidate: Candidate,
    ) -> Candidate {
        if let Some(split) = self.better_split(request, prefill, home, &candidate) {
            (candidate.split, candidate.fetch) = (Some(split), None);
        }
        candidate
    }

    fn better_split(
        &self,
        request: &RouteRequest<'_>,
        prefill: &[Chain<'_>],
        home: &Chain<'_>,
        candidate: &Candidate,
    ) -> Option<Split> {
        let terms = &self.groups.get(home.group).key.terms;
        let exchange = terms.exchange()?;
        let block_size = u64::from(home.block_size);
        let num_blocks = home.blocks.len() as u64;
        let num_held = u64::from(candidate.num_cached_tokens) / block_size;
        let lacks = num_blocks.saturating_sub(num_held);
        if lacks * block_size < u64::from(self.config.split_min_tokens.max(1)) {
            return None;
        }
        let moving = self.exchanges.cost(exchange, block_size, &self.config);
        let prompt = request.token_ids.len() as u64;
        let crowd = u64::from(candidate.batch) + 1 + u64::from(terms.role() == WorkerRole::Decode);
        let on_d = |left: u64| (left + candidate.queued_prefill_tokens).saturating_mul(crowd);
        let fetched = candidate.fetch.map_or(0, |fetch| fetch.num_blocks.into());
        let alone = on_d(prompt - fetched.max(num_held) * block_size)
            .saturating_add(moving.tokens(fetched.saturating_sub(num_held)));
        let tail = on_d(prompt - num_blocks * block_size).saturating_add(moving.tokens(lacks));
        let chosen = self.best_prefill(request, prefill, home)?;
        (chosen.cost.saturating_add(tail) < alone).then_some(Split {
            worker: chosen.worker,
            num_blocks: num_blocks as u32,
            num_cached_tokens: chosen.num_cached_tokens,
            cost: chosen.cost,
        })
    }

    /// Of those that can give blocks to the home chain's workers, the one that is done first.
    fn best_prefill(
        &self,
        request: &RouteRequest<'_>,
        prefill: &[Chain<'_>],
        home: &Chain<'_>,
    ) -> Option<Candidate> {
        // It draws no token.
        let request = &RouteRequest {
            max_tokens: 1,
            booked_tokens: None,
            ..*request
        };
        let exchange_of = |chain: &Chain<'_>| self.groups.get(chain.group).key.terms.exchange();
        let can_give = |chain: &&Chain<'_>| {
            exchange_of(chain) == exchange_of(home) && chain.has_blocks_of(home)
        };
        let found = prefill.iter().filter(can_give).filter_map(|chain| {
            let costs = CostModel {
                policy: RoutePolicy::PrefixSum,
                seq_cost_tokens: 0,
                fetch: None,
                ..self.cost_model(request, chain)
            };
            let alone = std::slice::from_ref(chain);
            let (found, _, costs) = self.least_cost(request, alone, &[true, false], |_| costs)?;
            self.verified(request, found, chain, &costs)
        });
        found.min_by_key(Candidate::rank)
    }
}
