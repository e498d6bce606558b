//! Finding a worker of least cost without looking at all of them.
//!
//! Along a chain the holders of a block hold every block before it, where workers evict leaves first: holder sets
//! are *nested*. Let `H(d)` be the holders of the first `d` blocks, `H(0)` all workers of the group.
//!
//! 1. `d` = the deepest block that anybody holds, by a search on presence.
//! 2. Judge the members of `H(d)` as holders of `d` blocks: all of them where they are few, otherwise along the
//!    [`LoadGrid`](super::load_grid::LoadGrid), which stops at the first load whose bound is no better than the best.
//! 3. `d` = the largest depth at which there are more holders than at the last one, by a search on their number; back
//!    to 2. Stop where even the least loaded worker would not beat the best at this depth, or after `d` = 0.
//!
//! *Why the choice is exact.* A worker `w` that holds `t` blocks is a member of `H(d)` for every `d <= t`. The depths
//! visited contain every `d` with `|H(d)| > |H(d + 1)|`, so with nested sets they contain `t`: `w` is judged by its true
//! cost, unless a bound cut it off. Judged at a smaller depth it seems dearer and less fit, never cheaper, because
//! [`cost`](CostModel::cost) rises with the prefill left and that falls with the depth. The bounds cut off nothing better
//! than the best: the cost rises with each argument, so `cost(prefill(d), least queued, least batch)` bounds every
//! worker at depth `d` and, as prefill only grows, at all smaller depths; and a grid cell's floors bound its members.
//!
//! *Blocks in host memory* cost a worker something that its depth does not show, but nothing that makes it cheaper than
//! the bounds; and judged at a smaller depth it saves less on copies than it pays for what it lacks there, because a copy
//! never counts for more than doing without.
//!
//! *Where sets are not nested* (an event was lost and its gap not yet mended), a member of `H(d)` may lack an
//! earlier block and seem cheaper than it is. The caller verifies the chosen worker's blocks one by one, so cached
//! tokens are never claimed in excess; where one is missing it judges every worker instead. A worker whose cost was
//! underestimated and that was not chosen would not have been chosen at its true cost either. One that lacks a
//! later block of a set that it was to be counted in can be overlooked: then the choice is sound but may not be best.
//!
//! Cost: O(log D) lookups for each depth visited, O(rows) for each walk of the
//! grid, and the members of the cells that the bound does not exclude.

use super::{
    bits::Bits,
    group::Group,
    index::{Holders, PrefixIndex, Probed},
    policy::CostModel,
    standing::{NIL, Standing, room_class},
    worker::WorkerId,
    workers::Workers,
};
use crate::hash::BlockHash;

/// So few holders are judged one by one.
const FEW_HOLDERS: usize = 64;

/// A worker and its cost as one who holds `depth` blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) cost: u64,
    /// Of equals, the one that was chosen longest ago is taken.
    pub(super) last_chosen: u64,
    pub(super) slot: u32,
    pub(super) depth: usize,
}

impl Found {
    /// Whether this one is to be taken rather than the other.
    pub(super) fn is_before(&self, other: &Self) -> bool {
        (self.cost, self.last_chosen) < (other.cost, other.last_chosen)
    }
}

/// What a request asks of the workers of one group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs<'a> {
    /// Prompt and output tokens.
    pub(super) num_tokens: u64,
    /// KV blocks of them: what the worker must have in all.
    pub(super) num_blocks: u64,
    /// KV blocks that are booked: what must be free.
    pub(super) num_booked_blocks: u64,
    pub(super) exclude: &'a [WorkerId],
    /// Only workers that could start now.
    pub(super) room: bool,
    /// Only the workers in these slots.
    pub(super) only: Option<&'a Bits>,
}

impl Needs<'_> {
    /// Whether the worker may take the request, as a holder of `depth` blocks.
    pub(super) fn allow(&self, standing: &Standing, depth: usize) -> bool {
        standing.cell != NIL
            && self.only.is_none_or(|only| only.contains(standing.id.slot))
            && self.num_tokens <= u64::from(standing.max_model_len)
            && self.num_blocks <= u64::from(standing.num_blocks)
            && (!self.room || self.has_room(standing, depth))
            && !self.exclude.contains(&standing.id)
    }

    /// Whether the worker could start the request now.
    pub(super) fn has_room(&self, standing: &Standing, depth: usize) -> bool {
        standing.batch < standing.max_num_seqs
            && self.num_booked_blocks - depth as u64 <= u64::from(standing.kv_blocks_free)
    }
}

/// One search in one group. See the module.
pub(super) struct Search<'a> {
    pub(super) index: &'a PrefixIndex,
    pub(super) workers: &'a Workers,
    pub(super) group: &'a Group,
    pub(super) group_number: u32,
    pub(super) chain: &'a [BlockHash],
    /// Workers that may hold blocks of the chain: those of this group, and of others that it is shared with.
    pub(super) num_sharers: usize,
    pub(super) needs: Needs<'a>,
    pub(super) costs: CostModel,
    /// The best so far, that of other groups included.
    pub(super) best: Option<Found>,
}

