//! How the work is divided among the steps in flight, so that the stages of a pipeline have like amounts of it.
//!
//! With `d` steps in flight a step takes at most one `d`-th of what there is: of the sequences that decode, those in
//! flight counted too, and of the prefill tokens that are not computed. A sequence is in one step at a time while it
//! decodes, since its next token is not drawn; the chunks of a prompt may follow each other through the stages, each
//! finding the KV of the one before. So groups of decodes take turns, and whoever is not in flight when a group has
//! become too small fills it up. Micro-batches in a pipeline: Narayanan et al., "`PipeDream`", 2019, for training;
//! Agrawal et al., "Sarathi-Serve", 2024, for why unequal ones leave bubbles in inference.
//!
//! Where steps are planned ahead (`plans_ahead`) there is one stage, which is to find its next step when it is through
//! with one. Nothing is divided: every step has everybody.

use super::scheduler::StepScheduler;

impl StepScheduler {
    /// Most sequences that decode in the step being planned.
    pub(super) fn decode_share(&self) -> usize {
        match self.num_shares() {
            1 => usize::MAX,
            depth => {
                let decoding = self.running.iter().filter(|it| it.is_past_prefill());
                decoding.count().div_ceil(depth)
            }
        }
    }

    /// Most prefill tokens of the step being planned.
    pub(super) fn prefill_share(&self) -> usize {
        match self.num_shares() {
            1 => usize::MAX,
            depth => {
                let share = self.stats().queued_prefill_tokens.div_ceil(depth as u64) as usize;
                share.max(self.config.min_prefill_tokens as usize)
            }
        }
    }

    /// Into how many parts the work is divided. Steps that are planned ahead have all of it.
    fn num_shares(&self) -> usize {
        if self.config.plans_ahead {
            1
        } else {
            self.config.max_steps_in_flight as usize
        }
    }

    /// Begins the list of what is not to be computed twice with the blocks that steps in flight complete.
    pub(super) fn note_prefixes_in_flight(&mut self) {
        self.in_flight_prefixes.clear();
        if self.executing.is_empty() {
            return;
        }
        let block_size = self.block_size();
        for running in self.running.iter().filter(|it| it.is_in_flight()) {
            // What host memory gives is copied by the same steps.
            let first = running.num_cached_blocks;
            let end = running.next_position().div_ceil(block_size);
            let hashes = running.sequence.chain(end).hashes;
            self.in_flight_prefixes.extend(hashes.iter().skip(first));
        }
    }
}
