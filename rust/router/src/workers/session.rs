//! One attached worker as requests see it: where sequences are started and ended.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use orchestra_core::scheduler::{WorkerId, WorkerSpec};
use orchestra_proto::v1::{self, router_message::Message};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio_util::sync::CancellationToken;

use super::{
    Placement,
    hello::Hello,
    keepers::Keeper,
    kv_transfer::KvTransfer,
    moves::Moving,
    outbox::Outbox,
    queue::{Prefill, Reserved},
    sink::{Delivered, HelperEnd, Sink, TokenSink, Violation},
    stopping::{Progress, Stop, Stoppable},
};

/// An attached worker.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) worker: WorkerId,
    pub(crate) spec: WorkerSpec,
    pub(crate) is_draining: AtomicBool,
    /// Cancelled when a newer stream of the same worker takes over.
    pub(crate) replaced: CancellationToken,
    /// Cancelled when an operator lets the worker go.
    pub(super) removed: CancellationToken,
    /// How others reach its KV; `None` where they cannot.
    pub(super) kv: Option<KvTransfer>,
    /// Who keeps copies of its KV, where it wants that.
    pub(super) keeper: Mutex<Option<Keeper>>,
    vocab_size: u32,
    pub(super) outbox: Arc<Outbox>,
    next_sequence: AtomicU64,
    /// `None` once the worker is gone.
    sequences: Mutex<Option<FxHashMap<u64, Sink>>>,
}

impl Session {
    pub(super) fn new(worker: WorkerId, hello: Hello, outbox: Arc<Outbox>) -> Self {
        Self {
            worker,
            spec: hello.spec,
            kv: hello.kv,
            keeper: Mutex::new(None),
            is_draining: AtomicBool::new(false),
            replaced: CancellationToken::new(),
            removed: CancellationToken::new(),
            vocab_size: hello.vocab_size,
            outbox,
            next_sequence: AtomicU64::new(1),
            sequences: Mutex::new(Some(FxHashMap::default())),
        }
    }

    /// Hands each output to its sequence. Outputs of sequences that ended here a moment ago are dropped.
    pub(super) fn deliver(&self, batch: v1::TokenBatch) -> Result<(), Violation> {
        let mut ends = Vec::new();
        let delivered = self.deliver_all(batch, &mut ends);
        ends.into_iter().for_each(HelperEnd::tell);
        delivered
    }

    fn deliver_all(
        &self,
        batch: v1::TokenBatch,
        ends: &mut Vec<HelperEnd>,
    ) -> Result<(), Violation> {
        let mut sequences = self.sequences.lock();
        let Some(sequences) = sequences.as_mut() else {
            return Ok(());
        };
        for output in batch.outputs {
            let sequence_id = output.sequence_id;
            let Some(sink) = sequences.get_mut(&sequence_id) else {
                continue;
            };
            let is_done = match sink.deliver(output, self.vocab_size)? {
                Delivered::More => continue,
                Delivered::End => false,
                Delivered::HelperEnd { is_done } => is_done,
            };
            if let Some(Sink::Prefill(sink)) = sequences.remove(&sequence_id) {
                ends.push(HelperEnd { sink, is_done });
            }
        }
        Ok(())
    }

    /// Tells every sequence that the worker is gone; from now on none can be started.
    pub(super) fn lose_sequences(&self) {
        let sequences = self.sequences.lock().take().unwrap_or_default();
        sequences.into_values().for_each(Sink::lose);
    }

    /// Queues what another worker has to say; `false` where that cannot be.
    pub(super) fn push_peer(&self, message: v1::PeerMessage) -> bool {
        self.outbox.push_peer(message)
    }

