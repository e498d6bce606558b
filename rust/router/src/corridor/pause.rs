//! Giving way: a request of class `batch` is stopped on its worker for an interactive one, goes back to the queue with
//! its output so far, and later goes on as a replay does. The client sees a pause.
//!
//! A request of several choices stops with all of them, whichever choice's room is wanted, and waits once; each choice goes
//! on from its own tokens, the further ones placed as at first, before all that wait. A request gives way at most
//! [`PAUSES_MAX`] times: after that it runs to its end, so nobody is put off for ever. A stopped request leaves its seat too.
//! Its workers mostly still have its KV blocks cached when it comes back.

use std::sync::Arc;

use orchestra_core::scheduler::{AdmissionClass, SchedulerError};
use tokio::time::Instant;

use super::{
    choice::Choice, place::is_away, replay::Wait, stream::Running, tokenise::CheckedRequest,
};
use crate::{
    error::ApiError,
    metrics::InFlight,
    workers::{
        Placement,
        queue::{Admitted, Entered, Outcome, Reserved, Waiting},
    },
};

/// So often a request gives way.
pub(super) const PAUSES_MAX: u32 = 3;

impl Running {
    /// Offers the request's room to more urgent ones, where it is one that gives way.
    pub(super) fn offer(&self) {
        let request = &self.request;
        let is_batch = request.caller.class() == AdmissionClass::Batch;
        if is_batch && self.num_pauses < PAUSES_MAX {
            self.held.offer(request.prompt_token_ids.len() as u32);
        }
    }

    /// The request was stopped: back to the queue.
    pub(super) fn pause(&mut self) -> Result<(), ApiError> {
        if !self.held.take_stop() {
            return Ok(());
        }
        // Of a choice that began anew while the others were stopped. It is drawn again, alike.
        while self.inbox.try_recv().is_ok() {}
        self.num_pauses += 1;
        tracing::debug!(pauses = self.num_pauses, "request gave way");
        let request = Arc::clone(&self.request);
        request.state.metrics.admission.preempted();
        request.record.paused();
        for choice in &mut self.choices {
            // Where its worker was lost before, it waits for its turn instead.
            choice.wait = None;
        }
        let Some(first) = self.choices.iter().find(|choice| !choice.is_finished) else {
            return Ok(());
        };
        let token_ids = request.token_ids_with(&first.output);
        let route = request.route(&token_ids, first.output.len(), &first.excluded);
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
        let until = Instant::now() + state.settings().limits.replay_wait;
        let mut granted = outcome.map(|Admitted { reserved, seat }| {
            let running = InFlight::new(&state.metrics.requests_running);
            self.held.reseat(seat, running);
            state.metrics.admission.resumed();
            Some(reserved)
        });
        for choice in self.choices.iter_mut().filter(|choice| !choice.is_finished) {
            let placement = match &mut granted {
                Ok(first) => request.place_again(first.take(), choice),
                Err(error) => Err(error.clone()),
            };
            let started =
                placement.and_then(|placement| choice.start(&request, &self.events, placement));
            match started {
                Ok(sequence) => self.held.resume(choice.index, sequence),
                Err(error) if is_away(&error) => {
                    choice.wait = Some(Wait::until(until, request.placement_error(&error)));
                }
                Err(error) => return Err(request.placement_error(&error)),
            }
        }
        self.offer();
        self.check_patience()
    }
}

impl CheckedRequest {
    /// A worker for a choice that goes on: the one that the queue gave, else the best.
    fn place_again(
        &self,
        reserved: Option<Reserved>,
        choice: &Choice,
    ) -> Result<Placement, SchedulerError> {
        let granted = reserved.map(|reserved| self.state.workers.placement(reserved));
        match granted {
            // Its worker went in this moment.
            None | Some(Err(SchedulerError::UnknownWorker)) => {
                self.place(&choice.output, &choice.barred())
            }
            Some(placement) => placement,
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
