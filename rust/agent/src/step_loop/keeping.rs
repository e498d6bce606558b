//! Copies of a worker's cache that another worker keeps: what is offered to the keeper, and what is kept for others.

use std::time::Instant;

use orchestra_core::step::StepScheduler;
use orchestra_proto::v1;

use super::{KvLink, StepLoop, kv_link::timeout};
use crate::kv::{Offered, Order, TakeOrder};

/// Chains that the keeper is offered at a time.
const OFFERS_MAX: usize = 2;
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
    /// The router names the keeper. What an earlier one has, it has to be offered too; that comes with what each
    /// sequence has next.
    pub(super) fn write_through_to(&mut self, peer: Option<v1::KvPeer>) {
        let Some(kv) = &mut self.kv else { return };
        kv.keeper = peer.map(|peer| peer.worker_id);
        self.offer_sealed();
    }

    /// Offers the keeper what has waited longest, unless sequences need nearly all blocks: what somebody reads cannot
    /// be taken from the cache. What waits then waits on.
    pub(super) fn offer_sealed(&mut self) {
        let Some(kv) = &mut self.kv else { return };
        let Some(keeper) = &kv.keeper else { return };
        while kv.num_offers < OFFERS_MAX && has_spare_blocks(&self.scheduler) {
            let Some(chain) = self.scheduler.take_sealed() else {
                return;
            };
            kv.num_offers += 1;
            kv.inbox.order(Order::Offer(keeper.clone(), chain));
        }
    }
}

/// Whether an eighth of the blocks is free or only cached.
pub(super) fn has_spare_blocks(scheduler: &StepScheduler) -> bool {
    let stats = scheduler.stats();
    stats.kv_blocks_used <= stats.kv_blocks_total - stats.kv_blocks_total / 8
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
