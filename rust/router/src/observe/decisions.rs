//! The last placements, to be asked for by request.

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

use parking_lot::Mutex;
use serde::Serialize;

use super::record::{Decision, Entry};

/// A ring of the requests that were placed last. It shares their entries, so it says of a running request what is known
/// so far.
#[derive(Debug)]
pub(super) struct Decisions {
    capacity: usize,
    ring: Mutex<VecDeque<Arc<Entry>>>,
}

/// One request's placement, for an operator.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DecisionView {
    request_id: String,
    /// RFC 3339.
    time: String,
    route: &'static str,
    model: String,
    is_finished: bool,
    prompt_tokens: u64,
    replays: u32,
    retries: u32,
    pauses: u32,
    decisions: Vec<Decision>,
}

impl Decisions {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            ring: Mutex::default(),
        }
    }

    /// Whether nothing is remembered.
    pub(super) const fn are_off(&self) -> bool {
        self.capacity == 0
    }

    pub(super) fn push(&self, entry: Arc<Entry>) {
        if self.are_off() {
            return;
        }
        let mut ring = self.ring.lock();
        let oldest = if ring.len() >= self.capacity {
            ring.pop_front()
        } else {
            None
        };
        ring.push_back(entry);
        drop(ring);
        // Not under the lock: it frees what the entry remembers.
        drop(oldest);
    }

    pub(super) fn find(&self, request_id: &str) -> Option<DecisionView> {
        let ring = self.ring.lock();
        let mut newest_first = ring.iter().rev();
        let entry = newest_first.find(|entry| entry.request_id == request_id)?;
        let entry = Arc::clone(entry);
        drop(ring);
        let facts = entry.facts.lock();
        Some(DecisionView {
            request_id: entry.request_id.clone(),
            time: rfc3339(entry.arrived_at),
            route: entry.route,
            model: facts.model.clone(),
            is_finished: facts.ended.is_some(),
            prompt_tokens: facts.prompt_tokens,
            replays: facts.replays,
            retries: facts.retries,
            pauses: facts.pauses,
            decisions: facts.decisions.clone(),
        })
    }
}

/// With milliseconds.
pub(super) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
