//! Takes a step's result: KV that is now computed, tokens that were drawn, sequences that ended.

use super::{
    build_plan::PlanShape,
    error::StepError,
    plan::{StepOutput, TokenUpdate},
    scheduler::StepScheduler,
    sequence::Running,
};
use crate::time::Time;

/// A step whose output is due.
#[derive(Debug)]
pub(super) struct Executing {
    step_id: u64,
    planned_at: Time,
    num_decodes: usize,
    num_prefill_tokens: usize,
    wants_logprobs: bool,
    /// `[N]` the seniority of each sequence that draws a token: it may end meanwhile, and its id come again.
    samples: Vec<u64>,
    /// By seniority: whose tokens it computes, and how many.
    rows: Vec<Row>,
}

/// What a step computes of one sequence.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) seniority: u64,
    pub(super) num_tokens: usize,
}

impl Executing {
    /// A step of at most `max_rows` sequences, none of them known yet.
    pub(super) fn new(shape: &PlanShape, max_rows: usize) -> Self {
        Self {
            step_id: shape.step_id,
            planned_at: shape.planned_at,
            num_decodes: shape.num_decodes,
            num_prefill_tokens: shape.num_prefill_tokens,
            wants_logprobs: false,
            samples: Vec::with_capacity(max_rows),
            rows: Vec::with_capacity(max_rows),
        }
    }

    /// Adds the plan's next sample.
    pub(super) fn expect_token(&mut self, seniority: u64, wants_logprobs: bool) {
        self.samples.push(seniority);
        self.wants_logprobs |= wants_logprobs;
    }

    /// Takes over what the plan computes of a sequence: it is in flight from now on, and so is what it draws, where
    /// that can be planned with.
    pub(super) fn expect_computed(&mut self, running: &mut Running, plans_ahead: bool) {
        if plans_ahead && running.draws_token() {
            running.num_pending_tokens += 1;
        }
        let num_tokens = std::mem::take(&mut running.num_scheduled_tokens);
        if num_tokens > 0 {
            running.num_in_flight_tokens += num_tokens;
            let seniority = running.seniority;
            self.rows.push(Row {
                seniority,
                num_tokens,
            });
        }
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    fn check(&self, output: &StepOutput) -> Result<(), StepError> {
        let expected = self.samples.len();
        if output.step_id != self.step_id {
            return Err(StepError::WrongStep {
                expected: self.step_id,
                got: output.step_id,
            });
        }
        if output.token_ids.len() != expected {
            return Err(StepError::WrongTokenCount {
                expected,
                got: output.token_ids.len(),
            });
        }
        let may_be_empty = !self.wants_logprobs && output.logprobs.is_empty();
        if output.logprobs.len() != expected && !may_be_empty {
            return Err(StepError::WrongLogprobCount {
                expected,
                got: output.logprobs.len(),
            });
        }
        Ok(())
    }
}

impl StepScheduler {
    /// Commits the oldest step that executes: what it computed becomes reusable, drawn tokens are appended, and
    /// sequences end that draw a stop token or reach `max_tokens`. Returns the new tokens in the order of the
    /// plan's samples, less those of requests that were aborted meanwhile. On an error nothing changes, and the
    /// step's output is still due.
    pub fn update_from_output(
        &mut self,
        output: &StepOutput,
        now: Time,
    ) -> Result<Vec<TokenUpdate>, StepError> {
        let executing = self.executing.front().ok_or(StepError::NoStep {
            got: output.step_id,
        })?;
        executing.check(output)?;
        let Some(executing) = self.executing.pop_front() else {
            return Ok(Vec::new());
        };
        let began = if self.config.plans_ahead {
            // It ran behind the one before.
            executing.planned_at.max(self.committed_at)
        } else {
            executing.planned_at
        };
        self.stats.step_time = now.since(began);
        self.committed_at = now;
        let executes = !self.executing.is_empty();
        self.lateness.committed(self.stats.step_time, executes, now);
        if self.config.tpot_target_us > 0 {
            self.step_cost.observe(
                executing.num_decodes,
                executing.num_prefill_tokens,
                self.stats.step_time,
            );
        }
        self.commit_computed_tokens(&executing.rows);

        let mut updates = Vec::with_capacity(executing.samples.len());
        let mut next = 0;
        for (position, &seniority) in executing.samples.iter().enumerate() {
            // None: aborted while the step executed.
            if let Some(index) = self.running_with(seniority, next) {
                updates.push(self.append_token(index, output, position));
                next = index + 1;
            }
        }
        if updates.iter().any(|update| update.finish_reason.is_some()) {
            self.release_finished();
        }
        Ok(updates)
    }

