//! One step: take inputs → schedule → hand out the plan → commit what was drawn → publish.
//!
//! The loop owns the scheduler. It runs on the thread that calls [`Agent::next_step`](crate::Agent::next_step), so
//! there is no hop between deciding a step and executing it.

mod keeping;
mod kv_link;
mod streams;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::{
    ErrorCode, RejectReason, RequestId, Time,
    step::{StepOutput, StepPlan, StepScheduler},
};
use orchestra_proto::v1;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub(crate) use self::kv_link::KvLink;
use crate::{
    admission::{Refusal, admit},
    attachment::{Attachment, AttachmentId, Command, Lost, Patience},
    config::AgentConfig,
    error::AgentError,
    load::LoadBoard,
    park,
    plan_codec::{OutputBuffers, Wanted},
};

/// Longest single wait for work; callers that ask for more get it in turns of this.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// A step that was handed out and is not committed yet.
#[derive(Debug)]
struct Outstanding {
    step_id: u64,
    wanted: Wanted,
    handed_out: Instant,
    /// Another worker waits for blocks that it fills.
    fills_blocks: bool,
}

/// Owner of the replica's scheduler.
#[derive(Debug)]
pub(crate) struct StepLoop {
    config: Arc<AgentConfig>,
    /// SHA-256 of the model files, computed once.
    model_files_digest: String,
    scheduler: StepScheduler,
    commands: mpsc::Receiver<Command>,
    attachment: Option<Attachment>,
    last_request_id: u64,
    /// In order; no more than the scheduler's `max_steps_in_flight`.
    outstanding: VecDeque<Outstanding>,
    /// When the last step was committed: from then on the next one's time counts.
    committed: Option<Instant>,
    /// Why the agent gave up, once it has.
    failure: Option<String>,
    patience: Patience,
    board: Arc<LoadBoard>,
    /// The thread that moves KV, where there is one.
    kv: Option<KvLink>,
    started: Instant,
}

impl StepLoop {
    pub(crate) fn new(
        config: Arc<AgentConfig>,
        commands: mpsc::Receiver<Command>,
        board: Arc<LoadBoard>,
        closing: CancellationToken,
        kv: Option<KvLink>,
    ) -> Result<Self, AgentError> {
        let mut scheduler =
            StepScheduler::new(config.scheduler.clone()).map_err(AgentError::InvalidConfig)?;
        if let Some(kv) = &kv {
            kv.prepare(&mut scheduler);
        }
        board.update(|stats| stats.set_scheduler(scheduler.stats()));
        Ok(Self {
            model_files_digest: config.model_files.digest(),
            scheduler,
            commands,
            attachment: None,
            last_request_id: 0,
            outstanding: VecDeque::new(),
            committed: None,
            failure: None,
            patience: Patience {
                limit: config.outbound_stall_limit,
                closing,
            },
            board,
            kv,
            started: Instant::now(),
            config,
        })
    }

    // === the corridor ===

    pub(crate) fn next_step(&mut self, timeout: Duration) -> Result<Option<StepPlan>, AgentError> {
        self.check_usable()?;
        let most = self.config.scheduler.max_steps_in_flight as usize;
        if let Some(oldest) = self.outstanding.front()
            && self.outstanding.len() >= most
        {
            return Err(AgentError::StepOutstanding(oldest.step_id));
        }
        let deadline = Instant::now() + timeout.min(WAIT_MAX);
        let mut command = None;
        loop {
            self.take_inputs(command);
            if let Some(plan) = self.schedule() {
                return Ok(Some(plan));
            }
            // Nothing executes for a while: what changed in the cache goes out now, and what was late is so no longer.
            self.send_kv_events();
            self.offer_sealed();
            let until = self.wake_time(deadline);
            command = self.wait(until)?;
            if command.is_none() && until == deadline {
                return Ok(None);
            }
        }
    }

    fn schedule(&mut self) -> Option<StepPlan> {
        let began = Instant::now();
        let plan = self.scheduler.schedule(self.now());
        self.note_scheduling(began);
        let plan = plan?;
        self.outstanding.push_back(Outstanding {
            step_id: plan.step_id,
            wanted: Wanted::new(&plan, self.config.vocab_size),
            handed_out: Instant::now(),
            fills_blocks: !plan.filled.is_empty(),
        });
        if let Some(kv) = &self.kv {
            kv.handed_out(&plan);
        }
        Some(plan)
    }

    pub(crate) fn commit_buffers(
        &mut self,
        step_id: u64,
        buffers: &OutputBuffers<'_>,
    ) -> Result<(), AgentError> {
        let output = self.outstanding(step_id)?.wanted.decode(step_id, buffers)?;
        self.commit(&output)
    }

    pub(crate) fn commit(&mut self, output: &StepOutput) -> Result<(), AgentError> {
        let outstanding = self.outstanding(output.step_id)?;
        // Steps in flight overlap; the time in which any of them is counts once.
        let alone_since = self.committed.map_or(outstanding.handed_out, |committed| {
            committed.max(outstanding.handed_out)
        });
        let executed = alone_since.elapsed();
        let fills_blocks = outstanding.fills_blocks;
        let began = Instant::now();
        let updates = self
            .scheduler
            .update_from_output(output, self.now())
            .map_err(AgentError::Step)?;
        self.outstanding.pop_front();
        self.committed = Some(Instant::now());
        self.board
            .update(|stats| stats.execute_us += micros(executed));
        self.note_scheduling(began);

        let sent = self.attachment.as_mut().map_or(Ok(()), |attachment| {
            attachment.send_updates(updates, &self.patience)
        });
        self.keep_or_detach(sent);
        if fills_blocks {
            self.tell_filled(output.step_id);
        }
        self.offer_sealed();
        self.send_kv_events();
        Ok(())
    }

