//! The faults that are armed, and what has been counted. Both belong to one engine.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Armed faults at most; more are refused.
const MAX_ARMED: usize = 4096;
/// Departures that are remembered with their time; older ones are only counted.
const MAX_DEPARTURES: usize = 4096;

/// What goes wrong with a generation request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The connection is reset.
    Reset,
    /// The connection is closed, without a last chunk.
    Fin,
    /// The process exits, with status 1.
    Exit,
    /// An event that is no JSON stands in the place of the next word; the stream goes on after it.
    Garbage,
    /// The chunk framing breaks.
    GarbageChunk,
    /// Status 200 with a body that is no JSON.
    GarbageJson,
    /// Nothing is answered until the client leaves.
    HangHeaders,
    /// The answer stops, the connection stays open until the client leaves.
    HangStream,
    /// `status` is answered instead.
    Status,
    /// Half of the next event, or of a whole answer, then the connection is closed.
    Truncated,
    /// The body ends as if it were whole, but without a finish reason or `[DONE]`.
    EarlyEnd,
    /// `itl_ms` between words from here on.
    Slow,
    /// Nothing is answered until `DELETE /_control`, then everything is.
    Hold,
}

/// `POST /_control`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// What goes wrong.
    pub fault: Fault,
    /// Words that are streamed before it does.
    #[serde(default)]
    pub after_events: u32,
    /// Requests that it happens to, in the order of their arrival; 0 is all of them until `DELETE`.
    #[serde(default = "one")]
    pub count: u32,
    /// For [`Fault::Status`].
    #[serde(default = "internal_error")]
    pub status: u16,
    /// It happens to a stream that is running, before its next word, instead of to a request that comes.
    #[serde(default)]
    pub now: bool,
    /// For [`Fault::Slow`], milliseconds.
    #[serde(default)]
    pub itl_ms: u64,
}

const fn one() -> u32 {
    1
}

const fn internal_error() -> u16 {
    500
}

/// What an engine has seen.
#[derive(Debug, Default)]
pub struct Counters {
    /// Generation requests that came.
    pub requests: AtomicU64,
    /// Of these, those that carried the beginning of an answer.
    pub continued: AtomicU64,
    /// Answered to the end.
    pub completed: AtomicU64,
    /// Answered with an error of our own: bad input, too many at once.
    pub refused: AtomicU64,
    /// Requests that a fault happened to.
    pub faults: AtomicU64,
    /// Words sent.
    pub words: AtomicU64,
    /// Clients that left before the end.
    pub client_gone: AtomicU64,
    /// Generation requests now.
    pub running: AtomicUsize,
    /// Health probes: `/health` and `/v1/models`.
    pub probes: AtomicU64,
}

/// `GET /_control`.
#[derive(Debug, Serialize)]
struct Report {
    requests: u64,
    continued: u64,
    completed: u64,
    refused: u64,
    faults: u64,
    words: u64,
    client_gone: u64,
    /// When each departure was noticed, Unix milliseconds, oldest first.
    client_gone_unix_ms: Vec<f64>,
    running: usize,
    probes: u64,
    armed: Vec<Fault>,
}

/// One engine's faults and counters.
#[derive(Debug, Default)]
pub struct Control {
    armed: Mutex<VecDeque<Order>>,
    sudden: Mutex<VecDeque<Order>>,
    /// The length of `sudden`: read before every word.
    num_sudden: AtomicUsize,
    released: Notify,
    departures: Mutex<VecDeque<f64>>,
    last: Mutex<Vec<u8>>,
    /// What is counted.
    pub counters: Counters,
}

impl Control {
    /// Arms a fault behind those that are armed already. An error says what is wrong with the order.
    pub fn arm(&self, order: Order) -> Result<(), String> {
        if !(400..600).contains(&order.status) {
            return Err("status must be from 400 to 599".to_owned());
        }
        let queue = if order.now { &self.sudden } else { &self.armed };
        let mut queue = queue.lock();
        if queue.len() == MAX_ARMED {
            return Err(format!("{MAX_ARMED} faults are armed already"));
        }
        if order.now {
            self.num_sudden.fetch_add(1, Ordering::Relaxed);
        }
        queue.push_back(order);
        Ok(())
    }

