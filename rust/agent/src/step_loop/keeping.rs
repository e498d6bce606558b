//! Copies of a worker's cache that another worker keeps: what is offered to the keeper, and what is kept for others.

use std::time::{Duration, Instant};

use orchestra_core::{Time, step::StepScheduler};
use orchestra_proto::v1;

use super::{KvLink, StepLoop, kv_link::timeout, micros};
use crate::kv::{Offered, Order, TakeOrder};

/// Chains that the keeper is offered at a time.
const OFFERS_MAX: usize = 2;
/// The shortest time between two offers while the steps are late.
const LATE_PAUSE: Duration = Duration::from_secs(1);
/// Blocks of a sequence that are offered together, once its prompt is: an offer names the sequence's tokens from its
/// beginning.
const OFFER_BLOCKS_MIN: u32 = 8;

impl KvLink {
    /// Has the scheduler note what is to be written through.
    pub(super) fn prepare(&self, scheduler: &mut StepScheduler) {
        if self.pool.config().write_through {
            scheduler.note_sealed(OFFER_BLOCKS_MIN);
        }
    }
}

impl StepLoop {
    /// The router names the keeper. It gets what was offered to an earlier one and not read; what that one has, it has to
    /// be offered too, and that comes with what each sequence has next.
    pub(super) fn write_through_to(&mut self, peer: Option<v1::KvPeer>) {
        let Some(kv) = &mut self.kv else { return };
        kv.keeper = peer.map(|peer| peer.worker_id);
        if kv.keeper.is_some() {
            kv.inbox.order(Order::NewKeeper);
        }
        self.offer_sealed();
    }

    /// Offers the keeper what has waited longest, as far as it [may be](may_offer). What waits then waits on.
    pub(super) fn offer_sealed(&mut self) {
        let Some(kv) = &mut self.kv else { return };
        let Some(keeper) = &kv.keeper else { return };
        let now = Time(micros(self.started.elapsed()));
        while kv.num_offers < OFFERS_MAX && may_offer(&self.scheduler, kv.offered_at, now) {
            let Some(chain) = self.scheduler.take_sealed() else {
                return;
            };
            kv.num_offers += 1;
            kv.offered_at = Some(now);
            kv.inbox.order(Order::Offer(keeper.clone(), chain));
        }
    }
}

/// Whether an eighth of the blocks is free or only cached: what somebody reads cannot be taken from the cache.
pub(super) fn has_spare_blocks(scheduler: &StepScheduler) -> bool {
    let stats = scheduler.stats();
    stats.kv_blocks_used <= stats.kv_blocks_total - stats.kv_blocks_total / 8
}

/// Whether a chain may be offered now, the last one having been at `offered_at`. While steps are late only one in
/// [`LATE_PAUSE`] is: a machine that is always late is no less in need of copies.
fn may_offer(scheduler: &StepScheduler, offered_at: Option<Time>, now: Time) -> bool {
    let has_paused = offered_at.is_none_or(|at| now.since(at) >= LATE_PAUSE);
    has_spare_blocks(scheduler) && (has_paused || !scheduler.is_late())
}

/// Makes room for what another worker wants to be kept, and asks for it.
pub(super) fn keep(scheduler: &mut StepScheduler, kv: &KvLink, offered: Offered) {
    let Offered {
        from,
        transfer_id,
        hash_seed,
        mut token_ids,
        max_blocks,
        timeout_ms,
    } = offered;
    let Some(awaited) = scheduler.keep_for(hash_seed, &token_ids, max_blocks) else {
        return kv.inbox.order(Order::Decline(from.worker_id, transfer_id));
    };
    let num_blocks = awaited.first_block + awaited.blocks.len() as u32;
    token_ids.truncate(num_blocks as usize * kv.block_size as usize);
    kv.inbox.order(Order::Take(TakeOrder {
        hold: awaited.hold,
        first_block: awaited.first_block,
        blocks: awaited.blocks,
        hash_seed,
        token_ids,
        source: v1::KvSource {
            peer: Some(from),
            transfer_id,
            num_blocks,
            is_pushed: false,
            timeout_ms,
        },
        deadline: Instant::now() + timeout(timeout_ms),
    }));
}

#[cfg(test)]
mod tests {
    use orchestra_core::{
        HashSeed, RequestId, SamplingParams,
        step::{Request, StepOutput, StepSchedulerConfig},
    };

    use super::*;

    fn scheduler() -> StepScheduler {
        StepScheduler::new(StepSchedulerConfig {
            block_size: 4,
            num_blocks: 16,
            max_num_batched_tokens: 64,
            max_num_seqs: 2,
            max_model_len: 64,
            ..StepSchedulerConfig::default()
        })
        .unwrap()
    }

    fn add(scheduler: &mut StepScheduler, id: u64, num_prompt_tokens: u32) {
        let request = Request {
            id: RequestId(id),
            prompt_token_ids: vec![7; num_prompt_tokens as usize],
            output_token_ids: Vec::new(),
            sampling: SamplingParams {
                max_tokens: 64 - num_prompt_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            hash_seed: HashSeed(id),
        };
        scheduler.add_request(request, Time::ZERO).unwrap();
    }

    /// A step of 5 ms, and what the loop does after it.
    fn step(scheduler: &mut StepScheduler, now: &mut Time, pause: Duration) {
        let plan = scheduler.schedule(*now).unwrap();
        let output = StepOutput {
            step_id: plan.step_id,
            token_ids: vec![9; plan.samples.len()],
            logprobs: Vec::new(),
        };
        *now = *now + Duration::from_millis(5);
        scheduler.update_from_output(&output, *now).unwrap();
        *now = *now + pause;
    }

    #[test]
    fn nothing_is_given_while_sequences_need_the_blocks() {
        let mut scheduler = scheduler();
        let mut now = Time::ZERO;
        add(&mut scheduler, 1, 52);
        step(&mut scheduler, &mut now, Duration::ZERO);
        assert!(has_spare_blocks(&scheduler), "13 or 14 blocks of 16");
        for _ in 0..8 {
            step(&mut scheduler, &mut now, Duration::ZERO);
        }
        assert!(!has_spare_blocks(&scheduler), "15 blocks");
        assert!(!may_offer(&scheduler, None, now));
        scheduler.abort(RequestId(1));
        assert!(may_offer(&scheduler, None, now));
    }

    #[test]
    fn little_is_offered_while_steps_are_late() {
        let mut scheduler = scheduler();
        let mut now = Time::ZERO;
        add(&mut scheduler, 1, 4);
        for _ in 0..5 {
            step(&mut scheduler, &mut now, Duration::from_micros(100));
        }
        assert!(may_offer(&scheduler, Some(now), now));
        for _ in 0..20 {
            step(&mut scheduler, &mut now, Duration::from_millis(4));
        }
        assert!(may_offer(&scheduler, None, now), "the first one");
        assert!(!may_offer(&scheduler, Some(now), now));
        assert!(may_offer(&scheduler, Some(now), now + LATE_PAUSE));
        scheduler.abort(RequestId(1));
        assert!(scheduler.schedule(now).is_none());
        assert!(may_offer(&scheduler, Some(now), now), "nobody waits");
    }
}
