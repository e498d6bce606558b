//! What a running request holds outside of itself: its seat, and its sequences on the workers.
//!
//! A stream acts only when its client reads, and a client may stop reading for good. So a guard beside it gives all this
//! back when the request's time is over, whether or not anyone looks.

use std::sync::Arc;

use orchestra_core::{ErrorCode, scheduler::WorkerId};
use parking_lot::Mutex;
use tokio::{
    sync::oneshot,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use super::admit::Presence;
use crate::{
    error::ApiError,
    metrics::InFlight,
    workers::{queue::Seat, session::RunningSequence},
};

/// The holdings of one request; `None` once they are given back.
pub(super) struct Held(Mutex<Option<Holdings>>);

struct Holdings {
    /// By choice; `None` while a choice waits for a worker, and once it has ended.
    sequences: Vec<Option<RunningSequence>>,
    _seat: Seat,
    _presence: Presence,
    _in_flight: InFlight,
}

impl Held {
    pub(super) fn new(
        sequences: Vec<RunningSequence>,
        seat: Seat,
        presence: Presence,
        in_flight: InFlight,
    ) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Holdings {
            sequences: sequences.into_iter().map(Some).collect(),
            _seat: seat,
            _presence: presence,
            _in_flight: in_flight,
        }))))
    }

    /// The choice's first token came.
    pub(super) fn prefilled(&self, choice: usize) {
        let mut held = self.0.lock();
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
        if let Some(held) = self.0.lock().as_mut() {
            held.sequences[choice] = Some(sequence);
        }
    }

    /// Ends the choice's sequence where its worker has not ended it; which worker that was.
    pub(super) fn end(&self, choice: usize) -> Option<WorkerId> {
        let sequence = self.0.lock().as_mut()?.sequences[choice].take();
        sequence.map(|sequence| sequence.worker())
    }

    /// Gives everything back.
    pub(super) fn release(&self) {
        let held = self.0.lock().take();
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
