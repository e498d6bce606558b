//! One stream to a router, as the step loop sees it: where outputs go, and which sequences came over it.
//!
//! The sequences live and die with the attachment, so nothing of an old stream can reach a new one.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use orchestra_core::{
    ErrorCode, RequestId,
    step::{KvEvent, TokenUpdate},
};
use orchestra_proto::v1;
use tokio::sync::mpsc::{self, WeakSender, error::TrySendError};
use tokio_util::sync::CancellationToken;

use crate::{kv::Report, outputs, park};

/// Counts the attempts to attach; never repeats in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttachmentId(pub(crate) u64);

/// What the network side tells the step loop. Commands of one attachment come in the order of its stream.
#[derive(Debug)]
pub(crate) enum Command {
    /// A router was reached: it waits for the hello.
    Attached(Attachment),
    /// A sequence to generate.
    Start(AttachmentId, Box<v1::StartSequence>),
    /// A sequence that nobody wants any more.
    Abort(AttachmentId, u64),
    /// The stream ended.
    Detached(AttachmentId),
    /// From the thread that moves KV.
    Kv(Report),
}

/// Why an attachment was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The stream ended.
    Ended,
    /// The router read too slowly.
    Stalled,
    /// The agent is closing and does not wait for a slow router.
    Closing,
    /// The engine has lost what it computed.
    StartedOver,
}

/// How long a message may wait for room, and what ends the wait before that.
#[derive(Debug)]
pub(crate) struct Patience {
    /// [`AgentConfig::outbound_stall_limit`](crate::AgentConfig::outbound_stall_limit).
    pub(crate) limit: Duration,
    /// The agent closes.
    pub(crate) closing: CancellationToken,
}

/// The step loop's end of a stream.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) id: AttachmentId,
    outbound: mpsc::Sender<v1::WorkerMessage>,
    /// Cancelled to end the stream at once, unsent messages included.
    cut: CancellationToken,
    /// Number of the last `KvEvents` message.
    kv_sequence: u64,
    requests: HashMap<u64, RequestId>,
    sequences: HashMap<RequestId, u64>,
    /// Answers that were found while taking in commands; they travel together.
    refusals: Vec<v1::SequenceOutput>,
}

impl Attachment {
    pub(crate) fn new(
        id: AttachmentId,
        outbound: mpsc::Sender<v1::WorkerMessage>,
        cut: CancellationToken,
    ) -> Self {
        Self {
            id,
            outbound,
            cut,
            kv_sequence: 0,
            requests: HashMap::new(),
            sequences: HashMap::new(),
            refusals: Vec::new(),
        }
    }

    /// Where messages go that the stream does not wait for.
    pub(crate) fn uplink(&self) -> WeakSender<v1::WorkerMessage> {
        self.outbound.downgrade()
    }

    /// The sequence that a request runs for.
    pub(crate) fn sequence_of(&self, request_id: RequestId) -> Option<u64> {
        self.sequences.get(&request_id).copied()
    }

    /// Notes that `request_id` runs for `sequence_id`.
    pub(crate) fn insert(&mut self, sequence_id: u64, request_id: RequestId) {
        self.requests.insert(sequence_id, request_id);
        self.sequences.insert(request_id, sequence_id);
    }

    /// Forgets a sequence that ended.
    pub(crate) fn remove(&mut self, sequence_id: u64) -> Option<RequestId> {
        let request_id = self.requests.remove(&sequence_id)?;
        self.sequences.remove(&request_id);
        Some(request_id)
    }

    /// Messages that the network has not taken yet.
    pub(crate) fn num_unsent(&self) -> usize {
        self.outbound.max_capacity() - self.outbound.capacity()
    }

    /// Sends what a step drew.
    pub(crate) fn send_updates(
        &mut self,
        updates: Vec<TokenUpdate>,
        patience: &Patience,
    ) -> Result<(), Lost> {
        let outputs = outputs::sequence_outputs(updates, self);
        if outputs.is_empty() {
            return Ok(());
        }
        self.send(outputs::tokens_message(outputs), patience)
    }

    /// Tells that the prompts of these requests are computed, which was all that was wanted.
    pub(crate) fn send_prefilled(
        &mut self,
        request_ids: &[RequestId],
        patience: &Patience,
    ) -> Result<(), Lost> {
        let mut outputs = Vec::new();
        for &request_id in request_ids {
            if let Some(sequence_id) = self.sequence_of(request_id) {
                self.remove(sequence_id);
                outputs.push(outputs::prefilled_output(sequence_id));
            }
        }
        if outputs.is_empty() {
            return Ok(());
        }
        self.send(outputs::tokens_message(outputs), patience)
    }

    /// Keeps an error as the answer to a sequence, until [`send_refusals`](Self::send_refusals).
    pub(crate) fn refuse(&mut self, sequence_id: u64, code: ErrorCode, message: &str) {
        self.refusals
            .push(outputs::error_output(sequence_id, code, message));
    }

    /// [`refuse`](Self::refuse) for every sequence that has not ended.
    pub(crate) fn refuse_all(&mut self, code: ErrorCode, message: &str) {
        self.sequences.clear();
        for sequence_id in std::mem::take(&mut self.requests).into_keys() {
            self.refuse(sequence_id, code, message);
        }
    }

    /// Sends the answers kept since the last call.
    pub(crate) fn send_refusals(&mut self, patience: &Patience) -> Result<(), Lost> {
        if self.refusals.is_empty() {
            return Ok(());
        }
        let outputs = std::mem::take(&mut self.refusals);
        self.send(outputs::tokens_message(outputs), patience)
    }

    /// Sends changes of the prefix cache under the stream's next number.
    pub(crate) fn send_kv_events(
        &mut self,
        events: Vec<KvEvent>,
        patience: &Patience,
    ) -> Result<(), Lost> {
        if events.is_empty() {
            return Ok(());
        }
        self.kv_sequence += 1;
        self.send(
            outputs::kv_events_message(self.kv_sequence, events),
            patience,
        )
    }

    /// Queues a message; where the queue is full, waits for the router to read.
    pub(crate) fn send(&self, message: v1::WorkerMessage, patience: &Patience) -> Result<(), Lost> {
        let message = match self.outbound.try_send(message) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Lost::Ended),
            Err(TrySendError::Full(message)) => message,
        };
        let sent = async {
            tokio::select! {
                biased;
                () = patience.closing.cancelled() => Err(Lost::Closing),
                sent = self.outbound.send(message) => sent.map_err(|_| Lost::Ended),
            }
        };
        park::wait_until(sent, Instant::now() + patience.limit).unwrap_or(Err(Lost::Stalled))
    }

    /// Ends the stream at once. Dropping the attachment instead ends it after what is queued.
    pub(crate) fn cut(self) {
        self.cut.cancel();
    }
}
