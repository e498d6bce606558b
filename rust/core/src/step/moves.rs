//! KV that other workers bring or take, block by whole block.
//!
//! ```text
//!   add_awaiting ──▶ awaiting ── kv_arrived ──▶ cached ──▶ waiting, with a shorter prompt to compute
//!                      │ kv_failed, the deadline, abort
//!                      ▼
//!                    withheld ── release_hold ──▶ free
//! ```
//!
//! **What moves only ever fills the prefix cache.** A request whose KV does not come is an ordinary one, so its tokens
//! are the same in every case. A block that another process may still write is withheld: it belongs to nobody until
//! the caller says that it is quiet. A block that another process reads is held, as a sequence would hold it: never
//! evicted, never written.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, ops::Range};

use super::{
    block_pool::{BlockPool, Chain},
    plan::{FilledBlocks, Request},
    scheduler::StepScheduler,
    sequence::{PrefillOnly, Running, Sequence},
};
use crate::{
    error::RejectReason,
    hash::HashSeed,
    ids::{BlockId, RequestId, TokenId},
    time::Time,
};

/// Share of the pool that awaited and withheld blocks may take, and the same again for blocks held for others: the
/// rest is always the replica's own.
const MOVING_SHARE: usize = 2;

/// Blocks that are kept for another worker; never given out twice by one scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(pub u64);

/// Blocks that another worker has to fill before their sequence starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwaitedBlocks {
    /// Names them until they have arrived or are released.
    pub hold: HoldId,
    /// Which block of the prompt the first of them is; those before it are here already.
    pub first_block: u32,
    /// Where the KV belongs.
    pub blocks: Vec<BlockId>,
}

/// Cached blocks that stay until their hold is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBlocks {
    /// Names them.
    pub hold: HoldId,
    /// The blocks of a prompt, from its beginning.
    pub blocks: Vec<BlockId>,
}

/// A request whose first blocks are on their way.
#[derive(Debug)]
pub(super) struct Awaiting {
    pub(super) sequence: Sequence,
    /// Cached blocks, then those that are being filled.
    pub(super) block_table: Vec<BlockId>,
    pub(super) num_matched: usize,
    deadline: Time,
}

/// Blocks that are neither a sequence's nor free.
#[derive(Debug, Default)]
pub(super) struct Hold {
    /// Blocks of one chain from its beginning: cached ones, then private ones.
    pub(super) block_table: Vec<BlockId>,
    /// Private blocks of no chain.
    pub(super) loose: Vec<BlockId>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Moves {
    num_holds: u64,
    pub(super) awaiting: BTreeMap<HoldId, Awaiting>,
    pub(super) holds: BTreeMap<HoldId, Hold>,
    /// Prefill-only requests that have ended since they were last asked for.
    pub(super) prefilled: Vec<RequestId>,
}

impl Moves {
    fn next_hold(&mut self) -> HoldId {
        self.num_holds += 1;
        HoldId(self.num_holds)
    }

    /// Blocks that others fill, or may still be filling.
    fn num_incoming(&self) -> usize {
        let awaited = |it: &Awaiting| it.block_table.len() - it.num_matched;
        let withheld: usize = self.holds.values().map(|hold| hold.loose.len()).sum();
        withheld + self.awaiting.values().map(awaited).sum::<usize>()
    }

    fn num_held(&self) -> usize {
        self.holds.values().map(|it| it.block_table.len()).sum()
    }

    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.awaiting.values().map(|it| &it.sequence)
    }

    /// Tokens that awaiting requests compute even where all that they await comes.
    pub(super) fn num_prefill_tokens(&self, block_size: usize) -> u64 {
        let rest = |it: &Awaiting| it.sequence.num_tokens() - it.block_table.len() * block_size;
        self.awaiting.values().map(rest).sum::<usize>() as u64
    }
}

impl StepScheduler {
    // === KV that comes ===

    /// Queues a request whose first `num_blocks` blocks another worker has. Returns the blocks that it has to fill,
    /// until [`kv_arrived`](Self::kv_arrived); the request does not start before that, a failure or `deadline`, and
    /// holds nobody up. `None`: there is nothing to bring, or no room to bring it to, and the request is queued as by
    /// [`add_request`](Self::add_request), which refuses for the same reasons.
    ///
    /// While a step executes nothing is awaited: it may still write to blocks whose request was aborted.
    pub fn add_awaiting(
        &mut self,
        request: Request,
        num_blocks: u32,
        deadline: Time,
        now: Time,
    ) -> Result<Option<AwaitedBlocks>, RejectReason> {
        let sequence = self.admit(request, now)?;
        let num_blocks = sequence
            .matchable(self.block_size())
            .hashes
            .len()
            .min(num_blocks as usize);
        let Some(block_table) = self.table_to_fill(&sequence, num_blocks) else {
            self.enqueue(sequence);
            return Ok(None);
        };
        let hold = self.moves.next_hold();
        let num_matched = self.matched.len();
        let awaited = AwaitedBlocks {
            hold,
            first_block: num_matched as u32,
            blocks: block_table[num_matched..].to_vec(),
        };
        let awaiting = Awaiting {
            sequence,
            block_table,
            num_matched,
            deadline,
        };
        self.moves.awaiting.insert(hold, awaiting);
        Ok(Some(awaited))
    }