    /// Where the sequence of this seniority runs. Most often it is the one after that of the sample before,
    /// `guess`.
    fn running_with(&self, seniority: u64, guess: usize) -> Option<usize> {
        let is_guess = self
            .running
            .get(guess)
            .is_some_and(|running| running.seniority == seniority);
        if is_guess {
            return Some(guess);
        }
        let found = self
            .running
            .binary_search_by_key(&seniority, |running| running.seniority);
        found.ok()
    }

    /// Counts the step's tokens as computed and makes blocks that are now full reusable.
    fn commit_computed_tokens(&mut self, rows: &[Row]) {
        let block_size = self.block_size();
        let mut ends_prefill = false;
        let mut next = 0;
        for row in rows {
            // None: aborted while the step executed. Nobody is preempted while a step computes its tokens.
            let Some(index) = self.running_with(row.seniority, next) else {
                continue;
            };
            next = index + 1;
            let running = &mut self.running[index];
            running.num_computed_tokens += row.num_tokens;
            running.num_in_flight_tokens -= row.num_tokens;
            // Most steps fill no block of a sequence.
            if running.num_computed_tokens < (running.num_cached_blocks + 1) * block_size {
                continue;
            }
            let num_full_blocks = running.num_computed_tokens / block_size;
            let cached = self.pool.cache_blocks(
                running.sequence.chain(num_full_blocks),
                &mut running.block_table,
                running.num_cached_blocks,
            );
            running.num_cached_blocks = cached.num_cached;
            running.num_sent_blocks = running.num_sent_blocks.min(cached.first_replaced);
            if let Some(sealed) = &mut self.sealed {
                sealed.note(running);
            }
            if let Some(prefill) = &mut running.sequence.prefill_only {
                let hold = prefill.hold.take();
                if let Some(hold) = hold.and_then(|id| self.moves.holds.get_mut(&id)) {
                    hold.follow(&running.block_table, cached.first_replaced, &mut self.pool);
                }
                running.is_finished = running.num_uncomputed_tokens() == 0;
                ends_prefill |= running.is_finished;
            }
        }
        if ends_prefill {
            let ended = self.running.iter().filter(|running| running.is_finished);
            self.moves
                .prefilled
                .extend(ended.map(|running| running.sequence.id));
            self.release_finished();
        }
    }

    fn append_token(&mut self, index: usize, output: &StepOutput, position: usize) -> TokenUpdate {
        let block_size = self.block_size();
        let running = &mut self.running[index];
        let sequence = &mut running.sequence;
        let token_id = output.token_ids[position];
        sequence.token_ids.push(token_id);
        running.num_pending_tokens = running.num_pending_tokens.saturating_sub(1);
        if self.config.enable_prefix_cache {
            sequence.hash_full_blocks(block_size, self.hash_block);
        }
        let finish_reason = sequence.finish_reason(&self.config.eos_token_ids);
        running.is_finished = finish_reason.is_some();
        let wants_logprobs = sequence.sampling.logprobs.is_some();
        let logprobs = output.logprobs.get(position).filter(|_| wants_logprobs);
        TokenUpdate {
            request_id: sequence.id,
            token_id,
            output_index: (sequence.num_tokens() - 1 - sequence.num_prompt_tokens) as u32,
            logprobs: logprobs.cloned().flatten(),
            finish_reason,
            num_cached_tokens: sequence.num_cached_tokens,
            num_fetched_tokens: sequence.num_fetched_tokens,
        }
    }

    /// Ends the sequences that have drawn their last token.
    fn release_finished(&mut self) {
        let finished: Vec<Running> = self
            .running
            .extract_if(.., |running| running.is_finished)
            .collect();
        for running in finished {
            self.release(running);
        }
    }
}
