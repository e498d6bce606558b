//! The workers attached to this router: who they are, what runs on them, and the scheduler that chooses among them.
//!
//! A worker is its stream: [`gateway`] accepts it and listens, [`session`] is the stream as requests see it,
//! [`sink`] where its tokens go, [`outbox`] what is on its way to the worker, [`watchdog`] finds workers that went quiet.
//! [`queue`] is how requests get room on them, [`stopping`] how some give it up again. [`moves`] has KV move between
//! workers, [`peers`] their messages about it, and [`keepers`] says who keeps copies of whose.

pub(crate) mod arrivals;
mod explain;
mod foreign;
pub mod gateway;
mod hello;
mod keepers;
mod kv_transfer;
mod moves;
mod operate;
mod outbox;
mod peers;
pub(crate) mod queue;
pub(crate) mod session;
pub(crate) mod sink;
pub(crate) mod stopping;
mod watchdog;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use orchestra_core::{
    BlockHash,
    scheduler::{
        ReservationId, Scheduler, SchedulerConfig, SchedulerError, TicketId, WorkerId, WorkerLoad,
    },
    step::KvEvent,
};
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::oneshot;

pub use self::gateway::gateway_service;
pub(crate) use self::operate::{OperateError, WorkerView};
use self::{
    arrivals::{Arrivals, Listener},
    hello::Hello,
    moves::Giver,
    outbox::Outbox,
    queue::{Outcome, Reserved},
    session::Session,
    stopping::Stoppable,
};
use crate::{
    clock::Clock,
    metrics::KvMoveMetrics,
    models::{ModelMismatch, ModelText, Models},
    state::CorridorLimits,
};

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
    arrivals: Arc<Arrivals>,
    clock: Clock,
    next_transfer: AtomicU64,
    kv_moves: KvMoveMetrics,
}

struct Pool {
    scheduler: Scheduler,
    sessions: FxHashMap<WorkerId, Arc<Session>>,
    /// Who hears of the end of each wait.
    waiting: FxHashMap<TicketId, oneshot::Sender<Outcome>>,
    /// Work that may be stopped for others.
    stoppable: FxHashMap<ReservationId, Stoppable>,
    /// Names of workers that an operator gives no work.
    held_back: FxHashSet<String>,
}

impl Workers {
    pub(crate) fn new(limits: &CorridorLimits, clock: Clock, kv_moves: KvMoveMetrics) -> Arc<Self> {
        let at_most = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let wait_ms = |wait: Duration| wait.as_millis().clamp(1, 60_000) as u32;
        let max_num_waiting = at_most(limits.max_queued_requests);
        let config = SchedulerConfig {
            max_num_waiting,
            max_num_waiting_per_tenant: max_num_waiting.max(1),
            refuse_hopeless: limits.refuse_hopeless,
            fetch_wait_max_ms: wait_ms(limits.fetch_wait_max),
            split_wait_max_ms: wait_ms(limits.split_wait_max),
            ..SchedulerConfig::default()
        };
        let Ok(mut scheduler) = Scheduler::new(config) else {
            unreachable!("the default configuration is valid with any queue and any such wait")
        };
        scheduler.limit_seats(at_most(limits.max_concurrent_requests));
        let pool = Mutex::new(Pool {
            scheduler,
            sessions: FxHashMap::default(),
            waiting: FxHashMap::default(),
            stoppable: FxHashMap::default(),
            held_back: FxHashSet::default(),
        });
        Arc::new(Self {
            pool,
            arrivals: Arc::default(),
            clock,
            next_transfer: AtomicU64::new(moves::first_transfer_id()),
            kv_moves,
        })
    }

