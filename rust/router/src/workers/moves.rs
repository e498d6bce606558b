//! KV that comes to a sequence from another worker: both are told, and what becomes of it is counted.
//!
//! The request's own way does not change: one sequence on one worker gives all tokens, and computes for itself what does
//! not come. So nothing here can fail a request. In a *fetch* the worker reads what another one holds. In a *split* another
//! worker, the *helper*, computes the prompt in a sequence of its own, which draws no token; it ends with the request's
//! sequence, or when that has its first token.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use orchestra_core::TokenId;
use orchestra_proto::v1;
use parking_lot::Mutex;

use super::{
    Placement, Workers,
    queue::{MoveFrom, Reserved, ToMove},
    session::Session,
    sink::Sink,
};
use crate::{
    metrics::{KvMoveMetrics, MoveKind, MoveOutcome},
    observe::KvMove,
};

/// Workers tell transfers apart by number, also where several routers make them: so each router begins elsewhere.
pub(super) fn first_transfer_id() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(1, |since| since.as_nanos() as u64)
}

/// Who gives KV to a placed sequence.
pub(crate) struct Giver {
    session: Arc<Session>,
    /// Room there for a prompt that it is to compute; `None` where it holds the blocks.
    reserved: Option<Reserved>,
    num_blocks: u32,
    /// How long the sequence's worker waits. A giver that fails, dies or hangs ends the wait at once; this is for one that
    /// stays and does nothing.
    wait: Duration,
    transfer_id: u64,
    metrics: KvMoveMetrics,
}

impl Giver {
    /// Resolves who is to give. `None` where that one has gone: the sequence's worker computes for itself.
    pub(super) fn find(workers: &Workers, moves: ToMove) -> Option<Self> {
        let (worker, reserved, num_blocks) = match moves.from {
            MoveFrom::Fetch(fetch) => (fetch.source, None, fetch.num_blocks),
            MoveFrom::Prefill(reserved, num_blocks) => {
                (reserved.worker(), Some(*reserved), num_blocks)
            }
        };
        let session = workers.pool.lock().sessions.get(&worker).cloned();
        Some(Self {
            session: session?,
            reserved,
            num_blocks,
            wait: moves.wait,
            transfer_id: workers.next_transfer.fetch_add(1, Ordering::Relaxed),
            metrics: workers.kv_moves.clone(),
        })
    }

    const fn kind(&self) -> MoveKind {
        match self.reserved {
            None => MoveKind::Fetch,
            Some(_) => MoveKind::Split,
        }
    }

    /// Tells the sequence's worker in its start, and a helper in one of its own. `None` where that cannot be: the start is left
    /// as it was. The helper hears first, so that it knows what the other one will ask it about.
    pub(super) fn begin(
        self,
        session: &Arc<Session>,
        start: &mut v1::StartSequence,
    ) -> Option<Moving> {
        let kind = self.kind();
        let Self {
            session: giver,
            reserved,
            num_blocks,
            wait,
            transfer_id,
            metrics,
        } = self;
        let (from, to) = (giver.kv.as_ref()?, session.kv.as_ref()?);
        let timeout_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX).max(1);
        let helper = match reserved {
            None => None,
            Some(reserved) => {
                let target = v1::KvTarget {
                    peer: Some(to.peer().clone()),
                    transfer_id,
                    num_blocks,
                    timeout_ms,
                };
                let link = Arc::new(Link::new(&giver, session));
                let sink = PrefillSink {
                    link: Arc::clone(&link),
                    reserved,
                };
                let sequence = giver.start_prefill(prefill_start(start, target), sink)?;
                Some((sequence, link))
            }
        };
        start.kv_source = Some(v1::KvSource {
            peer: Some(from.peer().clone()),
            transfer_id,
            num_blocks,
            is_pushed: helper.is_some(),
            timeout_ms,
        });
        Some(Moving {
            kind,
            bytes_per_block: to.exchange().bytes_per_block,
            block_size: session.spec.block_size,
            helper,
            metrics,
            outcome: None,
        })
    }
}

/// The start of a sequence that computes the prompt of another one, output so far included.
fn prefill_start(start: &v1::StartSequence, target: v1::KvTarget) -> v1::StartSequence {
    let token_ids: Vec<TokenId> = [&start.prompt_token_ids[..], &start.output_token_ids].concat();
    // What it would take to hold one token, which it does not draw.
    let sampling = start.sampling.clone().map(|sampling| v1::SamplingParams {
        max_tokens: Some(1),
        logprobs: None,
        ..sampling
    });
    v1::StartSequence {
        prompt_token_ids: token_ids,
        output_token_ids: Vec::new(),
        sampling,
        cache_salt: start.cache_salt.clone(),
        kv_target: Some(target),
        ..v1::StartSequence::default()
    }
}

impl Placement {
    /// The KV that is to come to it, for an operator.
    pub(crate) fn kv_move(&self) -> Option<KvMove> {
        let giver = self.giver.as_ref()?;
        Some(KvMove {
            kind: giver.kind().as_str(),
            from: giver.session.spec.name.clone(),
            blocks: giver.num_blocks,
        })
    }
}

/// Between a helper and the worker that its blocks are for. What the one has to say of its failure waits until the other
/// one has its start, or it would know of nothing that failed.
struct Link {
    helper: String,
    target: Arc<Session>,
    news: Mutex<News>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// The target has not been told to start.
    Early,
    /// It has.
    Told,
    /// The helper failed before that.
    Failed,
}

