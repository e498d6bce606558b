//! Plans a step: decodes, then running prefills, then requests that start.

use std::time::Duration;

use super::{
    build_plan::{PlanShape, build_plan},
    plan::{SequenceStart, StepPlan},
    scheduler::StepScheduler,
    sequence::{Running, Sequence},
};
use crate::{ids::BlockId, time::Time};

/// A step while it is being planned.
pub(super) struct Draft {
    now: Time,
    /// Tokens that may still be added.
    pub(super) budget: usize,
    num_decodes: usize,
    num_prefill_tokens: usize,
    starts: Vec<SequenceStart>,
}

/// What a sequence needs to run.
pub(super) struct Seat {
    slot: u32,
    pub(super) block_table: Vec<BlockId>,
}

impl StepScheduler {
    /// Plans the next step. `None` where nothing is left to run before a commit, or while `max_steps_in_flight`
    /// steps execute.
    ///
    /// Every plan has at least one token: the most senior request makes progress in every step (see
    /// `preempt_one`), as long as other workers leave it the blocks that it needs. With several steps in flight, in
    /// one of each `max_steps_in_flight` that follow each other; where they are planned ahead, in one of so many and
    /// one.
    pub fn schedule(&mut self, now: Time) -> Option<StepPlan> {
        if self.executing.len() >= self.config.max_steps_in_flight as usize {
            return None;
        }
        self.give_up_awaiting(now);
        self.note_prefixes_in_flight();
        let budget = self.config.max_num_batched_tokens as usize;
        let mut draft = Draft {
            now,
            budget,
            num_decodes: 0,
            num_prefill_tokens: 0,
            starts: Vec::new(),
        };
        self.schedule_decodes(&mut draft);
        self.schedule_prefills(&mut draft);
        if self.resume_preempted(&mut draft) {
            self.start_waiting(&mut draft);
        }
        self.finish_plan(draft)
    }

    /// Adds one token of each sequence that decodes, preempting where blocks run out. The budget holds
    /// them all: it is at least `max_num_seqs`.
    ///
    /// Where one finds no block nobody behind it is planned ahead: whoever is in flight cannot be preempted, and would
    /// be so for ever.
    fn schedule_decodes(&mut self, draft: &mut Draft) {
        let preemptions = self.stats.preemptions;
        let mut num_left = self.decode_share();
        let mut is_short = false;
        for index in 0..self.running.len() {
            let running = &self.running[index];
            // A victim of an earlier index has lost its place.
            if running.is_preempted() || !running.is_decode() || !running.may_draw_more() {
                continue;
            }
            if is_short && running.num_pending_tokens > 0 {
                continue;
            }
            if num_left == 0 {
                break;
            }
            num_left -= 1;
            let has_block = self.make_room_for_next_token(index);
            is_short |= !has_block;
            self.running[index].num_scheduled_tokens = usize::from(has_block);
        }
        if self.stats.preemptions > preemptions {
            self.take_out_preempted();
        }
        draft.num_decodes = self
            .running
            .iter()
            .filter(|running| running.num_scheduled_tokens > 0)
            .count();
        draft.budget -= draft.num_decodes;
        draft.budget = draft
            .budget
            .min(self.prefill_limit(draft.num_decodes))
            .min(self.prefill_share());
    }

    /// Prefill tokens with which the sequences that decode keep their time per token. Without any of them there is
    /// nothing to keep.
    fn prefill_limit(&self, num_decodes: usize) -> usize {
        let target = self.config.tpot_target_us;
        if target == 0 || num_decodes == 0 {
            return usize::MAX;
        }
        let target = Duration::from_micros(u64::from(target));
        self.step_cost
            .prefill_within(num_decodes, target)
            .max(self.config.min_prefill_tokens as usize)
    }

    /// Preempts until the sequence has a block for its next token; `false` where it is itself the victim.
    fn make_room_for_next_token(&mut self, index: usize) -> bool {
        while !self.has_block_for_next_token(index) {
            let victim = self.preempt_one();
            if victim.is_none_or(|victim| victim == index) {
                return false;
            }
        }
        true
    }

    /// Extends the block table where the next token begins a block; `false` where no block is available.
    fn has_block_for_next_token(&mut self, index: usize) -> bool {
        let block_size = self.block_size();
        let running = &mut self.running[index];
        if running.next_position() < running.block_table.len() * block_size {
            return true;
        }
        let block = self.pool.allocate();
        running.block_table.extend(block);
        block.is_some()
    }

    /// Adds the next chunk of each sequence that prefills, the senior ones first.
    fn schedule_prefills(&mut self, draft: &mut Draft) {
        if draft.num_decodes == self.running.len() {
            return;
        }
        for index in 0..self.running.len() {
            // A decode that found no block, because others hold it, waits; and so does one beyond the step's share.
            if !self.running[index].is_decode() {
                self.schedule_chunk(index, draft);
            }
        }
    }

