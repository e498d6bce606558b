//! The step loop and the thread that moves KV: which sequences take or give some, and what becomes of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_core::{
    ErrorCode, RequestId, Time,
    step::{HoldId, Request, StepPlan, StepScheduler},
};
use orchestra_proto::v1;
use rustc_hash::{FxHashMap, FxHashSet};

use super::{StepLoop, keeping};
use crate::{
    admission::{Admitted, Refusal},
    attachment::Attachment,
    kv::{
        Inbox, Order, PushOrder, Report, TakeOrder,
        pool::{KvPool, LEASE_MAX},
    },
};

/// The step loop's end.
pub(crate) struct KvLink {
    pub(super) pool: Arc<KvPool>,
    pub(super) inbox: Arc<Inbox>,
    /// Tokens per block.
    pub(super) block_size: u32,
    /// Who awaits what, until it has arrived or failed.
    taking: FxHashMap<HoldId, RequestId>,
    /// Sequences that are computed for other workers.
    pushing: FxHashSet<RequestId>,
    /// Who keeps copies of the cache.
    pub(super) keeper: Option<String>,
    /// Chains that it was offered and has not read.
    pub(super) num_offers: usize,
    /// When it was offered the last one.
    pub(super) offered_at: Option<Time>,
}

impl std::fmt::Debug for KvLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvLink")
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

impl KvLink {
    pub(crate) fn new(pool: Arc<KvPool>, inbox: Arc<Inbox>, block_size: u32) -> Self {
        Self {
            pool,
            inbox,
            block_size,
            taking: FxHashMap::default(),
            pushing: FxHashSet::default(),
            keeper: None,
            num_offers: 0,
            offered_at: None,
        }
    }

    /// What the hello says of it.
    pub(super) fn announcement(&self) -> v1::KvTransfer {
        self.pool.announcement().clone()
    }

    pub(super) fn attached(&self, attachment: &Attachment) {
        self.inbox.order(Order::Attached(attachment.uplink()));
    }

    /// All sequences have ended.
    pub(super) fn detached(&mut self) {
        self.taking.clear();
        self.pushing.clear();
        self.keeper = None;
        self.num_offers = 0;
        self.inbox.order(Order::Detached);
    }

    /// A step is about to run.
    pub(super) fn handed_out(&self, plan: &StepPlan) {
        for filled in &plan.filled {
            self.inbox
                .order(Order::Filled(plan.step_id, filled.clone()));
        }
    }

    fn aborted(&mut self, request_id: RequestId) {
        if self.pushing.remove(&request_id) {
            self.inbox.order(Order::PushEnded(request_id, false));
        }
        let mut taking = self.taking.iter();
        let hold = taking.find(|(_, taker)| **taker == request_id);
        if let Some(hold) = hold.map(|(&hold, _)| hold) {
            self.taking.remove(&hold);
            self.inbox.order(Order::Abandon(hold));
        }
    }

    /// Queues a request whose first blocks another worker has or computes.
    fn add_awaiting(
        &mut self,
        scheduler: &mut StepScheduler,
        request: Request,
        source: v1::KvSource,
        now: Time,
    ) -> Result<(), Refusal> {
        let (request_id, hash_seed) = (request.id, request.hash_seed);
        let mut token_ids = request.prompt_token_ids.clone();
        token_ids.extend(&request.output_token_ids);
        let timeout = timeout(source.timeout_ms);
        let awaited = scheduler.add_awaiting(request, source.num_blocks, now + timeout, now)?;
        let Some(awaited) = awaited else {
            if let Some(peer) = source.peer.filter(|_| source.is_pushed) {
                self.inbox
                    .order(Order::Decline(peer.worker_id, source.transfer_id));
            }
            return Ok(());
        };
        let num_blocks = awaited.first_block as usize + awaited.blocks.len();
        token_ids.truncate(num_blocks * self.block_size as usize);
        self.taking.insert(awaited.hold, request_id);
        self.inbox.order(Order::Take(TakeOrder {
            hold: awaited.hold,
            first_block: awaited.first_block,
            blocks: awaited.blocks,
            hash_seed,
            token_ids,
            source,
            deadline: Instant::now() + timeout,
        }));
        Ok(())
    }