    fn outstanding(&self, step_id: u64) -> Result<&Outstanding, AgentError> {
        self.check_usable()?;
        self.outstanding
            .front()
            .filter(|outstanding| outstanding.step_id == step_id)
            .ok_or(AgentError::UnknownStep(step_id))
    }

    // === inputs ===

    /// Obeys `command` and every one that waits; at most as many as the queue holds, so that a flood cannot hold up a
    /// step.
    fn take_inputs(&mut self, mut command: Option<Command>) {
        let began = Instant::now();
        for _ in 0..self.commands.max_capacity() {
            command = command.or_else(|| self.commands.try_recv().ok());
            match command.take() {
                Some(command) => self.obey(command),
                None => break,
            }
        }
        self.note_scheduling(began);
        let sent = self.attachment.as_mut().map_or(Ok(()), |attachment| {
            attachment.send_refusals(&self.patience)
        });
        self.keep_or_detach(sent);
    }

    /// Sleeps until a command comes; `None` when `deadline` has passed.
    fn wait(&mut self, deadline: Instant) -> Result<Option<Command>, AgentError> {
        let Self {
            commands, patience, ..
        } = self;
        let woken = async {
            tokio::select! {
                biased;
                () = patience.closing.cancelled() => Err(AgentError::Closed),
                command = commands.recv() => Ok(command),
            }
        };
        match park::wait_until(woken, deadline) {
            None => Ok(None),
            Some(Ok(Some(command))) => Ok(Some(command)),
            Some(Ok(None)) => {
                let failure = "the network thread has ended".to_owned();
                self.failure = Some(failure.clone());
                Err(AgentError::Failed(failure))
            }
            Some(Err(closed)) => Err(closed),
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attached(attachment) => self.attach(attachment),
            Command::Start(id, start) if self.is_current(id) => self.start(*start),
            Command::Abort(id, sequence_id) if self.is_current(id) => self.abort(sequence_id),
            Command::Detached(id) if self.is_current(id) => self.detach(Lost::Ended),
            Command::Keeper(id, peer) if self.is_current(id) => self.write_through_to(peer),
            Command::Kv(report) => self.obey_mover(report),
            // Of an attachment that was lost before.
            Command::Start(..)
            | Command::Abort(..)
            | Command::Keeper(..)
            | Command::Detached(_) => {}
        }
    }

    fn is_current(&self, id: AttachmentId) -> bool {
        self.attachment
            .as_ref()
            .is_some_and(|attachment| attachment.id == id)
    }

    fn start(&mut self, start: v1::StartSequence) {
        let Some(attachment) = &mut self.attachment else {
            return;
        };
        let sequence_id = start.sequence_id;
        // The router could not tell the outputs of the two apart, so both end.
        let refused = if let Some(running) = attachment.remove(sequence_id) {
            kv_link::abort(&mut self.scheduler, self.kv.as_mut(), running);
            Err(Refusal::new(
                ErrorCode::Internal,
                "sequence_id is in use on this stream",
            ))
        } else if self.board.read().is_draining {
            Err(RejectReason::ShuttingDown.into())
        } else {
            self.last_request_id += 1;
            let id = RequestId(self.last_request_id);
            let now = Time(micros(self.started.elapsed()));
            admit(start, id, &self.config)
                .and_then(|admitted| {
                    kv_link::add(&mut self.scheduler, self.kv.as_mut(), admitted, now)
                })
                .map(|()| attachment.insert(sequence_id, id))
        };
        if let Err(Refusal { code, message }) = refused {
            tracing::debug!(sequence_id, %code, "sequence refused");
            self.board.update(|stats| stats.refusals += 1);
            attachment.refuse(sequence_id, code, &message);
        }
    }

    fn abort(&mut self, sequence_id: u64) {
        // Unknown: it ended before the abort came.
        if let Some(request_id) = self
            .attachment
            .as_mut()
            .and_then(|attachment| attachment.remove(sequence_id))
        {
            kv_link::abort(&mut self.scheduler, self.kv.as_mut(), request_id);
        }
    }

    fn check_usable(&self) -> Result<(), AgentError> {
        if let Some(failure) = &self.failure {
            return Err(AgentError::Failed(failure.clone()));
        }
        if self.patience.closing.is_cancelled() {
            Err(AgentError::Closed)
        } else {
            Ok(())
        }
    }

    // === figures ===

    fn now(&self) -> Time {
        Time(micros(self.started.elapsed()))
    }

    fn note_scheduling(&self, began: Instant) {
        let spent = micros(began.elapsed());
        let scheduler = self.scheduler.stats();
        let unsent = self.attachment.as_ref().map_or(0, Attachment::num_unsent);
        self.board.update(|stats| {
            stats.schedule_us += spent;
            stats.commands_waiting = self.commands.len() as u32;
            stats.outbound_waiting = unsent as u32;
            stats.set_scheduler(scheduler);
        });
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
