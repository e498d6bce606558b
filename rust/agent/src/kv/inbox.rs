//! What the step loop and the thread that moves KV tell each other.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use orchestra_core::{
    BlockId, HashSeed, RequestId, TokenId,
    step::{FilledBlocks, HeldBlocks, HoldId, SealedChain},
};
use orchestra_proto::v1;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc::WeakSender;

/// Messages of other workers that may wait; more are lost, and what they were about runs into its deadline.
const MESSAGES_MAX: usize = 1024;

/// Blocks that another worker has, or computes, for a sequence that awaits them here.
#[derive(Debug)]
pub(crate) struct TakeOrder {
    pub(crate) hold: HoldId,
    pub(crate) first_block: u32,
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) hash_seed: HashSeed,
    /// The tokens of the blocks, and of those before them.
    pub(crate) token_ids: Vec<TokenId>,
    pub(crate) source: v1::KvSource,
    pub(crate) deadline: Instant,
}

/// A sequence whose prompt is computed for another worker.
#[derive(Debug)]
pub(crate) struct PushOrder {
    pub(crate) request_id: RequestId,
    pub(crate) target: v1::KvTarget,
    pub(crate) deadline: Instant,
}

/// What the step loop tells the thread. A sequence causes a few of them, and one for each step that fills its blocks:
/// the sequences are bounded, and so is the queue.
#[derive(Debug)]
pub(crate) enum Order {
    /// A router's stream is open: where messages to other workers go.
    Attached(WeakSender<v1::WorkerMessage>),
    /// It has ended, and all sequences with it.
    Detached,
    Take(TakeOrder),
    /// The sequence of an awaited hold has ended.
    Abandon(HoldId),
    /// This worker's room is short, so that it computes what worker `.0` was to push.
    Decline(String, u64),
    /// What was found of a prompt that another worker asked for.
    Held(u64, Option<HeldBlocks>),
    /// The keeper asked for it at a time when sequences need the blocks.
    NotNow(u64),
    Push(PushOrder),
    /// A chain that worker `.0` is to keep. Answered with [`Report::OfferEnded`].
    Offer(String, SealedChain),
    /// Another worker is the keeper from now on, or another start of the same one.
    NewKeeper,
    /// Blocks that step `.0` fills.
    Filled(u64, FilledBlocks),
    /// A sequence that was computed for another worker has ended; `true` where all of it is there.
    PushEnded(RequestId, bool),
    Stop,
}

/// What another worker wants to be kept.
#[derive(Debug)]
pub(crate) struct Offered {
    pub(crate) from: v1::KvPeer,
    pub(crate) transfer_id: u64,
    pub(crate) hash_seed: HashSeed,
    pub(crate) token_ids: Vec<TokenId>,
    pub(crate) max_blocks: u32,
    pub(crate) timeout_ms: u32,
}

/// What the thread tells the step loop.
#[derive(Debug)]
pub(crate) enum Report {
    /// Another worker wants the beginning of a prompt. Answered with [`Order::Held`] or
    /// [`Order::NotNow`] of the same number.
    Wanted {
        number: u64,
        hash_seed: HashSeed,
        token_ids: Vec<TokenId>,
        /// It is the answer to an offer of ours, and not to cost a sequence anything.
        is_offered: bool,
    },
    /// Another worker wants the beginning of a sequence to be kept here. Answered with [`Order::Take`] or
    /// [`Order::Decline`].
    Offered(Offered),
    /// A chain was offered, and it was read or declined; or nobody has answered, and it is to be offered again.
    OfferEnded(Option<SealedChain>),
    /// The first so many awaited blocks are there.
    Arrived(HoldId, u32),
    /// Awaited blocks do not come; they may still be written.
    Failed(HoldId),
    /// Nobody outside touches the blocks of this hold any more.
    Released(HoldId),
}

/// How far the steps are: layers `0..layers` of step `step_id` have their KV, and all of the steps before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StepProgress {
    pub(crate) step_id: u64,
    pub(crate) layers: u32,
}

#[derive(Debug, Default)]
struct Letters {
    orders: VecDeque<Order>,
    messages: VecDeque<v1::PeerMessage>,
    progress: StepProgress,
}

/// The thread's inbox; its descriptor is readable when something is in it.
#[derive(Debug)]
pub(crate) struct Inbox {
    letters: Mutex<Letters>,
    bell: OwnedFd,
}

impl Inbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            letters: Mutex::default(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    pub(crate) fn order(&self, order: Order) {
        self.letters.lock().orders.push_back(order);
        self.ring();
    }

    pub(crate) fn message(&self, message: v1::PeerMessage) {
        let mut letters = self.letters.lock();
        if letters.messages.len() < MESSAGES_MAX {
            letters.messages.push_back(message);
        }
        drop(letters);
        self.ring();
    }

    /// The KV of these layers is where it belongs.
    pub(crate) fn progress(&self, step_id: u64, layers: u32) {
        self.letters.lock().progress = StepProgress { step_id, layers };
        self.ring();
    }

    fn ring(&self) {
        // Full says that it rings already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Everything in it, and how far the steps are.
    pub(super) fn take(&self) -> (VecDeque<Order>, VecDeque<v1::PeerMessage>, StepProgress) {
        // Silent first: what comes after this rings again.
        let _ = rustix::io::read(&self.bell, &mut [0_u8; 8]);
        let mut letters = self.letters.lock();
        let orders = std::mem::take(&mut letters.orders);
        let messages = std::mem::take(&mut letters.messages);
        (orders, messages, letters.progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_beyond_the_limit_are_lost_and_orders_never() {
        let inbox = Inbox::new().unwrap();
        for number in 0..2 * MESSAGES_MAX as u64 {
            inbox.message(v1::PeerMessage::default());
            inbox.order(Order::Abandon(HoldId(number)));
        }
        inbox.progress(7, 3);
        let (orders, messages, progress) = inbox.take();
        assert_eq!(orders.len(), 2 * MESSAGES_MAX);
        assert_eq!(messages.len(), MESSAGES_MAX);
        assert_eq!((progress.step_id, progress.layers), (7, 3));
        let (orders, messages, again) = inbox.take();
        assert!(orders.is_empty() && messages.is_empty());
        assert_eq!(
            again, progress,
            "how far the steps are is no news that goes away"
        );
    }
}
