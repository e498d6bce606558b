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
        session::RunningSequence,
        sink::{EventKind, SequenceEvent},
        stopping::{Progress, Stop},
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
    /// The request was stopped, and the stream has not acted on it.
    is_stopped: bool,
    _presence: Presence,
}

/// What a stopped request gives up by dropping it, which is not to be done under the lock.
type GivenUp = (Vec<RunningSequence>, Option<Seat>, Option<InFlight>);

impl Holdings {
    fn stop(&mut self) -> GivenUp {
        let running = self.sequences.iter_mut().filter_map(Option::take);
        (running.collect(), self.seat.take(), self.in_flight.take())
    }
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
            is_stopped: false,
            _presence: presence,
        };
        Arc::new(Self {
            holdings: Mutex::new(Some(holdings)),
            events,
        })
    }

    /// Offers the room of each choice to more urgent requests; all stop together.
    pub(super) fn offer(self: &Arc<Self>, prompt_tokens: u32) {
        let work: Weak<Self> = Arc::downgrade(self);
        if let Some(held) = self.holdings.lock().as_ref() {
            let running = || held.sequences.iter().flatten();
            let together = running().map(|it| it.progress().clone()).collect();
            let together: Arc<[Progress]> = together;
            for sequence in running() {
                sequence.offer(prompt_tokens, work.clone(), Arc::clone(&together));
            }
        }
    }

    /// Whether the request was stopped and the stream is still to act on it.
    pub(super) fn is_stopped(&self) -> bool {
        let held = self.holdings.lock();
        held.as_ref().is_some_and(|held| held.is_stopped)
    }

    /// Acts on a stop, once; false where there is none. A choice that began anew in the same moment ends too.
    pub(super) fn take_stop(&self) -> bool {
        let mut held = self.holdings.lock();
        let Some(holdings) = held.as_mut() else {
            return false;
        };
        let was_stopped = std::mem::take(&mut holdings.is_stopped);
        let late = was_stopped.then(|| holdings.stop());
        drop(held);
        drop(late);
        was_stopped
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

    /// The choice's first token came, and of its prompt so many tokens' KV from another worker.
    pub(super) fn prefilled(&self, choice: usize, fetched_tokens: u32) {
        let mut held = self.holdings.lock();
        let sequence = held
            .as_mut()
            .and_then(|held| held.sequences[choice].as_mut());
        let prefilled = sequence.and_then(|sequence| sequence.prefilled(fetched_tokens));
        // Others may be served now, so not under the lock.
        drop(held);
        if let Some((prefill, _moving)) = prefilled {
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
        let runs = |held: &&mut Holdings| held.sequences.iter().any(Option::is_some);
        let stopped = held.as_mut().filter(runs).map(|held| {
            held.is_stopped = true;
            held.stop()
        });
        drop(held);
        // Where nothing ran it has just ended, or its time is over.
        if stopped.is_some() {
            // The workers are told here; no token of it comes after that.
            drop(stopped);
            let _ = self.events.try_send(SequenceEvent {
                choice: 0,
                kind: EventKind::Stopped,
            });
        }
    }
}
