//! KV that another worker is to keep for this one, so that it outlives it.
//!
//! ```text
//!   offer ──▶ asked and read, as any pull ──▶ offered again, until nothing is lacking
//!     │ │ stop
//!     │ └────▶ over: the step loop may offer the next
//!     │ no answer in time, another keeper, not now
//!     ▼
//!   put off: the same, and this one waits again
//! ```
//!
//! The keeper reads what it lacks at its own pace, and seals it when all of it is there: whatever becomes of this
//! worker meanwhile, nobody sees half a block.

use std::time::Duration;

use orchestra_core::{Time, step::SealedChain};
use orchestra_proto::v1::{self, kv_message::Message};
use rustc_hash::FxHashMap;

use super::{inbox::Report, mover::Desk};

/// How long a keeper may take to ask for what it was offered, and then to read it.
const OFFER_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes that a keeper may ask for at once.
const OFFER_BYTES_MAX: u64 = 32 << 20;
/// The numbers of our own moves, apart from those of routers, which count up from the time in nanoseconds.
const OWN_MOVES: u64 = 1 << 63;

/// A chain that the keeper was told of.
struct Offer {
    keeper: String,
    chain: SealedChain,
    deadline: Time,
}

/// All of them, by the number of the move.
#[derive(Default)]
pub(super) struct Offers {
    open: FxHashMap<u64, Offer>,
    num_offers: u64,
}

impl Offers {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether a move is one of these.
    pub(super) fn has(&self, worker_id: &str, transfer_id: u64) -> bool {
        let offer = self.open.get(&transfer_id);
        offer.is_some_and(|offer| offer.keeper == worker_id)
    }

    /// Tells the keeper of a chain.
    pub(super) fn offer(&mut self, keeper: &str, chain: SealedChain, desk: &mut Desk) {
        self.num_offers += 1;
        let transfer_id =
            OWN_MOVES | (desk.pool.announcement().epoch.rotate_left(20) ^ self.num_offers);
        let message = v1::KvOffer {
            from: Some(desk.ourselves()),
            hash_seed: chain.hash_seed.0,
            token_ids: chain.token_ids.clone(),
            max_blocks: max_blocks(desk),
            timeout_ms: OFFER_TIMEOUT.as_millis() as u32,
        };
        if !desk.send(keeper, transfer_id, Message::Offer(message)) {
            return desk.report(Report::OfferEnded(None));
        }
        let offer = Offer {
            keeper: keeper.to_owned(),
            chain,
            deadline: desk.pool.now() + OFFER_TIMEOUT,
        };
        self.open.insert(transfer_id, offer);
    }

    /// The keeper has read so many blocks. Where that is all that it was allowed, it may lack more.
    pub(super) fn on_read(&mut self, transfer_id: u64, num_blocks: usize, desk: &mut Desk) {
        let Some(offer) = self.open.remove(&transfer_id) else {
            return;
        };
        desk.written_through(num_blocks as u64);
        if num_blocks as u64 >= u64::from(max_blocks(desk)) {
            self.offer(&offer.keeper, offer.chain, desk);
        } else {
            desk.report(Report::OfferEnded(None));
        }
    }

    /// It is not to be read, or no longer.
    pub(super) fn end(&mut self, transfer_id: u64, desk: &mut Desk) {
        if self.open.remove(&transfer_id).is_some() {
            desk.report(Report::OfferEnded(None));
        }
    }

    /// It is to be offered again, and may be read by another worker then.
    pub(super) fn put_off(&mut self, transfer_id: u64, desk: &mut Desk) {
        if let Some(offer) = self.open.remove(&transfer_id) {
            desk.report(Report::OfferEnded(Some(offer.chain)));
        }
    }

    /// Another worker is the keeper: what the one before has not read yet is for this one.
    pub(super) fn put_off_all(&mut self, desk: &mut Desk) {
        for transfer_id in self.open.keys().copied().collect::<Vec<_>>() {
            self.put_off(transfer_id, desk);
        }
    }

    /// The step loop has forgotten them all.
    pub(super) fn forget_all(&mut self) {
        self.open.clear();
    }

    /// Puts off what has lasted for too long: the keeper stands still, or no message reaches it. A lease that it may still
    /// have ends by itself.
    pub(super) fn poll(&mut self, desk: &mut Desk) {
        let now = desk.pool.now();
        let overdue = self.open.iter().filter(|(_, it)| now >= it.deadline);
        for transfer_id in overdue.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.put_off(transfer_id, desk);
        }
    }
}

/// Blocks that make up the most bytes to be asked for at once; one where a block is larger.
fn max_blocks(desk: &Desk) -> u32 {
    let bytes = desk.pool.announcement().bytes_per_block.max(1);
    (OFFER_BYTES_MAX / bytes).max(1) as u32
}
