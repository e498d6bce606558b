//! The scheduler's invariants, asserted.

use rustc_hash::FxHashSet;

use super::{
    commit::Executing,
    scheduler::StepScheduler,
    sequence::{Running, Sequence},
};
use crate::ids::BlockId;

impl StepScheduler {
    /// Asserts every invariant: for tests and simulations, since it looks at everything.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check_integrity(&self) {
        let tables: Vec<(&[BlockId], usize)> = self
            .running
            .iter()
            .map(|running| (running.block_table.as_slice(), running.num_cached_blocks))
            .chain(self.awaiting_tables())
            .collect();
        self.pool.check_integrity(&tables, &self.held_tables());
        assert!(
            self.executing.len() <= self.config.max_steps_in_flight as usize,
            "steps in flight"
        );
        for running in &self.running {
            self.check_running(running);
        }
        self.check_requests();
        self.check_slots();
        let swapped = self.preempted.values().filter_map(|it| it.swapped.as_ref());
        let taken = swapped.flat_map(|it| it.host_blocks.iter().copied());
        let taken = taken.chain(self.moves.incoming_host_blocks());
        self.pool
            .host
            .check_integrity(taken, |content| self.pool.holds_content(content));
    }

    fn awaiting_tables(&self) -> impl Iterator<Item = (&[BlockId], usize)> {
        let awaiting = self.moves.awaiting.values();
        awaiting.map(|it| (it.block_table.as_slice(), it.num_matched))
    }

    /// What is held for other workers.
    fn held_tables(&self) -> Vec<(&[BlockId], usize)> {
        let mut tables = Vec::new();
        for hold in self.moves.holds.values() {
            let is_cached = |block: &&BlockId| self.pool.hash_of(**block).is_some();
            let num_cached = hold.block_table.iter().take_while(is_cached).count();
            tables.push((hold.block_table.as_slice(), num_cached));
            tables.push((hold.loose.as_slice(), 0));
        }
        tables
    }

    fn check_running(&self, running: &Running) {
        let (id, block_size) = (running.sequence.id, self.block_size());
        let num_tokens = running.sequence.num_tokens();
        assert!(
            running.num_uncomputed_tokens() >= 1,
            "{id}: the last token is uncomputed"
        );
        assert!(
            running.num_in_flight_tokens
                <= running.num_uncomputed_tokens() + running.num_pending_tokens,
            "{id}"
        );
        let is_ahead = running.num_pending_tokens > 0;
        assert!(self.config.plans_ahead || !is_ahead, "{id}: pending tokens");
        assert_eq!(running.num_scheduled_tokens, 0, "{id}: no step is planned");
        let rows = self.executing.iter().flat_map(Executing::rows);
        let own = rows.filter(|row| row.seniority == running.seniority);
        let num_in_flight: usize = own.map(|row| row.num_tokens).sum();
        assert_eq!(running.num_in_flight_tokens, num_in_flight, "{id}");
        let num_held = running.block_table.len() * block_size;
        assert!(num_held >= running.next_position(), "{id}");
        assert!(
            running.block_table.len()
                <= (num_tokens + running.num_pending_tokens).div_ceil(block_size),
            "{id}: spare block"
        );
        assert!(
            running.num_cached_blocks * block_size <= running.num_computed_tokens,
            "{id}"
        );
        assert!(
            running.num_sent_blocks <= running.block_table.len(),
            "{id}: blocks that the runner knows"
        );
        for (block, hash) in running.block_table[..running.num_cached_blocks]
            .iter()
            .zip(&running.sequence.block_hashes)
        {
            assert_eq!(self.pool.hash_of(*block), Some(*hash), "{id}: {block}");
        }
    }

    /// Every request is in one place, no more than may have started, and the order of seniority holds.
    fn check_requests(&self) {
        let waiting: Vec<&Sequence> = self.waiting.check_integrity().collect();
        assert!(
            waiting.len() + self.moves.awaiting.len() <= self.config.max_num_waiting as usize,
            "waiting requests"
        );
        let running = self.running.iter().map(|running| &running.sequence);
        let all: Vec<&Sequence> = running
            .chain(self.preempted.values().map(|it| &it.sequence))
            .chain(waiting.iter().copied())
            .chain(self.moves.sequences())
            .collect();
        let ids: FxHashSet<_> = all.iter().map(|sequence| sequence.id).collect();
        assert_eq!(ids.len(), all.len(), "a request is in one place");
        for sequence in &all {
            self.check_hashes(sequence);
        }
        let num_started = self.running.len() + self.preempted.len();
        assert!(
            num_started <= self.config.max_num_seqs as usize,
            "started sequences"
        );
        assert!(
            self.running.is_sorted_by_key(|running| running.seniority),
            "running ones by seniority"
        );
    }

    fn check_hashes(&self, sequence: &Sequence) {
        let mut expected = Vec::new();
        if self.config.enable_prefix_cache {
            let mut parent = sequence.hash_seed.0;
            for tokens in sequence.token_ids.chunks_exact(self.block_size()) {
                expected.push((self.hash_block)(parent, tokens));
                parent = expected.last().map_or(parent, |hash| hash.0);
            }
        }
        assert_eq!(sequence.block_hashes, expected, "{}: hashes", sequence.id);
    }

    /// Each sampler slot is free or has one sequence.
    fn check_slots(&self) {
        let mut slots: Vec<u32> = self.free_slots.clone();
        slots.extend(self.running.iter().map(|running| running.slot));
        slots.sort_unstable();
        assert!(
            slots.iter().copied().eq(0..self.config.max_num_seqs),
            "slots: {slots:?}"
        );
    }
}
