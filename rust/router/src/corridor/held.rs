//! What a running request holds outside of itself: its seat, and its sequences on the workers.
//!
//! A stream acts only when its client reads, and a client may stop reading for good. So a guard beside it gives all this
//! back when the request's time is over, whether or not anyone looks.

use std::sync::{Arc, Weak};

use orchestra_core::{ErrorCode, scheduler::WorkerId};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use super::admit::Presence;
use crate::{
    error::ApiError,
    metrics::InFlight,
    workers::{
        queue::Seat,
        session::{EventKind, RunningSequence, SequenceEvent},
        stopping::Stop,
    },
};

/// The holdings of one request.
pub(super) struct Held {
    /// `None` once they are given back.
    holdings: Mutex<Option<Holdings>>,
    /// Where the stream hears that it was stopped.
    events: mpsc::Sender<SequenceEvent>,
}

struct Holdings {
    /// By choice; `None` while a choice waits for a worker, and once it has ended.
    sequences: Vec<Option<RunningSequence>>,
    /// `None` while the request was stopped and waits for another, as is what follows.
    seat: Option<Seat>,
    in_flight: Option<InFlight>,
    _presence: Presence,
}

impl Held {
    pub(super) fn new(
        sequences: Vec<RunningSequence>,
        seat: Seat,
        presence: Presence,
        in_flight: InFlight,
        events: mpsc::Sender<SequenceEvent>,
    ) -> Arc<Self> {
        let holdings = Holdings {
            sequences: sequences.into_iter().map(Some).collect(),
            seat: Some(seat),
            in_flight: Some(in_flight),
            _presence: presence,
        };
        Arc::new(Self {
            holdings: Mutex::new(Some(holdings)),
            events,
        })
    }

    /// Offers the room of a request of one choice to more urgent ones.
    pub(super) fn offer(self: &Arc<Self>, prompt_tokens: u32) {
        let work: Weak<Self> = Arc::downgrade(self);
        if let Some(held) = self.holdings.lock().as_ref()
            && let [Some(sequence)] = &held.sequences[..]
        {
            sequence.offer(prompt_tokens, work);
        }
    }

    /// Whether a sequence of the choice is on a worker.
    pub(super) fn runs(&self, choice: usize) -> bool {
        let held = self.holdings.lock();
        held.as_ref()
            .is_some_and(|held| held.sequences[choice].is_some())
    }

    /// The stopped request has a seat again. Where its time is over, it leaves that at once.
    pub(super) fn reseat(&self, seat: Seat, in_flight: InFlight) {
        let mut held = self.holdings.lock();
        let left = match held.as_mut() {
            Some(held) => (held.seat.replace(seat), held.in_flight.replace(in_flight)),
            None => (Some(seat), Some(in_flight)),
        };
        // To leave a seat is to serve others, so not under the lock.
        drop(held);
        drop(left);
    }

    /// The choice's first token came.
    pub(super) fn prefilled(&self, choice: usize) {
        let mut held = self.holdings.lock();
        let sequence = held
            .as_mut()
            .and_then(|held| held.sequences[choice].as_mut());
        let prefill = sequence.and_then(RunningSequence::prefilled);
        // Others may be served now, so not under the lock.
        drop(held);
        if let Some(prefill) = prefill {
            prefill.done();
        }
    }

    /// The choice runs on a worker again. Where the request's time is over, the sequence is ended at once.
    pub(super) fn resume(&self, choice: usize, sequence: RunningSequence) {
        if let Some(held) = self.holdings.lock().as_mut() {
            held.sequences[choice] = Some(sequence);
        }
    }

    /// Ends the choice's sequence where its worker has not ended it; which worker that was.
    pub(super) fn end(&self, choice: usize) -> Option<WorkerId> {
        let sequence = self.holdings.lock().as_mut()?.sequences[choice].take();
        sequence.map(|sequence| sequence.worker())
    }

    /// Gives everything back.
    pub(super) fn release(&self) {
        let held = self.holdings.lock().take();
        // Not under the lock: ending sequences takes locks of its own.
        drop(held);
    }

    /// Releases at the deadline or at shutdown, and says why to the stream, unless that ends first.
    pub(super) async fn guard(
        self: Arc<Self>,
        mut stream: oneshot::Sender<ApiError>,
        deadline: Instant,
        shutdown: CancellationToken,
    ) {
        let (code, message) = tokio::select! {
            biased;
            () = stream.closed() => return,
            () = time::sleep_until(deadline) => {
                (ErrorCode::DeadlineExceeded, "the request's time ran out")
            }
            () = shutdown.cancelled() => (ErrorCode::ShuttingDown, "the router is shutting down"),
        };
        self.release();
        // The stream may have ended in this moment.
        let _ = stream.send(ApiError::new(code, message));
    }
}

impl Stop for Held {
    fn stop(&self) {
        let mut held = self.holdings.lock();
        let stopped = held.as_mut().and_then(|held| {
            let sequence = held.sequences[0].take()?;
            Some((sequence, held.seat.take(), held.in_flight.take()))
        });
        drop(held);
        // Where there was none it has just ended, or its time is over.
        if stopped.is_some() {
            // Its worker is told here; no token of it comes after that.
            drop(stopped);
            let _ = self.events.try_send(SequenceEvent {
                choice: 0,
                kind: EventKind::Stopped,
            });
        }
    }
}
