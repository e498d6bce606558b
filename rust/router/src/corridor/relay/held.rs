//! What a running request holds that others may have of it: the connection to its engine, and its seat.
//!
//! A stream acts only when its client reads, and a client may read slowly. So whoever stops the request ([`Stop`]) takes
//! both away itself: the engine sees the connection end, and the stream finds out when it reads on.
//!
//! ```text
//! Closed → Open ⇄ Looking → Closed: what came cannot be taken back in by an engine
//!            ↓       ↓
//!         Stopped ← Wanted
//! ```
//!
//! Only an answer that an engine can go on with may be stopped, and what was read last may be the end of that. So while
//! the stream looks at it, a stop is only noted; it is carried out, or forgotten, right behind.

use std::{
    sync::{Arc, Weak, atomic::AtomicU32},
    task::{Context, Poll, Waker, ready},
};

use bytes::BytesMut;
use parking_lot::Mutex;

use crate::{
    engines::wire::{Connection, WireError},
    metrics::InFlight,
    workers::{
        queue::{Reserved, Seat},
        stopping::{Progress, Stop, Stoppable},
    },
};

/// The holdings of one request.
pub(super) struct Held(Mutex<Holdings>);

struct Holdings {
    connection: Option<Connection>,
    /// `None` while the request was stopped and waits for another.
    seat: Option<(Seat, InFlight)>,
    offer: Offer,
    /// Who waits for what the engine sends.
    reader: Option<Waker>,
}

/// Whether the request may be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    /// Not, or not any more.
    Closed,
    Open,
    /// It may, unless what was read last says otherwise.
    Looking,
    /// The same, and somebody has asked for it.
    Wanted,
    /// It was.
    Stopped,
}

/// What a request that is stopped gives up by dropping it, which is not to be done under the lock.
struct GivenUp {
    _connection: Option<Connection>,
    _seat: Option<(Seat, InFlight)>,
}

impl Holdings {
    fn stop(&mut self) -> GivenUp {
        self.offer = Offer::Stopped;
        GivenUp {
            _connection: self.connection.take(),
            _seat: self.seat.take(),
        }
    }
}

impl Held {
    pub(super) fn new(seat: Seat, running: InFlight) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Holdings {
            connection: None,
            seat: Some((seat, running)),
            offer: Offer::Closed,
            reader: None,
        })))
    }

    /// The request is on this connection.
    pub(super) fn connect(&self, connection: Connection) {
        let earlier = self.0.lock().connection.replace(connection);
        drop(earlier);
    }

    /// The connection, where there still is one.
    pub(super) fn disconnect(&self) -> Option<Connection> {
        self.0.lock().connection.take()
    }

    /// The stopped request has a seat again.
    pub(super) fn reseat(&self, seat: Seat, running: InFlight) {
        let earlier = self.0.lock().seat.replace((seat, running));
        drop(earlier);
    }

    /// Offers the room to more urgent requests. The request's next token will have index `first_index`; how far it gets is
    /// to be written to what is returned.
    pub(super) fn offer(
        self: &Arc<Self>,
        reserved: &Reserved,
        prompt_tokens: u32,
        first_index: u32,
    ) -> Arc<AtomicU32> {
        let next_index = Arc::new(AtomicU32::new(first_index));
        let progress = Progress {
            first_index,
            next_index: Arc::clone(&next_index),
        };
        let work: Weak<Self> = Arc::downgrade(self);
        self.0.lock().offer = Offer::Open;
        reserved.offer(Stoppable {
            work,
            prompt_tokens,
            together: Arc::new([progress.clone()]),
            progress,
        });
        next_index
    }

    /// Appends what comes next of the answer; false at its end. What was offered is being looked at from then on.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        out: &mut BytesMut,
    ) -> Poll<Result<bool, WireError>> {
        let mut held = self.0.lock();
        let held = &mut *held;
        if held.offer == Offer::Stopped {
            return Poll::Ready(Err(WireError::Closed));
        }
        let Some(connection) = &mut held.connection else {
            return Poll::Ready(Ok(false));
        };
        let read = connection.poll_body(cx, out);
        if held.offer == Offer::Open && read.is_pending() {
            let is_known = |reader: &Waker| reader.will_wake(cx.waker());
            if !held.reader.as_ref().is_some_and(is_known) {
                held.reader = Some(cx.waker().clone());
            }
        }
        let read = ready!(read);
        if held.offer == Offer::Open {
            held.offer = Offer::Looking;
        }
        Poll::Ready(read)
    }

    /// What was read was looked at: the offer stands, or there is none any more.
    pub(super) fn looked(&self, may_stop: bool) {
        let mut held = self.0.lock();
        let given_up = match held.offer {
            Offer::Looking | Offer::Wanted if !may_stop => {
                held.offer = Offer::Closed;
                None
            }
            Offer::Looking => {
                held.offer = Offer::Open;
                None
            }
            Offer::Wanted => Some(held.stop()),
            Offer::Closed | Offer::Open | Offer::Stopped => None,
        };
        drop(held);
        drop(given_up);
    }

    /// Ends the offer. True where the request was stopped before.
    pub(super) fn withdraw(&self) -> bool {
        let offer = std::mem::replace(&mut self.0.lock().offer, Offer::Closed);
        offer == Offer::Stopped
    }
}

impl Stop for Held {
    fn stop(&self) {
        let mut held = self.0.lock();
        let given_up = match held.offer {
            Offer::Open => Some((held.stop(), held.reader.take())),
            Offer::Looking => {
                held.offer = Offer::Wanted;
                None
            }
            // It has just ended, or cannot be stopped any more.
            Offer::Closed | Offer::Wanted | Offer::Stopped => None,
        };
        drop(held);
        if let Some((given_up, reader)) = given_up {
            // The engine is told here.
            drop(given_up);
            if let Some(reader) = reader {
                reader.wake();
            }
        }
    }
}
