//! Transfers of blocks: what a caller asks for and how it learns the end.

mod engine;
mod plan;

use std::{
    fmt,
    future::Future,
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;

pub(crate) use self::{
    engine::{Engine, Finished, LocalHold, NewTransfer},
    plan::{Side, plan},
};
use crate::error::TransferError;

/// Those who may wait for one transfer.
const WAKERS_MAX: usize = 8;

/// How a transfer is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferOptions {
    /// The most it may take; what is not over by then is given up.
    pub timeout: Duration,
    /// The part of every block that is moved, as bytes of the block; all of it where `None`.
    pub part: Option<Range<u64>>,
    /// The first block of the grant that is meant; the others follow it.
    pub first: usize,
    /// Sent to the owner after the bytes.
    pub payload: Vec<u8>,
    /// Whether this is the last use of the grant, so that its owner has the blocks to itself again.
    pub ends_grant: bool,
}

impl Default for TransferOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            part: None,
            first: 0,
            payload: Vec::new(),
            ends_grant: true,
        }
    }
}

/// What a transfer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferStats {
    /// Blocks, or parts of blocks.
    pub blocks: usize,
    /// Bytes.
    pub bytes: u64,
    /// Descriptors that they were joined into.
    pub segments: usize,
    /// From the call to the end.
    pub took: Duration,
}

/// How a transfer ended.
pub type TransferResult = Result<TransferStats, TransferError>;

#[derive(Default)]
struct Ending {
    result: Option<TransferResult>,
    wakers: Vec<Waker>,
}

/// What the caller and the engine both see of a transfer.
#[derive(Default)]
pub(crate) struct Shared {
    ending: Mutex<Ending>,
    is_aborted: AtomicBool,
}

impl Shared {
    pub(crate) fn is_aborted(&self) -> bool {
        self.is_aborted.load(Ordering::Relaxed)
    }

    /// Ends the transfer. Called without any lock of ours: whoever waits may call back.
    pub(crate) fn end(&self, result: TransferResult) {
        let mut ending = self.ending.lock();
        debug_assert!(ending.result.is_none(), "a transfer ends once");
        ending.result = Some(result);
        let wakers = std::mem::take(&mut ending.wakers);
        drop(ending);
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// A transfer under way; a future of its end. Dropping it gives it up, which is no promise that bytes stop: the
/// blocks wait for proof.
#[must_use = "dropping a transfer gives it up"]
pub struct Transfer {
    pub(crate) shared: Arc<Shared>,
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("result", &self.result())
            .finish_non_exhaustive()
    }
}

impl Transfer {
    /// How it ended; `None` while it has not.
    pub fn result(&self) -> Option<TransferResult> {
        self.shared.ending.lock().result.clone()
    }

    /// Has `waker` called when it ends; `true` where it has ended, and nobody will be. A few may wait: one too many
    /// wakes the first of them, who asks again.
    pub fn wake(&self, waker: &Waker) -> bool {
        let mut ending = self.shared.ending.lock();
        if ending.result.is_some() {
            return true;
        }
        let is_known = ending.wakers.iter().any(|known| known.will_wake(waker));
        if is_known {
            return false;
        }
        let is_full = ending.wakers.len() == WAKERS_MAX;
        let displaced = is_full.then(|| ending.wakers.remove(0));
        ending.wakers.push(waker.clone());
        drop(ending);
        if let Some(displaced) = displaced {
            displaced.wake();
        }
        false
    }

    /// Gives it up. It ends at the manager's next progress.
    pub fn abort(&self) {
        self.shared.is_aborted.store(true, Ordering::Relaxed);
    }
}

impl Future for Transfer {
    type Output = TransferResult;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<TransferResult> {
        self.wake(context.waker());
        self.result().map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.abort();
    }
}