    /// Takes a worker in. A worker of the same name that is still here is let go first: it is the same one, back
    /// before its old stream was noticed to be dead.
    pub(crate) fn attach(
        self: &Arc<Self>,
        models: &Models,
        hello: Hello,
        text: Arc<ModelText>,
        outbox: Arc<Outbox>,
    ) -> Result<Arc<Session>, AttachError> {
        let (replaced, attached) = self.change(|pool| {
            let replaced = pool.scheduler.worker_by_name(&hello.spec.name);
            let replaced = replaced.and_then(|id| pool.remove(models, id));
            (replaced, pool.add(models, hello, text, outbox))
        });
        if let Some(session) = replaced {
            session.replace();
        }
        self.arrivals.announce();
        attached
    }

    /// Lets a worker go; its sequences are told. Does nothing where it is gone already.
    pub(crate) fn detach(self: &Arc<Self>, models: &Models, session: &Session) {
        self.change(|pool| {
            let took_requests = pool.takes_requests(session);
            if pool.remove(models, session.worker).is_some() && took_requests {
                models.note_loss(&session.spec.model);
            }
        });
        session.lose_sequences();
    }

    /// The worker that room was reserved on. It may have gone since.
    pub(crate) fn placement(&self, mut reserved: Reserved) -> Result<Placement, SchedulerError> {
        let session = self.pool.lock().sessions.get(&reserved.worker()).cloned();
        let session = session.ok_or(SchedulerError::UnknownWorker)?;
        let moves = reserved.take_moves();
        Ok(Placement {
            session,
            reserved,
            giver: moves.and_then(|moves| Giver::find(self, moves)),
        })
    }

    pub(crate) fn apply_kv_event(
        &self,
        worker: WorkerId,
        event: &KvEvent,
    ) -> Result<(), SchedulerError> {
        self.pool.lock().scheduler.apply_kv_event(worker, event)
    }

    pub(crate) fn update_load(
        self: &Arc<Self>,
        session: &Session,
        load: WorkerLoad,
        is_draining: bool,
    ) {
        let was_draining = session.is_draining.swap(is_draining, Ordering::Relaxed);
        self.change(|pool| {
            pool.scheduler.update_load(session.worker, load);
            pool.show_draining(session);
        });
        if was_draining != is_draining {
            self.arrivals.announce();
        }
    }

    /// Whether some worker takes new requests.
    pub(crate) fn has_available(&self) -> bool {
        let pool = self.pool.lock();
        pool.sessions
            .values()
            .any(|session| pool.takes_requests(session))
    }

    /// Hears when there may be a worker where there was none.
    pub(crate) fn arrivals(&self) -> Listener {
        self.arrivals.listen()
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
        let hashes = |wire: &[u64]| wire.iter().copied().map(BlockHash).collect();
        let cached = KvEvent::Stored(hashes(&hello.block_hashes));
        let kept = KvEvent::Kept(hashes(&hello.host_block_hashes));
        let known = [cached, kept]
            .iter()
            .try_for_each(|event| self.scheduler.apply_kv_event(worker, event));
        let attached = known
            .map_err(AttachError::from)
            .and_then(|()| Ok(models.attach(&hello.spec.model, worker, hello.limits(), text)?));
        if let Err(error) = attached {
            self.scheduler.remove_worker(worker);
            return Err(error);
        }
        let session = Arc::new(Session::new(worker, hello, outbox));
        self.sessions.insert(worker, Arc::clone(&session));
        self.show_draining(&session);
        self.keepers_with(&session);
        Ok(session)
    }

    fn remove(&mut self, models: &Models, worker: WorkerId) -> Option<Arc<Session>> {
        let session = self.sessions.remove(&worker)?;
        self.scheduler.remove_worker(worker);
        models.detach(&session.spec.model, worker);
        self.keepers_without(worker);
        Some(session)
    }
}

/// A worker that was chosen for a sequence, and the room reserved on it.
pub(crate) struct Placement {
    pub(crate) session: Arc<Session>,
    pub(crate) reserved: Reserved,
    /// Who gives it KV.
    giver: Option<Giver>,
}