    pub(super) fn schedule_chunk(&mut self, index: usize, draft: &mut Draft) {
        let max_chunk = match self.config.max_prefill_chunk {
            0 => usize::MAX,
            max_chunk => max_chunk as usize,
        };
        let block_size = self.block_size();
        let running = &mut self.running[index];
        let num_tokens = running
            .num_unplanned_tokens()
            .min(max_chunk)
            .min(draft.budget);
        // What keeps the blocks of a prefill for others is that of one step.
        let is_held_up = running.sequence.prefill_only.is_some() && running.is_in_flight();
        if num_tokens == 0 || is_held_up {
            return;
        }
        running.num_scheduled_tokens = num_tokens;
        draft.budget -= num_tokens;
        draft.num_prefill_tokens += num_tokens;

        let first = running.next_position() / block_size;
        let last = (running.next_position() + num_tokens - 1) / block_size;
        let hashes = running.sequence.chain(last + 1).hashes;
        self.in_flight_prefixes.extend(hashes.iter().skip(first));
    }

    /// Starts waiting requests in the queue's order, up to the first for which there are no blocks. Nobody
    /// behind that one may pass, or large requests would starve.
    ///
    /// A request whose next block another sequence computes in this very step, or in one in flight, is held back, so
    /// that it finds the block in the cache later; those behind it may pass, but its seat is kept. Being held back ends when the
    /// other makes no progress, and after `max_prefix_wait_steps` in any case.
    fn start_waiting(&mut self, draft: &mut Draft) {
        let block_size = self.block_size();
        let mut last_held = None;
        let mut num_held = 0;
        while draft.budget > 0 && self.free_slots.len() > num_held {
            let Some((place, sequence)) = self.waiting.next_after(last_held) else {
                return;
            };
            let chain = sequence.matchable(block_size);
            let next_hash = chain.hashes.get(self.pool.estimate_prefix(chain));
            if next_hash.is_some_and(|hash| self.in_flight_prefixes.contains(hash))
                && sequence.num_prefix_waits < self.config.max_prefix_wait_steps
            {
                sequence.num_prefix_waits += 1;
                last_held = Some(place);
                num_held += 1;
                continue;
            }
            self.pool.match_prefix(chain, &mut self.matched);
            self.pool.pin_host_hits(chain, &self.matched);
            let num_tokens = sequence.num_tokens();
            let Some(seat) = self.take_seat(num_tokens) else {
                return;
            };
            if let Some(sequence) = self.waiting.take(place) {
                self.start_first_time(sequence, seat, draft);
            }
        }
    }

    /// A sampler slot, and blocks for `num_tokens` that begin with the matched ones. One block for each running
    /// sequence has to remain: else the newcomer would soon be preempted, or preempt.
    pub(super) fn take_seat(&mut self, num_tokens: usize) -> Option<Seat> {
        let Some(slot) = self.free_slots.pop() else {
            self.pool.host.drop_hits();
            return None;
        };
        let len = num_tokens.div_ceil(self.block_size());
        let table = self
            .pool
            .allocate_table(&self.matched, len, self.running.len());
        let Some(block_table) = table else {
            self.free_slots.push(slot);
            self.pool.host.drop_hits();
            return None;
        };
        Some(Seat { slot, block_table })
    }

    fn start_first_time(&mut self, mut sequence: Sequence, seat: Seat, draft: &mut Draft) {
        let num_copied = self.copy_host_hits(&sequence, &seat.block_table);
        let num_hits = self.matched.len() + num_copied;
        sequence.note_cached(num_hits, self.block_size());
        self.stats.prefix_hit_tokens += u64::from(sequence.num_cached_tokens);
        self.stats.prefix_query_tokens += sequence.num_prompt_tokens as u64;
        self.stats.queue_wait = draft.now.since(sequence.arrived_at);
        let seniority = self.num_started;
        self.num_started += 1;
        let index = self.start(sequence, seniority, seat, draft);
        self.running[index].num_computed_tokens = num_hits * self.block_size();
        self.schedule_chunk(index, draft);
    }

    /// Makes a sequence a running one, and returns where it is.
    pub(super) fn start(
        &mut self,
        sequence: Sequence,
        seniority: u64,
        seat: Seat,
        draft: &mut Draft,
    ) -> usize {
        let Seat { slot, block_table } = seat;
        draft.starts.push(sequence.start_in(slot));
        let running = Running {
            sequence,
            seniority,
            slot,
            block_table,
            num_cached_blocks: self.matched.len(),
            num_sent_blocks: 0,
            num_computed_tokens: self.matched.len() * self.block_size(),
            num_in_flight_tokens: 0,
            num_pending_tokens: 0,
            num_scheduled_tokens: 0,
            swapped: None,
            is_finished: false,
        };
        let index = self
            .running
            .partition_point(|other| other.seniority < seniority);
        self.running.insert(index, running);
        index
    }

    fn finish_plan(&mut self, draft: Draft) -> Option<StepPlan> {
        if draft.num_decodes + draft.num_prefill_tokens == 0 {
            if self.executing.is_empty() {
                self.lateness.found_nothing();
            }
            return None;
        }
        self.lateness.planned(draft.now);
        self.stats.steps += 1;
        let shape = PlanShape {
            step_id: self.stats.steps,
            planned_at: draft.now,
            num_decodes: draft.num_decodes,
            num_prefill_tokens: draft.num_prefill_tokens,
        };
        let (mut plan, mut executing) =
            build_plan(&shape, &mut self.running, self.config.block_size);
        plan.starts = draft.starts;
        if draft.num_prefill_tokens > 0 {
            plan.filled = self.hold_filled();
        }
        self.pool.host.move_copies(&mut plan);
        for running in &mut self.running {
            executing.expect_computed(running, self.config.plans_ahead);
        }
        self.executing.push_back(executing);
        Some(plan)
    }
}