    /// Disarms everything, and lets go of what is held.
    pub fn disarm(&self) {
        self.armed.lock().clear();
        let mut sudden = self.sudden.lock();
        sudden.clear();
        self.num_sudden.store(0, Ordering::Relaxed);
        self.released.notify_waiters();
    }

    /// Waits for the next [`Self::disarm`].
    pub(super) async fn released(&self) {
        self.released.notified().await;
    }

    /// The fault that happens to a running stream before its next word.
    pub(super) fn strike(&self) -> Option<Order> {
        if self.num_sudden.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let order = self.sudden.lock().pop_front()?;
        self.num_sudden.fetch_sub(1, Ordering::Relaxed);
        add(&self.counters.faults);
        Some(order)
    }

    /// The fault that happens to the request that has just come.
    pub(super) fn take(&self) -> Option<Order> {
        let mut armed = self.armed.lock();
        let order = armed.front_mut()?;
        let taken = order.clone();
        match order.count {
            0 => {}
            1 => {
                armed.pop_front();
            }
            _ => order.count -= 1,
        }
        add(&self.counters.faults);
        Some(taken)
    }

    /// A client was seen to have left.
    pub(super) fn gone(&self) {
        add(&self.counters.client_gone);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut departures = self.departures.lock();
        if departures.len() == MAX_DEPARTURES {
            departures.pop_front();
        }
        departures.push_back(now.map_or(0.0, |time| time.as_secs_f64() * 1e3));
    }

    /// Keeps a generation request as it came; `message` gets the one before it, to use its memory again.
    pub(super) fn remember(&self, message: &mut Vec<u8>) {
        std::mem::swap(&mut *self.last.lock(), message);
    }

    /// The last generation request: head and body as they came.
    pub fn last(&self) -> Vec<u8> {
        self.last.lock().clone()
    }

    /// The counters as JSON.
    pub fn report(&self) -> Vec<u8> {
        let counters = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let report = Report {
            requests: get(&counters.requests),
            continued: get(&counters.continued),
            completed: get(&counters.completed),
            refused: get(&counters.refused),
            faults: get(&counters.faults),
            words: get(&counters.words),
            client_gone: get(&counters.client_gone),
            client_gone_unix_ms: self.departures.lock().iter().copied().collect(),
            running: counters.running.load(Ordering::Relaxed),
            probes: get(&counters.probes),
            armed: self.armed.lock().iter().map(|order| order.fault).collect(),
        };
        serde_json::to_vec(&report).unwrap_or_default()
    }
}

/// Adds one.
pub(super) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(json: &str) -> Order {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn faults_happen_in_the_order_of_their_arming_and_as_often_as_asked() {
        let control = Control::default();
        control
            .arm(order(
                r#"{"fault": "reset", "after_events": 3, "count": 2}"#,
            ))
            .unwrap();
        control
            .arm(order(r#"{"fault": "status", "status": 429, "count": 0}"#))
            .unwrap();
        let taken: Vec<_> = (0..4).map(|_| control.take().unwrap().fault).collect();
        assert_eq!(
            taken,
            [Fault::Reset, Fault::Reset, Fault::Status, Fault::Status]
        );
        control.disarm();
        assert!(control.take().is_none());
    }

    #[test]
    fn a_bad_order_is_refused() {
        assert!(serde_json::from_str::<Order>(r#"{"fault": "melt"}"#).is_err());
        assert!(serde_json::from_str::<Order>(r#"{"fault": "fin", "afterevents": 1}"#).is_err());
        assert!(
            Control::default()
                .arm(order(r#"{"fault": "status", "status": 200}"#))
                .is_err()
        );
    }
}
