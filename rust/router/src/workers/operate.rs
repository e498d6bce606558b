//! What an operator does with workers: looks at them, holds work back from one, lets one go.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde::Serialize;

use super::{Pool, Workers, session::Session};

/// Names that may be held back at once; they stay held back when their worker goes and comes again.
const HELD_BACK_MAX: usize = 4096;
/// How often a worker that is to go is looked at for sequences that still run.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// Whether a worker takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WorkerState {
    /// It does.
    Ready,
    /// It said itself that it takes no more.
    Draining,
    /// An operator holds work back from it.
    HeldBack,
}

/// One worker as an operator sees it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WorkerView {
    /// Its name.
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) state: WorkerState,
    /// `attached`: an Orchestra worker that dialled in.
    pub(crate) source: &'static str,
    pub(crate) weights_epoch: u64,
    /// `both`, `prefill` or `decode`.
    pub(crate) role: &'static str,
    /// Whether KV can move to and from it.
    pub(crate) exchanges_kv: bool,
    /// Sequences of this router that run there.
    pub(crate) sequences: usize,
    /// Sequences that run or wait there, those of other routers included.
    pub(crate) batch: u32,
    /// Prompt tokens that wait to be computed.
    pub(crate) queued_prefill_tokens: u64,
    pub(crate) kv_blocks: u32,
    pub(crate) kv_blocks_free: u64,
    /// Blocks of its prefix cache that this router knows of.
    pub(crate) cached_blocks: u32,
}

/// Why an operator's wish was not met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OperateError {
    #[error("there is no worker of this name")]
    Unknown,
    #[error("{HELD_BACK_MAX} workers are held back, which is the limit")]
    TooMany,
}

impl Workers {
    /// The attached workers, in the order they came.
    pub(crate) fn list(&self) -> Vec<WorkerView> {
        let pool = self.pool.lock();
        let view = |(id, snapshot): (_, orchestra_core::scheduler::WorkerSnapshot)| {
            let session = pool.sessions.get(&id)?;
            let spec = &snapshot.spec;
            Some(WorkerView {
                id: spec.name.clone(),
                model: spec.model.clone(),
                state: pool.state_of(session),
                source: "attached",
                weights_epoch: spec.weights_epoch,
                role: spec.role.as_str(),
                exchanges_kv: spec.kv_exchange.is_some(),
                sequences: session.num_sequences(),
                batch: snapshot.batch,
                queued_prefill_tokens: snapshot.queued_prefill_tokens,
                kv_blocks: spec.num_blocks,
                kv_blocks_free: snapshot.kv_blocks_free,
                cached_blocks: snapshot.num_cached_blocks,
            })
        };
        pool.scheduler.workers().filter_map(view).collect()
    }

    /// Holds new requests back from a worker, or no longer. That outlasts its own reports, and its coming again.
    pub(crate) fn hold_back(
        self: &Arc<Self>,
        name: &str,
        is_held_back: bool,
    ) -> Result<(), OperateError> {
        self.change(|pool| pool.hold_back(name, is_held_back))?;
        self.arrivals.announce();
        Ok(())
    }

    /// Closes a worker's stream, after its sequences have ended or at once. It stays held back, so a worker process
    /// that still runs and attaches again gets no work.
    pub(crate) fn removal(
        self: &Arc<Self>,
        name: &str,
        is_at_once: bool,
    ) -> Result<impl Future<Output = ()> + Send + 'static, OperateError> {
        self.hold_back(name, true)?;
        let session = self.pool.lock().session_of(name);
        let session = session.ok_or(OperateError::Unknown)?;
        if is_at_once {
            session.removed.cancel();
        }
        Ok(async move {
            while !is_at_once && session.num_sequences() > 0 {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
            session.removed.cancel();
        })
    }
}

impl Pool {
    fn hold_back(&mut self, name: &str, is_held_back: bool) -> Result<(), OperateError> {
        let session = self.session_of(name);
        if is_held_back {
            let session = session.ok_or(OperateError::Unknown)?;
            if self.held_back.len() >= HELD_BACK_MAX && !self.held_back.contains(name) {
                return Err(OperateError::TooMany);
            }
            self.held_back.insert(name.to_owned());
            self.show_draining(&session);
            return Ok(());
        }
        let was_held_back = self.held_back.remove(name);
        match session {
            Some(session) => self.show_draining(&session),
            None if was_held_back => {}
            None => return Err(OperateError::Unknown),
        }
        Ok(())
    }

    pub(super) fn session_of(&self, name: &str) -> Option<Arc<Session>> {
        let worker = self.scheduler.worker_by_name(name)?;
        self.sessions.get(&worker).cloned()
    }

    fn state_of(&self, session: &Session) -> WorkerState {
        if self.held_back.contains(&session.spec.name) {
            WorkerState::HeldBack
        } else if session.is_draining.load(Ordering::Relaxed) {
            WorkerState::Draining
        } else {
            WorkerState::Ready
        }
    }

    /// Whether requests may be placed there.
    pub(super) fn takes_requests(&self, session: &Session) -> bool {
        self.state_of(session) == WorkerState::Ready
    }

    /// Tells the scheduler whether the worker takes requests: its own word and the operator's together.
    pub(super) fn show_draining(&mut self, session: &Session) {
        let is_draining = !self.takes_requests(session);
        self.scheduler.set_draining(session.worker, is_draining);
    }
}
