//! Who gives way when blocks run out, and how it comes back.

use std::cmp::Reverse;

use super::{
    block_pool::BlockPool,
    schedule::{Draft, Seat},
    scheduler::StepScheduler,
    sequence::Preempted,
};

impl StepScheduler {
    /// Takes the blocks of the running sequence that loses least by it, and returns its index. It does not
    /// bounce back: of the blocks that it gave up, one is taken already.
    ///
    /// The most senior sequence is never chosen, so it has the whole pool if it needs it, and `add_request` has
    /// made sure that this is enough: it runs to its end. Seniority is the order of first starts and survives
    /// preemption, and preempted sequences start before new ones; so every sequence becomes the most senior one
    /// after finitely many steps. Hence no livelock.
    ///
    /// Least work lost is fewest tokens computed, and of equals the junior. A sequence whose last block is shared
    /// would free nothing, so it is taken only where there is no other.
    pub(super) fn preempt_one(&mut self) -> Option<usize> {
        let (index, _) = self
            .running
            .iter()
            .enumerate()
            .skip(1)
            .filter_map(|(index, running)| {
                let last_block = *running.block_table.last()?;
                let frees_nothing = self.pool.ref_count(last_block) > 1;
                Some((
                    index,
                    (frees_nothing, running.num_computed_tokens, Reverse(index)),
                ))
            })
            .min_by_key(|&(_, cost)| cost)?;
        self.take_blocks(index);
        Some(index)
    }

    /// Preempts a running sequence: host memory keeps what it has computed, where there is room and where that is
    /// cheaper than to compute it again. Blocks that it shares stay with the others.
    fn take_blocks(&mut self, index: usize) {
        let victim = &mut self.running[index];
        let num_shared = victim
            .block_table
            .partition_point(|&block| self.pool.ref_count(block) > 1);
        let BlockPool { host, events, .. } = &mut self.pool;
        victim.swapped = host.keep(
            &victim.block_table,
            num_shared,
            victim.num_computed_tokens,
            events,
        );
        self.pool.release_table(&mut victim.block_table);
        self.stats.preemptions += 1;
        self.stats.swaps += u64::from(victim.swapped.is_some());
    }

    pub(super) fn take_out_preempted(&mut self) {
        let victims = self
            .running
            .extract_if(.., |running| running.is_preempted());
        for running in victims {
            self.free_slots.push(running.slot);
            let preempted = Preempted {
                sequence: running.sequence,
                swapped: running.swapped,
            };
            self.preempted.insert(running.seniority, preempted);
        }
    }

    /// Starts preempted sequences again, by seniority; `false` where one has to wait for blocks or budget.
    pub(super) fn resume_preempted(&mut self, draft: &mut Draft) -> bool {
        while draft.budget > 0 {
            let Some((&seniority, Preempted { sequence, .. })) = self.preempted.first_key_value()
            else {
                return true;
            };
            let chain = sequence.matchable(self.config.block_size as usize);
            self.pool.match_prefix(chain, &mut self.matched);
            self.pool.pin_host_hits(chain, &self.matched);
            let num_tokens = sequence.num_tokens();
            let Some(seat) = self.take_seat(num_tokens) else {
                return false;
            };
            if let Some(preempted) = self.preempted.remove(&seniority) {
                self.resume(preempted, seniority, seat, draft);
            }
        }
        self.preempted.is_empty()
    }

    fn resume(&mut self, preempted: Preempted, seniority: u64, seat: Seat, draft: &mut Draft) {
        let num_copied = self.copy_host_hits(&preempted.sequence, &seat.block_table);
        let num_matched = self.matched.len() + num_copied;
        let restored = preempted.swapped.and_then(|swapped| {
            self.pool
                .host
                .restore(swapped, &seat.block_table, num_matched)
        });
        let num_computed_tokens = restored.unwrap_or(num_matched * self.block_size());
        let index = self.start(preempted.sequence, seniority, seat, draft);
        self.running[index].num_computed_tokens = num_computed_tokens;
        self.schedule_chunk(index, draft);
    }
}
