//! Where an engine's numbered messages stand, and what they say it holds. No IO: the subscriber brings the messages.

use std::hash::Hasher;

use orchestra_core::{
    scheduler::{SchedulerError, WorkerSpec},
    step::KvEvent,
};
use rustc_hash::FxHasher;

use super::{
    batch::{self, Event},
    blocks::{EngineBlocks, TooManyBlocks},
};
use crate::metrics::KvEventSeries;

/// Why it is not known any more what an engine holds. Its blocks are forgotten, and learned anew from the messages
/// that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loss {
    /// Messages are missing, and the engine could not replay them.
    Gap,
    /// The engine began to count anew.
    Restart,
    /// The connection broke, and there is no way to ask what was missed.
    Disconnect,
    /// A message could not be read.
    Unreadable,
    /// It reports more blocks than it was registered with.
    TooManyBlocks,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Gap,
        Self::Restart,
        Self::Disconnect,
        Self::Unreadable,
        Self::TooManyBlocks,
    ];

    /// As metrics and logs spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gap => "gap",
            Self::Restart => "restart",
            Self::Disconnect => "disconnect",
            Self::Unreadable => "unreadable",
            Self::TooManyBlocks => "too_many_blocks",
        }
    }
}

/// The worker is no longer registered: there is nobody to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// A message's place among those seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Seen already.
    Before,
    /// The one that is due; before the first message, any.
    Next,
    /// Others are missing before it.
    Gap,
}

/// The last message that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) sequence: u64,
    /// Tells it from a message of the same number of an engine that started anew.
    pub(super) digest: u64,
}

/// An engine's messages, taken in order; `apply` tells the scheduler.
pub(super) struct Feed<A> {
    worker: String,
    blocks: EngineBlocks,
    pub(super) seen: Option<Seen>,
    /// Whether something was said that has to be taken back when it becomes unknown.
    has_told: bool,
    /// Whether nothing was applied since the last warning.
    is_warned: bool,
    apply: A,
    pub(super) series: KvEventSeries,
}

impl<A: FnMut(&KvEvent) -> Result<(), SchedulerError>> Feed<A> {
    pub(super) fn new(spec: WorkerSpec, series: KvEventSeries, apply: A) -> Self {
        Self {
            worker: spec.name.clone(),
            blocks: EngineBlocks::new(spec),
            seen: None,
            has_told: false,
            is_warned: false,
            apply,
            series,
        }
    }

    pub(super) fn order(&self, sequence: u64) -> Order {
        let Some(seen) = self.seen else {
            return Order::Next;
        };
        match sequence {
            _ if sequence <= seen.sequence => Order::Before,
            _ if sequence == seen.sequence + 1 => Order::Next,
            _ => Order::Gap,
        }
    }

    /// Takes a message, whatever came before it.
    pub(super) fn take(&mut self, sequence: u64, payload: &[u8]) -> Result<(), Gone> {
        self.seen = Some(Seen {
            sequence,
            digest: digest(payload),
        });
        self.series.batch();
        let Ok(events) = batch::decode(payload) else {
            return self.forget(Loss::Unreadable);
        };
        for event in &events {
            self.take_event(event)?;
        }
        Ok(())
    }

    fn take_event(&mut self, event: &Event<'_>) -> Result<(), Gone> {
        match self.blocks.apply(event) {
            Ok(Ok(change)) => self.tell(&change),
            Ok(Err(ignored)) => {
                self.series.ignored(ignored);
                Ok(())
            }
            Err(TooManyBlocks) => self.forget(Loss::TooManyBlocks),
        }
    }

    fn tell(&mut self, change: &KvEvent) -> Result<(), Gone> {
        self.has_told = true;
        self.is_warned = false;
        match (self.apply)(change) {
            Ok(()) => Ok(()),
            Err(SchedulerError::TooManyBlocks { .. }) => self.forget(Loss::TooManyBlocks),
            Err(_) => Err(Gone),
        }
    }

    /// What the engine holds is unknown from now on; its messages go on being counted.
    pub(super) fn forget(&mut self, loss: Loss) -> Result<(), Gone> {
        self.series.lost(loss);
        if !std::mem::replace(&mut self.is_warned, true) {
            let worker = &self.worker;
            tracing::warn!(worker, reason = loss.as_str(), "cached blocks are unknown");
        }
        self.blocks.clear();
        if !std::mem::take(&mut self.has_told) {
            return Ok(());
        }
        (self.apply)(&KvEvent::Cleared).map_err(|_| Gone)
    }

    /// As [`forget`](Self::forget), and the next message is the first one.
    pub(super) fn start_anew(&mut self, loss: Loss) -> Result<(), Gone> {
        self.seen = None;
        self.forget(loss)
    }
}

pub(super) fn digest(payload: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(payload);
    hasher.finish()
}
