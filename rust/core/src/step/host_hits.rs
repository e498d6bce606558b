//! What a starting sequence gets from host memory instead of computing it.

use super::{scheduler::StepScheduler, sequence::Sequence};
use crate::ids::BlockId;

impl StepScheduler {
    /// Has the next plan copy what was found in host memory behind the matched blocks into the table, and returns how
    /// many blocks that are.
    ///
    /// They are the sequence's own until its first step commits: only then are they certain to hold their KV, and
    /// become reusable as if they had been computed. Whoever needs the same ones waits for that, as for computed ones.
    pub(super) fn copy_host_hits(&mut self, sequence: &Sequence, block_table: &[BlockId]) -> usize {
        let hits = self.pool.host.take_hits();
        let first = self.matched.len();
        for (&block, &host_block) in block_table[first..].iter().zip(&hits) {
            self.pool.host.copy_in(block, host_block);
        }
        let chain = sequence.matchable(self.block_size());
        let hashes = &chain.hashes[first..first + hits.len()];
        self.in_flight_prefixes.extend(hashes);
        self.stats.host_hit_tokens += (hits.len() * self.block_size()) as u64;
        hits.len()
    }
}
