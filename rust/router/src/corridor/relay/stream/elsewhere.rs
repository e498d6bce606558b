//! Where a stream goes on whose engine failed.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use orchestra_core::step::FinishReason;

use super::EventStream;
use crate::{
    corridor::relay::{
        answer::GiveUp,
        count::count_tokens,
        events::Events,
        memory::Memory,
        resume::Resumption,
        run::{Failure, Reply, Run},
        splice::{self, Splice},
    },
    engines::{EngineKind, engine::Engine},
};

/// Where a broken stream goes on.
enum Resumed {
    Elsewhere(Reply),
    /// It needs nobody: this is all that was missing.
    Ended(Bytes),
}

/// What is missing of an answer.
pub(super) enum Rest {
    /// All of it: this is the client's request.
    All(Bytes),
    Behind(Box<Resumption>),
    /// These events, which need no engine.
    Known(Bytes),
}

impl Rest {
    /// What an engine is asked for, or `None` where it has no means to go on.
    pub(super) fn body(&self, engine: &Engine) -> Option<Bytes> {
        match self {
            Self::All(body) => Some(body.clone()),
            Self::Behind(resumption) => {
                let kind = engine.status.lock().kind;
                resumption.body(&engine.config, kind)
            }
            Self::Known(_) => None,
        }
    }
}

impl EventStream {
    /// The engine's connection is closed, and the failure counted against it.
    pub(super) fn fail_run(&mut self, failure: &Failure) {
        if let Some(mut run) = self.run.take() {
            run.fail(failure);
            self.attempts.exclude(run.worker_id());
        }
        self.events = Events::default();
    }

    /// The engine failed in mid-stream: another takes over, or the request is given up. The answer is what the client gets
    /// at once, where it needs no other engine.
    pub(super) async fn go_on_elsewhere(
        &mut self,
        failure: Failure,
    ) -> Result<Option<Bytes>, GiveUp> {
        let Some(worker) = self.run.as_ref().map(|run| Arc::clone(&run.worker)) else {
            return Err(GiveUp::NotContinuable);
        };
        self.fail_run(&failure);
        let reply = if self.has_begun {
            let kind = worker.engine.status.lock().kind;
            let resumed = self.resume(kind).await;
            let outcome = match &resumed {
                Ok(_) => "continued",
                Err(GiveUp::NotContinuable) => "not_continuable",
                Err(_) => "failed",
            };
            self.attempts
                .admitted
                .state
                .metrics
                .engines
                .replayed(outcome);
            match resumed? {
                Resumed::Ended(events) => return Ok(Some(events)),
                Resumed::Elsewhere(reply) => reply,
            }
        } else {
            let url = worker.engine.config.url.clone();
            self.attempts.failed(failure, worker.id, url)?;
            self.memory = Memory::new(self.attempts.admitted.request.checked.num_choices);
            self.attempts.exchange().await?
        };
        match reply {
            Reply::Events(run) => {
                self.go_on(run);
                Ok(None)
            }
            Reply::Whole(answer) => Err(GiveUp::Theirs(
                Box::new(answer),
                worker.engine.config.url.clone(),
            )),
        }
    }

    /// The stream goes on with what this engine sends.
    pub(super) fn go_on(&mut self, mut run: Run) {
        run.begins_behind(self.memory.num_tokens());
        let limits = &self.attempts.admitted.state.engines.limits;
        self.silence.begin(limits.ttft_timeout);
        self.run = Some(run);
        self.offer();
    }

    /// Sends the request on to another engine, with what the client has of the answer.
    async fn resume(&mut self, kind: EngineKind) -> Result<Resumed, GiveUp> {
        let rest = self.rest(kind).await?;
        if let Rest::Known(events) = rest {
            return Ok(Resumed::Ended(events));
        }
        let reply = self.attempts.resume(&|engine| rest.body(engine)).await?;
        Ok(Resumed::Elsewhere(reply))
    }

    /// What is missing of an answer of which the client has a part, and was written by an engine of this kind. The next
    /// events are spliced on to that part.
    pub(super) async fn rest(&mut self, kind: EngineKind) -> Result<Rest, GiveUp> {
        let request = &self.attempts.admitted.request;
        if self.memory.is_empty() {
            // Also where there are several choices: the other engine begins anew, and only the names stay.
            self.splice = Some(Splice::new(request.route, &self.memory, &[]));
            return Ok(Rest::All(request.body.clone()));
        }
        self.count_tokens().await;
        let request = &self.attempts.admitted.request;
        let resumption = Resumption::new(request, &self.memory).ok_or(GiveUp::NotContinuable)?;
        self.splice = Some(Splice::new(request.route, &self.memory, &resumption.stop));
        if resumption.tokens_left(kind) == Some(0) {
            return Ok(Rest::Known(self.end_at_limit()));
        }
        self.memory.begin_part();
        Ok(Rest::Behind(Box::new(resumption)))
    }

    /// Counts the tokens of the answer, where it matters how many there were.
    async fn count_tokens(&mut self) {
        let [choice] = &self.memory.choices[..] else {
            return;
        };
        if choice.num_guessed > 0
            && let Some(count) = count_tokens(&self.attempts.admitted, &choice.text).await
        {
            // Each piece with text had a token at least.
            self.memory.recount(count.max(choice.num_tokens));
        }
    }

    /// The engine failed between the last token that there may be and the words that it was the last.
    fn end_at_limit(&mut self) -> Bytes {
        let mut events = BytesMut::new();
        if let Some(splice) = &self.splice {
            splice::write(&splice.last_event("length"), &mut events);
        }
        let metrics = &self.attempts.admitted.state.metrics;
        self.memory.finish(FinishReason::Length, metrics);
        self.owes_usage = true;
        events.extend_from_slice(&self.complete());
        events.freeze()
    }
}