    /// Starts a sequence, with an id of its own; `None` where the worker is gone or takes no work.
    pub(super) fn start(&self, mut start: v1::StartSequence, sink: Sink) -> Option<u64> {
        let sequence_id = self.next_sequence.fetch_add(1, Ordering::Relaxed);
        start.sequence_id = sequence_id;
        start.weights_epoch = self.spec.weights_epoch;
        // Registered first: the worker may answer before this function returns.
        let mut sequences = self.sequences.lock();
        let Some(all) = sequences.as_mut() else {
            // The sink goes after the lock.
            drop(sequences);
            return None;
        };
        all.insert(sequence_id, sink);
        drop(sequences);
        if self.outbox.push(Message::Start(start)) {
            return Some(sequence_id);
        }
        // Not `end`: the worker never heard of it.
        drop(self.forget(sequence_id));
        None
    }

    /// What a sequence had to be told, to be dropped under no lock.
    fn forget(&self, sequence_id: u64) -> Option<Sink> {
        self.sequences.lock().as_mut()?.remove(&sequence_id)
    }

    /// A newer stream of this worker has taken over.
    pub(super) fn replace(&self) {
        self.replaced.cancel();
        self.lose_sequences();
    }

    /// Sequences that run on the worker.
    pub(super) fn num_sequences(&self) -> usize {
        self.sequences.lock().as_ref().map_or(0, FxHashMap::len)
    }

    /// Forgets a sequence and tells the worker, unless it had ended.
    pub(super) fn end(&self, sequence_id: u64) {
        if self.forget(sequence_id).is_some() {
            self.outbox.push_abort(sequence_id);
        }
    }
}

impl Placement {
    /// Starts a sequence on the chosen worker; `sequence_id`, epoch and the ways of its KV are filled in. `None` where the
    /// worker is gone or takes no work: the room on it is given back, and the caller tries another.
    pub(crate) fn start(
        self,
        mut start: v1::StartSequence,
        sink: TokenSink,
    ) -> Option<RunningSequence> {
        let Self {
            session,
            reserved,
            giver,
        } = self;
        let progress = Progress {
            first_index: sink.next_index,
            next_index: Arc::clone(&sink.progress),
        };
        let moving = giver.and_then(|giver| giver.begin(&session, &mut start));
        let sequence_id = session.start(start, Sink::Tokens(sink))?;
        if let Some(moving) = &moving {
            moving.told();
        }
        Some(RunningSequence {
            session,
            sequence_id,
            reserved,
            progress,
            moving,
            is_prefilled: false,
        })
    }
}

/// A sequence on a worker. Dropping it ends the sequence there and gives its room back.
pub(crate) struct RunningSequence {
    session: Arc<Session>,
    sequence_id: u64,
    reserved: Reserved,
    progress: Progress,
    /// KV that comes from another worker.
    moving: Option<Moving>,
    is_prefilled: bool,
}

impl RunningSequence {
    pub(crate) fn worker(&self) -> WorkerId {
        self.session.worker
    }

    pub(crate) const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Offers its room to more urgent requests; `work` is what it belongs to, and all that stops with it.
    pub(crate) fn offer(
        &self,
        prompt_tokens: u32,
        work: Weak<dyn Stop>,
        together: Arc<[Progress]>,
    ) {
        self.reserved.offer(Stoppable {
            work,
            prompt_tokens,
            progress: self.progress.clone(),
            together,
        });
    }

    /// A token came, so the prompt is computed; with the first one there is somebody to tell, and what was to move has
    /// done so, `fetched_tokens` of the prompt, or is not wanted any more. Both are for when no lock is held.
    pub(crate) fn prefilled(&mut self, fetched_tokens: u32) -> Option<(Prefill, Option<Moving>)> {
        if std::mem::replace(&mut self.is_prefilled, true) {
            return None;
        }
        let mut moving = self.moving.take();
        if let Some(moving) = &mut moving {
            moving.arrived(fetched_tokens);
        }
        let is_fetch = moving.as_ref().is_some_and(Moving::is_fetch);
        let prefill = self.reserved.prefill();
        let prefill = prefill.with_fetched(is_fetch.then_some(fetched_tokens));
        Some((prefill, moving))
    }
}

impl Drop for RunningSequence {
    fn drop(&mut self) {
        self.session.end(self.sequence_id);
        let produced = self.progress.num_output_tokens();
        self.reserved.set_num_output_tokens(produced);
    }
}
