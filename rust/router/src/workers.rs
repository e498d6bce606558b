//! The workers attached to this router: who they are, what runs on them, and the scheduler that chooses among them.
//!
//! A worker is its stream: [`gateway`] accepts it and listens, [`session`] is the stream as requests see it,
//! [`outbox`] what is on its way to the worker, [`watchdog`] finds workers that went quiet.

mod explain;
pub mod gateway;
mod hello;
mod operate;
mod outbox;
pub(crate) mod session;
mod watchdog;

use std::sync::{Arc, atomic::Ordering};

use orchestra_core::{
    BlockHash, Time,
    scheduler::{
        ReservationId, RouteRequest, Scheduler, SchedulerConfig, SchedulerError, WorkerId,
        WorkerLoad, WorkerSpec,
    },
    step::KvEvent,
};
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::watch;

pub use self::gateway::gateway_service;
pub(crate) use self::operate::{OperateError, WorkerView};
use self::{hello::Hello, outbox::Outbox, session::Session};
use crate::models::{ModelMismatch, ModelText, Models};

/// Why a worker was not taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error(transparent)]
    Refused(#[from] SchedulerError),
    #[error(transparent)]
    Mismatch(#[from] ModelMismatch),
}

/// The attached workers. The lock is held for a decision, never across a wait.
pub(crate) struct Workers {
    pool: Mutex<Pool>,
    /// Told when there may be a worker where there was none.
    arrivals: watch::Sender<()>,
}

struct Pool {
    scheduler: Scheduler,
    sessions: FxHashMap<WorkerId, Arc<Session>>,
    /// Names of workers that an operator gives no work.
    held_back: FxHashSet<String>,
}

impl Workers {
    pub(crate) fn new() -> Arc<Self> {
        let Ok(scheduler) = Scheduler::new(SchedulerConfig::default()) else {
            unreachable!("the default configuration is valid")
        };
        let pool = Mutex::new(Pool {
            scheduler,
            sessions: FxHashMap::default(),
            held_back: FxHashSet::default(),
        });
        Arc::new(Self {
            pool,
            arrivals: watch::Sender::new(()),
        })
    }

    /// Takes a worker in. A worker of the same name that is still here is let go first: it is the same one, back
    /// before its old stream was noticed to be dead.
    pub(crate) fn attach(
        &self,
        models: &Models,
        hello: Hello,
        text: Arc<ModelText>,
        outbox: Arc<Outbox>,
    ) -> Result<Arc<Session>, AttachError> {
        let mut pool = self.pool.lock();
        let replaced = pool.scheduler.worker_by_name(&hello.spec.name);
        let replaced = replaced.and_then(|id| pool.remove(models, id));
        let attached = pool.add(models, hello, text, outbox);
        drop(pool);
        if let Some(session) = replaced {
            session.replace();
        }
        self.arrivals.send_replace(());
        attached
    }

    /// Lets a worker go; its sequences are told. Does nothing where it is gone already.
    pub(crate) fn detach(&self, models: &Models, session: &Session) {
        self.pool.lock().remove(models, session.worker);
        session.lose_sequences();
    }

    /// Chooses a worker and reserves room on it.
    pub(crate) fn place(
        self: &Arc<Self>,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<Placement, SchedulerError> {
        let (worker, reserved) = self.reserve(request, now)?;
        let session = self.pool.lock().sessions.get(&worker).cloned();
        let session = session.ok_or(SchedulerError::UnknownWorker)?;
        Ok(Placement { session, reserved })
    }

    /// As [`Self::place`], for a model of foreign engines: the worker is one that [`Self::add_foreign`] added.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<(WorkerId, Reserved), SchedulerError> {
        let reservation = self.pool.lock().scheduler.route(request, now)?;
        let reserved = Reserved {
            workers: Arc::clone(self),
            id: reservation.id,
            predicted_cached_tokens: reservation.num_cached_tokens,
        };
        Ok((reservation.worker, reserved))
    }

    /// Takes a foreign engine's model in. It is chosen once it is said to be available.
    pub(crate) fn add_foreign(&self, spec: WorkerSpec) -> Result<WorkerId, SchedulerError> {
        let mut pool = self.pool.lock();
        let worker = pool.scheduler.add_worker(spec)?;
        pool.scheduler.set_draining(worker, true);
        Ok(worker)
    }

    /// Lets it go.
    pub(crate) fn remove_foreign(&self, worker: WorkerId) {
        self.pool.lock().scheduler.remove_worker(worker);
    }

    /// From now on it is chosen, or it is not.
    pub(crate) fn set_foreign_available(&self, worker: WorkerId, is_available: bool) {
        self.pool
            .lock()
            .scheduler
            .set_draining(worker, !is_available);
        if is_available {
            self.arrivals.send_replace(());
        }
    }

    pub(crate) fn apply_kv_event(
        &self,
        worker: WorkerId,
        event: &KvEvent,
    ) -> Result<(), SchedulerError> {
        self.pool.lock().scheduler.apply_kv_event(worker, event)
    }

    pub(crate) fn update_load(&self, session: &Session, load: WorkerLoad, is_draining: bool) {
        let mut pool = self.pool.lock();
        pool.scheduler.update_load(session.worker, load);
        if session.is_draining.swap(is_draining, Ordering::Relaxed) != is_draining {
            pool.show_draining(session);
            drop(pool);
            self.arrivals.send_replace(());
        }
    }

    /// Whether some worker takes new requests.
    pub(crate) fn has_available(&self) -> bool {
        let pool = self.pool.lock();
        pool.sessions
            .values()
            .any(|session| pool.takes_requests(session))
    }

    /// Changes when there may be a worker where there was none.
    pub(crate) fn arrivals(&self) -> watch::Receiver<()> {
        self.arrivals.subscribe()
    }
}

impl Pool {
    fn add(
        &mut self,
        models: &Models,
        hello: Hello,
        text: Arc<ModelText>,
        outbox: Arc<Outbox>,
    ) -> Result<Arc<Session>, AttachError> {
        let worker = self.scheduler.add_worker(hello.spec.clone())?;
        let blocks = hello.block_hashes.iter().copied().map(BlockHash).collect();
        let known = self
            .scheduler
            .apply_kv_event(worker, &KvEvent::Stored(blocks));
        let attached = known
            .map_err(AttachError::from)
            .and_then(|()| Ok(models.attach(&hello.spec.model, worker, hello.limits(), text)?));
        if let Err(error) = attached {
            self.scheduler.remove_worker(worker);
            return Err(error);
        }
        let session = Arc::new(Session::new(worker, hello.spec, hello.vocab_size, outbox));
        self.sessions.insert(worker, Arc::clone(&session));
        self.show_draining(&session);
        Ok(session)
    }

    fn remove(&mut self, models: &Models, worker: WorkerId) -> Option<Arc<Session>> {
        let session = self.sessions.remove(&worker)?;
        self.scheduler.remove_worker(worker);
        models.detach(&session.spec.model, worker);
        Some(session)
    }
}

/// A worker that was chosen for a sequence, and the room reserved on it.
pub(crate) struct Placement {
    pub(crate) session: Arc<Session>,
    pub(crate) reserved: Reserved,
}

/// Room on a worker, given back on drop.
pub(crate) struct Reserved {
    workers: Arc<Workers>,
    id: ReservationId,
    /// Prompt tokens whose KV the worker should hold.
    pub(crate) predicted_cached_tokens: u32,
}

impl Reserved {
    /// The prompt is computed: its tokens no longer queue on the worker.
    pub(crate) fn prefill_done(&self, now: Time) {
        self.workers
            .pool
            .lock()
            .scheduler
            .prefill_done(self.id, now);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.workers.pool.lock().scheduler.release(self.id);
    }
}
