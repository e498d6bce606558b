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
    engine::{Engine, Finished, NewTransfer},
    plan::{Side, plan},
};
use crate::error::TransferError;

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
    waker: Option<Waker>,
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
        let waker = ending.waker.take();
        drop(ending);
        if let Some(waker) = waker {
            waker.wake();
        }
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

    /// Gives it up. It ends at the manager's next progress.
    pub fn abort(&self) {
        self.shared.is_aborted.store(true, Ordering::Relaxed);
    }
}

impl Future for Transfer {
    type Output = TransferResult;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<TransferResult> {
        let mut ending = self.shared.ending.lock();
        if let Some(result) = &ending.result {
            return Poll::Ready(result.clone());
        }
        ending.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.abort();
    }
}
