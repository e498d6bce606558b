//! Giving way: a request of class `batch` is stopped on its worker for an interactive one, goes back to the queue with
//! its output so far, and later goes on as a replay does. The client sees a pause.
//!
//! Only requests of one choice give way, and each at most [`PAUSES_MAX`] times: after that it runs to its end, so
//! nobody is put off for ever. A stopped request leaves its seat too. Its worker mostly still has its KV blocks cached
//! when it comes back.

use std::sync::Arc;

use orchestra_core::scheduler::{AdmissionClass, SchedulerError};
use tokio::time::Instant;

use super::{replay::Wait, stream::Running};
use crate::{
    error::ApiError,
    metrics::InFlight,
    workers::queue::{Admitted, Entered, Outcome, Waiting},
};

/// So often a request gives way.
pub(super) const PAUSES_MAX: u32 = 3;

impl Running {
    /// Offers the request's room to more urgent ones, where it is one that gives way.
    pub(super) fn offer(&self) {
        let request = &self.request;
        let is_batch = request.caller.class() == AdmissionClass::Batch;
        if let [choice] = &self.choices[..]
            && is_batch
            && choice.num_pauses < PAUSES_MAX
        {
            self.held.offer(request.prompt_token_ids.len() as u32);
        }
    }

    /// The request was stopped: back to the queue.
    pub(super) fn pause(&mut self) -> Result<(), ApiError> {
        let request = Arc::clone(&self.request);
        let choice = &mut self.choices[0];
        if choice.wait.is_some() || self.held.runs(choice.index) {
            // Its worker was lost in the same moment, and that was taken care of.
            return Ok(());
        }
        choice.num_pauses += 1;
        tracing::debug!(pauses = choice.num_pauses, "request gave way");
        request.state.metrics.admission.preempted();
        request.record.paused();
        let token_ids = request.token_ids_with(&choice.output);
        let route = request.route(&token_ids, choice.output.len(), &choice.excluded);
        match request.state.workers.rejoin(&route) {
            Ok(Entered::Waiting(waiting)) => {
                self.turn = Some(waiting);
                Ok(())
            }
            Ok(Entered::Admitted(admitted)) => self.go_on(Ok(admitted)),
            Err(error) => self.go_on(Err(error)),
        }
    }

    /// The queue has answered: the request goes on, waits for a worker to come, or ends.
    pub(super) fn go_on(&mut self, outcome: Outcome) -> Result<(), ApiError> {
        let request = Arc::clone(&self.request);
        let state = &request.state;
        let choice = &mut self.choices[0];
        let started = outcome.and_then(|Admitted { reserved, seat }| {
            let placement = match state.workers.placement(reserved) {
                // Its worker went in this moment.
                Err(SchedulerError::UnknownWorker) => {
                    request.place(&choice.output, &choice.barred())
                }
                placement => placement,
            }?;
            let sequence = choice.start(&request, &self.events, placement)?;
            Ok((sequence, seat))
        });
        match started {
            Ok((sequence, seat)) => {
                let running = InFlight::new(&state.metrics.requests_running);
                self.held.reseat(seat, running);
                self.held.resume(choice.index, sequence);
                state.metrics.admission.resumed();
                self.offer();
                Ok(())
            }
            Err(
                error @ (SchedulerError::NoWorkers { .. }
                | SchedulerError::ModelNotFound
                | SchedulerError::UnknownWorker),
            ) => {
                let until = Instant::now() + state.settings().limits.replay_wait;
                choice.wait = Some(Wait::until(until, request.placement_error(&error)));
                self.check_patience()
            }
            Err(error) => Err(request.placement_error(&error)),
        }
    }
}

/// The end of a wait in the queue; never, where there is none.
pub(super) async fn turn_of(turn: &mut Option<Waiting>) -> Outcome {
    match turn {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}
