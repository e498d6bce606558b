//! Giving way: a stream of class `batch` is stopped on its engine for an interactive request that waits, goes back to the
//! queue, and later goes on as a broken stream does. The client sees a pause.
//!
//! Offered are streams that could be continued on the engine that they are on, of which the client has nothing that no
//! engine takes back in, and each at most [`PAUSES_MAX`] times. Where nothing of the answer has gone out, it begins anew.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use bytes::Bytes;
use orchestra_core::scheduler::AdmissionClass;

use super::{EventStream, elsewhere::Rest};
use crate::{
    corridor::{
        pause::PAUSES_MAX,
        relay::{answer::GiveUp, events::Events, resume::Resumption, run::Reply},
    },
    engines::EngineKind,
};

/// A part of an answer that may be stopped.
pub(super) struct Offered {
    /// Tokens so far, for those who look on.
    progress: Arc<AtomicU32>,
    /// Whether the engine gives the ids of its tokens, as far as is known.
    has_token_ids: bool,
}

impl EventStream {
    /// Offers the engine's room to more urgent requests, where the request is one that gives way.
    pub(super) fn offer(&mut self) {
        self.offered = None;
        let admitted = &self.attempts.admitted;
        let is_batch = admitted.request.caller.class() == AdmissionClass::Batch;
        if !is_batch || self.num_pauses >= PAUSES_MAX || !self.is_continuable() {
            return;
        }
        if let Some(run) = &self.run {
            let prompt_tokens = admitted.request.key.len() as u32;
            let num_tokens = self.memory.num_tokens();
            self.offered = Some(Offered {
                progress: admitted
                    .held
                    .offer(&run.reserved, prompt_tokens, num_tokens),
                has_token_ids: self.has_token_ids(),
            });
            // No engine reports its load, so nobody else looks before something ends.
            admitted.state.workers.reconsider();
        }
    }

    /// What was read last was looked at, and is good or not: the stream may still be stopped, or it may not any more.
    pub(super) fn looked(&mut self, is_good: bool) {
        let Some(offered) = &mut self.offered else {
            return;
        };
        // A recount may find fewer.
        offered
            .progress
            .fetch_max(self.memory.num_tokens(), Ordering::Relaxed);
        let had_token_ids = offered.has_token_ids;
        let may_stop = is_good
            && self.broken.is_none()
            && !self.memory.is_complete()
            && self.memory.is_plain(self.attempts.admitted.request.route)
            && (had_token_ids == self.has_token_ids() || self.is_continuable());
        self.attempts.admitted.held.looked(may_stop);
        if may_stop {
            let has_token_ids = self.has_token_ids();
            if let Some(offered) = &mut self.offered {
                offered.has_token_ids = has_token_ids;
            }
        } else {
            self.offered = None;
            if let Some(run) = &self.run {
                run.reserved.withdraw();
            }
        }
    }

    /// The stream was stopped: it goes on when its turn has come. The answer is what the client gets at once, where it
    /// needs no engine.
    pub(super) async fn pause(&mut self) -> Result<Option<Bytes>, GiveUp> {
        let kind = self.kind();
        let Some(mut run) = self.run.take() else {
            return Err(GiveUp::NotContinuable);
        };
        let url = run.worker.engine.config.url.clone();
        run.stop();
        drop(run);
        // Half an event, which the next engine writes anew.
        self.events = Events::default();
        self.offered = None;
        self.num_pauses += 1;
        tracing::debug!(pauses = self.num_pauses, "request gave way");
        let admitted = &self.attempts.admitted;
        admitted.state.metrics.admission.preempted();
        admitted.request.record.paused();
        let rest = if self.has_begun {
            self.rest(kind).await?
        } else {
            Rest::All(admitted.request.body.clone())
        };
        if let Rest::Known(events) = rest {
            return Ok(Some(events));
        }
        let num_tokens = self.memory.num_tokens();
        let body_for = |engine: &_| rest.body(engine);
        match self.attempts.take_turn(num_tokens, &body_for).await? {
            Reply::Events(run) => {
                let metrics = &self.attempts.admitted.state.metrics;
                metrics.admission.resumed();
                self.go_on(run);
                Ok(None)
            }
            Reply::Whole(answer) => Err(GiveUp::Theirs(Box::new(answer), url)),
        }
    }

    /// Whether another engine of the present one's kind could go on with the answer as it is.
    fn is_continuable(&self) -> bool {
        let Some(run) = &self.run else {
            return false;
        };
        let resumption = Resumption::new(&self.attempts.admitted.request, &self.memory);
        resumption.is_some_and(|it| it.suits(&run.worker.engine.config, self.kind()))
    }

    fn kind(&self) -> EngineKind {
        let engine = self.run.as_ref().map(|run| &run.worker.engine);
        engine.map_or_else(EngineKind::default, |engine| engine.status.lock().kind)
    }

    fn has_token_ids(&self) -> bool {
        let mut choices = self.memory.choices.iter();
        choices.all(|choice| choice.token_ids.is_some())
    }
}