impl Link {
    fn new(helper: &Session, target: &Arc<Session>) -> Self {
        Self {
            helper: helper.spec.name.clone(),
            target: Arc::clone(target),
            news: Mutex::new(News::Early),
        }
    }

    /// The target was told to start.
    fn told(&self) {
        let before = std::mem::replace(&mut *self.news.lock(), News::Told);
        if before == News::Failed {
            self.target.cannot_reach(&self.helper);
        }
    }

    fn failed(&self) {
        let mut news = self.news.lock();
        if *news == News::Told {
            drop(news);
            self.target.cannot_reach(&self.helper);
        } else {
            *news = News::Failed;
        }
    }
}

/// Where a helper's sequence ends.
pub(super) struct PrefillSink {
    link: Arc<Link>,
    /// Room on the helper.
    reserved: Reserved,
}

impl fmt::Debug for PrefillSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrefillSink")
            .field("helper", &self.link.helper)
            .finish_non_exhaustive()
    }
}

impl PrefillSink {
    /// Every block is computed and on its way.
    pub(super) fn done(self) {
        self.reserved.prefill().done();
    }

    /// No more will come; who waits for them hears at once.
    pub(super) fn failed(self) {
        self.link.failed();
    }
}

/// A helper's sequence. Dropping it ends it there and gives its room back.
struct PrefillSequence {
    session: Arc<Session>,
    sequence_id: u64,
}

impl Drop for PrefillSequence {
    fn drop(&mut self) {
        self.session.end(self.sequence_id);
    }
}

impl Session {
    /// Starts a helper's sequence; `None` where the worker is gone or takes no work.
    fn start_prefill(
        self: &Arc<Self>,
        start: v1::StartSequence,
        sink: PrefillSink,
    ) -> Option<PrefillSequence> {
        let sequence_id = self.start(start, Sink::Prefill(Box::new(sink)))?;
        Some(PrefillSequence {
            session: Arc::clone(self),
            sequence_id,
        })
    }
}

/// KV on its way to a running sequence. On drop a helper ends, and what came of it is counted.
pub(crate) struct Moving {
    kind: MoveKind,
    bytes_per_block: u64,
    block_size: u32,
    helper: Option<(PrefillSequence, Arc<Link>)>,
    metrics: KvMoveMetrics,
    /// With the bytes that came; `None` before the first token.
    outcome: Option<(MoveOutcome, u64)>,
}

impl Moving {
    /// The sequence's worker has its start.
    pub(super) fn told(&self) {
        if let Some((_, link)) = &self.helper {
            link.told();
        }
    }

    /// The first token came, and of the prompt so many tokens' KV from another worker.
    pub(super) fn arrived(&mut self, num_tokens: u32) {
        let num_blocks = num_tokens.div_ceil(self.block_size.max(1));
        let bytes = u64::from(num_blocks).saturating_mul(self.bytes_per_block);
        let outcome = match num_tokens {
            0 => MoveOutcome::Computed,
            _ => MoveOutcome::Moved,
        };
        self.outcome = Some((outcome, bytes));
    }

    /// Whether it reads what another worker holds.
    pub(super) fn is_fetch(&self) -> bool {
        self.kind == MoveKind::Fetch
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        let (outcome, bytes) = self.outcome.unwrap_or((MoveOutcome::Abandoned, 0));
        self.metrics.ended(self.kind, outcome, bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll, Waker},
    };

    use futures_core::Stream as _;
    use orchestra_core::scheduler::{Scheduler, SchedulerConfig, WorkerSpec};
    use orchestra_proto::v1::router_message::Message;

    use super::*;
    use crate::workers::{
        hello::Hello,
        outbox::{Outbox, OutboxStream},
    };

    fn session(name: &str) -> (Arc<Session>, OutboxStream) {
        let hello = v1::WorkerHello {
            worker_id: name.to_owned(),
            model: "m".to_owned(),
            block_size: 16,
            num_blocks: 4,
            max_num_seqs: 1,
            max_model_len: 64,
            model_files_digest: "d".to_owned(),
            vocab_size: 10,
            ..v1::WorkerHello::default()
        };
        let hello = Hello::from_wire(hello).unwrap();
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        let worker = scheduler
            .add_worker(WorkerSpec::clone(&hello.spec))
            .unwrap();
        let (outbox, stream) = Outbox::new();
        (Arc::new(Session::new(worker, hello, outbox)), stream)
    }

    /// Whether the worker was told that its peer will not come.
    fn was_told(stream: &mut OutboxStream) -> bool {
        match Pin::new(stream).poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Some(Ok(message))) => {
                matches!(message.message, Some(Message::FromPeer(it)) if it.is_undeliverable)
            }
            _ => false,
        }
    }

    #[test]
    fn a_failure_is_told_after_the_start_and_once() {
        for is_early in [true, false] {
            let ((helper, _), (target, mut stream)) = (session("p"), session("d"));
            let link = Link::new(&helper, &target);
            if is_early {
                link.failed();
                assert!(!was_told(&mut stream), "it knows of nothing yet");
                link.told();
            } else {
                link.told();
                assert!(!was_told(&mut stream), "nothing has failed");
                link.failed();
            }
            assert!(was_told(&mut stream));
            assert!(!was_told(&mut stream));
        }
    }
}