    /// A table of `num_blocks` blocks that begins with those that are cached; `None` where that is all of them, or
    /// where too many blocks are being filled already.
    fn table_to_fill(&mut self, sequence: &Sequence, num_blocks: usize) -> Option<Vec<BlockId>> {
        self.pool
            .match_prefix(sequence.chain(num_blocks), &mut self.matched);
        let num_missing = num_blocks - self.matched.len();
        let limit = self.pool.num_blocks() / MOVING_SHARE;
        let has_room = self.moves.num_incoming() + num_missing <= limit;
        // What the next plan saves to host memory still lies in blocks that count as free.
        let is_quiet = self.executing.is_none() && !self.pool.host.has_copies();
        if num_missing == 0 || !has_room || !is_quiet {
            return None;
        }
        self.pool
            .allocate_table_for_others(&self.matched, num_blocks, self.running.len())
    }

    /// The first `num_blocks` of the awaited blocks hold their KV now, and nobody writes to any of them any more. They
    /// become reusable, and the request is queued with the rest of its prompt. `false` where nobody awaited them any
    /// more: they are free, as after [`release_hold`](Self::release_hold).
    pub fn kv_arrived(&mut self, hold: HoldId, num_blocks: u32) -> bool {
        let Some(mut awaiting) = self.moves.awaiting.remove(&hold) else {
            self.release_hold(hold);
            return false;
        };
        let end = awaiting
            .block_table
            .len()
            .min(awaiting.num_matched + num_blocks as usize);
        let chain = awaiting.sequence.chain(end);
        self.pool
            .cache_blocks(chain, &mut awaiting.block_table, awaiting.num_matched);
        awaiting.sequence.fetched_blocks = awaiting.num_matched..end;
        self.stats.fetched_blocks += (end - awaiting.num_matched) as u64;
        self.pool.release_table(&mut awaiting.block_table);
        self.enqueue(awaiting.sequence);
        true
    }

    /// The awaited KV does not come: its request computes. The blocks stay withheld until
    /// [`release_hold`](Self::release_hold). `false` where nobody awaited them any more.
    pub fn kv_failed(&mut self, hold: HoldId) -> bool {
        let Some(awaiting) = self.moves.awaiting.remove(&hold) else {
            return false;
        };
        self.stats.fetch_failures += 1;
        let sequence = self.withhold(hold, awaiting);
        self.enqueue(sequence);
        true
    }

    /// Gives back what an awaiting request shares, and keeps from everybody what others may be writing.
    fn withhold(&mut self, hold: HoldId, mut awaiting: Awaiting) -> Sequence {
        let loose = awaiting.block_table.split_off(awaiting.num_matched);
        self.pool.release_table(&mut awaiting.block_table);
        let block_table = awaiting.block_table;
        self.moves.holds.insert(hold, Hold { block_table, loose });
        awaiting.sequence
    }

    /// Queues what has awaited its KV for too long.
    pub(super) fn give_up_awaiting(&mut self, now: Time) {
        while let Some(hold) = self.overdue(now) {
            self.kv_failed(hold);
        }
    }

    fn overdue(&self, now: Time) -> Option<HoldId> {
        let mut awaiting = self.moves.awaiting.iter();
        awaiting
            .find(|(_, it)| it.deadline <= now)
            .map(|(&id, _)| id)
    }

    /// When a request next stops to await its KV: [`schedule`](Self::schedule) has to be called then.
    pub fn next_deadline(&self) -> Option<Time> {
        self.moves.awaiting.values().map(|it| it.deadline).min()
    }

    pub(super) fn abort_awaiting(&mut self, id: RequestId) -> bool {
        let mut awaiting = self.moves.awaiting.iter();
        let found = awaiting.find(|(_, it)| it.sequence.id == id);
        let Some(hold) = found.map(|(&hold, _)| hold) else {
            return false;
        };
        let awaiting = self.moves.awaiting.remove(&hold);
        awaiting.map(|it| self.withhold(hold, it)).is_some()
    }

    pub(super) fn abort_all_awaiting(&mut self) -> Vec<RequestId> {
        let awaiting = std::mem::take(&mut self.moves.awaiting);
        let withheld = awaiting.into_iter();
        withheld
            .map(|(hold, it)| self.withhold(hold, it).id)
            .collect()
    }

    // === KV that goes ===