impl Search<'_> {
    /// Leaves the best in `best`.
    pub(super) fn run(&mut self) {
        let Some((queued, batch)) = self.group.grid.least() else {
            return;
        };
        if !self.costs.policy.uses_prefix() && !self.needs.room {
            self.judge_level(0, None); // neither cost nor room depends on the depth
            return;
        }
        let mut probed = Probed::new(self.index, self.chain);
        let (mut depth, mut count) = probed.deepest_above(self.chain.len(), 0);
        loop {
            if !self.may_improve(depth, queued, batch) {
                return;
            }
            let Some(last) = depth.checked_sub(1) else {
                self.judge_level(0, None);
                return;
            };
            self.judge_level(depth, Some(self.index.holders_of(self.chain[last])));
            // Nobody else is left, or nobody at any smaller depth can beat the best.
            if count >= self.num_sharers || !self.may_improve(last, queued, batch) {
                return;
            }
            (depth, count) = match probed.deepest_above(last, count) {
                (0, _) => (0, count),
                deeper => deeper,
            };
        }
    }

    /// Whether a worker with this load would beat the best as a holder of `depth` blocks.
    fn may_improve(&self, depth: usize, queued: u64, batch: u64) -> bool {
        let bound = self.cost(depth, queued, batch);
        self.best.is_none_or(|best| bound < best.cost)
    }

    fn cost(&self, depth: usize, queued: u64, batch: u64) -> u64 {
        let prefill = self.costs.prefill(depth as u64);
        self.costs.cost(prefill, queued, batch)
    }

    /// Judges those of the holders that could beat the best; without holders, of all workers.
    fn judge_level(&mut self, depth: usize, holders: Option<Holders<'_>>) {
        let group = self.group;
        let blocks_left = self.needs.num_booked_blocks.saturating_sub(depth as u64);
        let class = room_class(u32::try_from(blocks_left).unwrap_or(u32::MAX));
        let with_room = self.needs.room.then(|| group.room(class));
        let slots = [with_room, self.needs.only].into_iter().flatten();
        let slots = slots.min_by_key(|slots| slots.len());
        let num_slots = slots.map_or(usize::MAX, Bits::len);
        let num_holders = holders.map_or(usize::MAX, |holders| holders.len());
        let fewest = num_holders.min(num_slots);
        if fewest > FEW_HOLDERS && self.walk(depth, holders, fewest) {
            return;
        }
        let (index, standings) = (self.index, self.workers.standings());
        match (holders, slots) {
            (Some(holders), _) if num_holders <= num_slots => holders.for_each(|id| {
                if let Some(slot) = index.slot_of(id) {
                    self.judge(slot, depth);
                }
            }),
            (_, Some(slots)) => {
                for slot in slots.iter() {
                    let holder = standings[slot as usize].holder;
                    if holders.is_none_or(|holders| holders.contains(holder)) {
                        self.judge(slot, depth);
                    }
                }
            }
            _ => {}
        }
    }

    /// Judges along the load grid; `false` where so many others were in the way that going through all `limit` of
    /// those that count is cheaper.
    fn walk(&mut self, depth: usize, holders: Option<Holders<'_>>, limit: usize) -> bool {
        let (group, standings, costs) = (self.group, self.workers.standings(), self.costs);
        let prefill = costs.prefill(depth as u64);
        let mut left = limit;
        let best = self.best.map_or(u64::MAX, |best| best.cost);
        let visit = |slot: u32| {
            left = left.checked_sub(1)?;
            let holder = standings[slot as usize].holder;
            if holders.is_none_or(|holders| holders.contains(holder)) {
                self.judge(slot, depth);
            }
            Some(self.best.map_or(u64::MAX, |best| best.cost))
        };
        let bound = |queued, batch| costs.cost(prefill, queued, batch);
        group.grid.walk(standings, best, bound, visit)
    }

    fn judge(&mut self, slot: u32, depth: usize) {
        let standing = self.workers.standing(slot);
        if standing.group != self.group_number || !self.needs.allow(standing, depth) {
            return;
        }
        let mut prefill = self.costs.prefill(depth as u64);
        if standing.has_kept {
            let num_kept = self.workers.num_kept(slot, &self.chain[..depth]);
            prefill += self.costs.copying(depth as u64, num_kept);
        }
        let cost = self
            .costs
            .cost(prefill, standing.queued, standing.batch.into());
        let found = Found {
            cost,
            last_chosen: standing.last_chosen,
            slot,
            depth,
        };
        if self.best.is_none_or(|best| found.is_before(&best)) {
            self.best = Some(found);
        }
    }
}