    /// Queues a request whose prompt is computed for another worker.
    fn add_prefill(
        &mut self,
        scheduler: &mut StepScheduler,
        mut request: Request,
        target: v1::KvTarget,
        now: Time,
    ) -> Result<(), Refusal> {
        if target.peer.is_none() {
            return Err(Refusal::invalid("kv_target.peer is not set"));
        }
        // None is drawn; what the client may draw is the other worker's matter.
        request.sampling.max_tokens = 1;
        let request_id = request.id;
        scheduler.add_prefill(request, target.num_blocks, now)?;
        self.pushing.insert(request_id);
        self.inbox.order(Order::Push(PushOrder {
            request_id,
            deadline: Instant::now() + timeout(target.timeout_ms),
            target,
        }));
        Ok(())
    }
}

pub(super) fn timeout(timeout_ms: u32) -> Duration {
    Duration::from_millis(u64::from(timeout_ms)).min(LEASE_MAX)
}

/// Queues a request, with what is wanted of its KV. Where nothing can move, a worker that was to take some computes it.
pub(super) fn add(
    scheduler: &mut StepScheduler,
    kv: Option<&mut KvLink>,
    admitted: Admitted,
    now: Time,
) -> Result<(), Refusal> {
    let Admitted {
        request,
        source,
        target,
    } = admitted;
    match (kv, target, source) {
        (Some(kv), Some(target), _) => kv.add_prefill(scheduler, request, target, now),
        (None, Some(_), _) => {
            let message = "kv_target: no KV moves from this worker";
            Err(Refusal::new(ErrorCode::Unsupported, message))
        }
        (Some(kv), None, Some(source)) => kv.add_awaiting(scheduler, request, source, now),
        (_, None, _) => Ok(scheduler.add_request(request, now)?),
    }
}

/// Ends a request, and what moves for it.
pub(super) fn abort(scheduler: &mut StepScheduler, kv: Option<&mut KvLink>, id: RequestId) {
    scheduler.abort(id);
    if let Some(kv) = kv {
        kv.aborted(id);
    }
}

impl StepLoop {
    /// What the thread that moves KV says.
    pub(super) fn obey_mover(&mut self, report: Report) {
        let Some(kv) = &mut self.kv else { return };
        match report {
            Report::Wanted {
                number,
                hash_seed,
                token_ids,
                is_offered,
            } => {
                if is_offered && !keeping::has_spare_blocks(&self.scheduler) {
                    return kv.inbox.order(Order::NotNow(number));
                }
                let held = self.scheduler.hold_prefix(hash_seed, &token_ids, u32::MAX);
                kv.inbox.order(Order::Held(number, held));
            }
            Report::Offered(offered) => keeping::keep(&mut self.scheduler, kv, offered),
            Report::OfferEnded(unread) => {
                kv.num_offers = kv.num_offers.saturating_sub(1);
                if let Some(chain) = unread {
                    self.scheduler.return_sealed(chain);
                }
                self.offer_sealed();
            }
            Report::Arrived(hold, num_blocks) => {
                kv.taking.remove(&hold);
                self.scheduler.kv_arrived(hold, num_blocks);
            }
            Report::Failed(hold) => {
                kv.taking.remove(&hold);
                self.scheduler.kv_failed(hold);
            }
            Report::Released(hold) => {
                kv.taking.remove(&hold);
                self.scheduler.release_hold(hold);
            }
        }
    }

    /// A step is committed that filled blocks for other workers.
    pub(super) fn tell_filled(&mut self, step_id: u64) {
        let ended = self.scheduler.take_prefilled();
        let Some(kv) = &mut self.kv else { return };
        kv.inbox.progress(step_id, kv.pool.config().num_layers);
        for &request_id in &ended {
            kv.pushing.remove(&request_id);
            kv.inbox.order(Order::PushEnded(request_id, true));
        }
        let sent = self.attachment.as_mut().map_or(Ok(()), |attachment| {
            attachment.send_prefilled(&ended, &self.patience)
        });
        self.keep_or_detach(sent);
    }

    /// When to look again: at `deadline`, or earlier where a sequence then stops to await its KV.
    pub(super) fn wake_time(&self, deadline: Instant) -> Instant {
        let awaited = self.scheduler.next_deadline();
        let awaited = awaited.map(|time| self.started + Duration::from_micros(time.0));
        awaited.map_or(deadline, |awaited| deadline.min(awaited))
    }
}