    /// Keeps the cached blocks with which a prompt begins, at most `num_blocks`, until
    /// [`release_hold`](Self::release_hold). `None` where there are none, or where too many blocks are held already.
    pub fn hold_prefix(
        &mut self,
        seed: HashSeed,
        token_ids: &[TokenId],
        num_blocks: u32,
    ) -> Option<HeldBlocks> {
        let mut parent = seed.0;
        let full_blocks = token_ids.chunks_exact(self.block_size());
        let hashes: Vec<_> = full_blocks
            .take(num_blocks as usize)
            .map(|tokens| {
                let hash = (self.hash_block)(parent, tokens);
                parent = hash.0;
                hash
            })
            .collect();
        let chain = Chain {
            seed,
            hashes: &hashes,
            token_ids,
        };
        self.pool.match_prefix(chain, &mut self.matched);
        let limit = self.pool.num_blocks() / MOVING_SHARE;
        if self.matched.is_empty() || self.moves.num_held() + self.matched.len() > limit {
            return None;
        }
        let blocks = self.matched.clone();
        let hold = self.hold(blocks.clone());
        Some(HeldBlocks { hold, blocks })
    }

    fn hold(&mut self, block_table: Vec<BlockId>) -> HoldId {
        for &block in &block_table {
            self.pool.acquire(block);
        }
        let loose = Vec::new();
        let hold = self.moves.next_hold();
        self.moves.holds.insert(hold, Hold { block_table, loose });
        hold
    }

    /// Nobody else touches these blocks any more; where a request still awaits them, it computes. `false` where there
    /// is no such hold.
    pub fn release_hold(&mut self, hold: HoldId) -> bool {
        self.kv_failed(hold);
        let Some(mut held) = self.moves.holds.remove(&hold) else {
            return false;
        };
        self.pool.release_table(&mut held.block_table);
        self.pool.release_table(&mut held.loose);
        true
    }

    /// Queues a request that only computes the first `num_blocks` blocks of its prompt, fewer where it has fewer: it
    /// draws no token, and ends when they are cached (see [`take_prefilled`](Self::take_prefilled)). The plans say in
    /// [`filled`](super::StepPlan::filled) which blocks their step completes.
    ///
    /// Refuses as [`add_request`](Self::add_request) does; `EmptyPrompt` also where there is no whole block.
    pub fn add_prefill(
        &mut self,
        mut request: Request,
        num_blocks: u32,
        now: Time,
    ) -> Result<(), RejectReason> {
        let block_size = self.block_size();
        let num_full_blocks = request.prompt_token_ids.len() / block_size;
        let num_blocks = num_full_blocks.min(num_blocks as usize);
        request.prompt_token_ids.truncate(num_blocks * block_size);
        request.output_token_ids.clear();
        let mut sequence = self.admit(request, now)?;
        sequence.prefill_only = Some(PrefillOnly::default());
        self.enqueue(sequence);
        Ok(())
    }

    /// Prefill-only requests that have ended since the last call, other than by an abort.
    pub fn take_prefilled(&mut self) -> Vec<RequestId> {
        std::mem::take(&mut self.moves.prefilled)
    }

    /// Holds the blocks that the step of this plan completes for others, before it runs.
    pub(super) fn hold_filled(&mut self) -> Vec<FilledBlocks> {
        let mut filled = Vec::new();
        for index in 0..self.running.len() {
            let Some(range) = self.running[index].newly_filled(self.block_size()) else {
                continue;
            };
            let block_table = self.running[index].block_table[..range.end].to_vec();
            let blocks = block_table[range.clone()].to_vec();
            let hold = self.hold(block_table);
            let sequence = &mut self.running[index].sequence;
            filled.push(FilledBlocks {
                request_id: sequence.id,
                first_block: range.start as u32,
                hold,
                blocks,
            });
            if let Some(prefill) = &mut sequence.prefill_only {
                prefill.num_filled_blocks = range.end;
                prefill.hold = Some(hold);
            }
        }
        filled
    }
}

impl Running {
    /// The blocks that the planned tokens complete, or that the cache had, and that nobody was told of; `None` where
    /// there is none, or nobody to tell.
    fn newly_filled(&self, block_size: usize) -> Option<Range<usize>> {
        let prefill = self.sequence.prefill_only.as_ref()?;
        let end = (self.num_computed_tokens + self.num_scheduled_tokens) / block_size;
        let is_scheduled = self.num_scheduled_tokens > 0;
        (is_scheduled && end > prefill.num_filled_blocks).then_some(prefill.num_filled_blocks..end)
    }
}

impl Hold {
    /// The step has cached its blocks, and a table took equal ones of others in the place of some of its own from
    /// `first_replaced` on: what others read is kept, and so are the blocks that its children have as parents.
    pub(super) fn follow(
        &mut self,
        table: &[BlockId],
        first_replaced: usize,
        pool: &mut BlockPool,
    ) {
        for (held, &block) in self.block_table.iter_mut().zip(table).skip(first_replaced) {
            if *held != block {
                pool.acquire(block);
                self.loose.push(std::mem::replace(held, block));
            }
        }
    }
}
