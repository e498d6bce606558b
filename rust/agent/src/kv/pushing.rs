//! KV that this worker computes for others, and writes to them layer by layer while it does.
//!
//! A step fills some blocks of the prompt. As soon as a layer of them is computed it is put, provided the taker has
//! granted its blocks by then. The put that completes the grant goes last, when all others are done: it carries the
//! news that everything is there.

use std::{ops::Range, time::Duration};

use orchestra_core::{
    BlockId, RequestId, Time,
    step::{FilledBlocks, HoldId},
};
use orchestra_memory::{MemoryError, PeerId, RemoteGrant, Rights, Transfer, TransferOptions};
use orchestra_proto::v1::{self, kv_message::Message};
use rustc_hash::FxHashMap;

use super::{
    ending::Ending,
    inbox::{PushOrder, StepProgress},
    mover::Desk,
    pool::LEASE_MAX,
    wire,
};

/// Puts of one push that may be under way.
const PUTS_MAX: usize = 16;
/// Messages about pushes that have not begun here: a step that executes holds the step loop up, and no message.
const EARLY_MAX: usize = 256;
/// Pushes that are over and remembered, so that whoever grants blocks for one late is told.
const OVER_MAX: usize = 4096;

/// Blocks that one step fills.
struct Part {
    step_id: u64,
    first_block: u32,
    blocks: Vec<BlockId>,
    hold: HoldId,
    layers_ready: u32,
    layers_posted: u32,
}

/// The taker's blocks.
struct Offer {
    grant: RemoteGrant,
    /// Of the prompt.
    range: Range<u32>,
}

struct Push {
    worker_id: String,
    epoch: u64,
    transfer_id: u64,
    peer: PeerId,
    num_blocks: u32,
    deadline: Time,
    offer: Option<Offer>,
    parts: Vec<Part>,
    puts: Vec<Transfer>,
    is_last_posted: bool,
}

struct Early {
    worker_id: String,
    came: Time,
    offer: v1::KvGrant,
}

/// All of them.
#[derive(Default)]
pub(super) struct Pushes {
    open: FxHashMap<RequestId, Push>,
    /// Offers for pushes that have not begun, by transfer.
    early: FxHashMap<u64, Early>,
    /// Pushes that failed or are not wanted any more, and since when.
    over: FxHashMap<u64, Time>,
}

/// How a push stands after it was looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    GoesOn,
    Done,
    Failed,
}

impl Pushes {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(super) fn begin(&mut self, order: &PushOrder, desk: &mut Desk) {
        let v1::KvTarget {
            peer, transfer_id, ..
        } = &order.target;
        let Some(to) = peer else { return };
        let early = self.early.remove(transfer_id);
        let early = early.filter(|it| it.worker_id == to.worker_id);
        let is_over = self.over.contains_key(transfer_id);
        let peer = if is_over { None } else { desk.connect(to) };
        let Some(peer) = peer else {
            self.note_over(*transfer_id, desk);
            desk.send(
                &to.worker_id,
                *transfer_id,
                Message::Refusal(v1::KvRefusal {}),
            );
            return;
        };
        let mut push = Push {
            worker_id: to.worker_id.clone(),
            epoch: to.epoch,
            transfer_id: *transfer_id,
            peer,
            num_blocks: order.target.num_blocks,
            deadline: desk.pool.time_of(order.deadline),
            offer: None,
            parts: Vec::new(),
            puts: Vec::new(),
            is_last_posted: false,
        };
        if let Some(early) = early {
            push.take_offer(&early.offer, early.came, desk);
        }
        self.open.insert(order.request_id, push);
    }

    /// The taker lets us write.
    pub(super) fn on_offer(
        &mut self,
        worker_id: &str,
        transfer_id: u64,
        grant: v1::KvGrant,
        desk: &mut Desk,
    ) {
        let mut pushes = self.open.values_mut();
        let found = pushes.find(|it| it.transfer_id == transfer_id && it.worker_id == worker_id);
        match found {
            Some(push) => push.take_offer(&grant, desk.pool.now(), desk),
            None if self.over.contains_key(&transfer_id) => {
                desk.send(worker_id, transfer_id, Message::Refusal(v1::KvRefusal {}));
            }
            None => self.remember(worker_id, transfer_id, grant, desk),
        }
    }

    /// The taker does not want it any more.
    pub(super) fn on_stop(&mut self, worker_id: &str, transfer_id: u64, desk: &mut Desk) {
        let mut pushes = self.open.iter();
        let is_it = |it: &Push| it.transfer_id == transfer_id && it.worker_id == worker_id;
        if let Some((&request_id, _)) = pushes.find(|(_, it)| is_it(it)) {
            return self.fail(request_id, desk);
        }
        // Over, or not begun: either way nothing is under way, and nothing will be.
        desk.send(worker_id, transfer_id, Message::Refusal(v1::KvRefusal {}));
        self.note_over(transfer_id, desk);
    }

    /// Keeps an offer for a push that has not begun. Where there is no room the taker waits until its deadline.
    fn remember(&mut self, worker_id: &str, transfer_id: u64, offer: v1::KvGrant, desk: &Desk) {
        if self.early.len() < EARLY_MAX {
            let early = Early {
                worker_id: worker_id.to_owned(),
                came: desk.pool.now(),
                offer,
            };
            self.early.insert(transfer_id, early);
        }
    }

    /// From now on whoever grants blocks for this push is refused.
    fn note_over(&mut self, transfer_id: u64, desk: &Desk) {
        self.early.remove(&transfer_id);
        if self.over.len() < OVER_MAX {
            self.over.insert(transfer_id, desk.pool.now());
        }
    }

    /// A step that is handed out fills blocks of a prompt.
    pub(super) fn on_filled(&mut self, step_id: u64, filled: FilledBlocks, desk: &mut Desk) {
        let Some(push) = self.open.get_mut(&filled.request_id) else {
            return desk.released(filled.hold);
        };
        push.parts.push(Part {
            step_id,
            first_block: filled.first_block,
            blocks: filled.blocks,
            hold: filled.hold,
            layers_ready: 0,
            layers_posted: 0,
        });
    }

    /// The sequence has ended. What is computed goes on moving, if that is all.
    pub(super) fn on_ended(&mut self, request_id: RequestId, is_whole: bool, desk: &mut Desk) {
        if !is_whole {
            self.fail(request_id, desk);
        }
    }

    pub(super) fn abandon_all(&mut self, desk: &mut Desk) {
        for request_id in self.open.keys().copied().collect::<Vec<_>>() {
            self.fail(request_id, desk);
        }
    }

    /// Looks at every push once; returns how many puts were posted.
    pub(super) fn poll(&mut self, progress: StepProgress, desk: &mut Desk) -> usize {
        let now = desk.pool.now();
        self.early.retain(|_, it| now < it.came + LEASE_MAX);
        self.over.retain(|_, since| now < *since + LEASE_MAX);
        let mut num_posted = 0;
        let mut verdicts = Vec::new();
        for (&request_id, push) in &mut self.open {
            let verdict = push.advance(progress, now, desk, &mut num_posted);
            verdicts.push((request_id, verdict));
        }
        for (request_id, verdict) in verdicts {
            match verdict {
                Verdict::GoesOn => {}
                Verdict::Done => self.finish(request_id, desk),
                Verdict::Failed => self.fail(request_id, desk),
            }
        }
        num_posted
    }

    fn finish(&mut self, request_id: RequestId, desk: &mut Desk) {
        if let Some(push) = self.open.remove(&request_id) {
            let range = push.offer.as_ref().map_or(0..0, |it| it.range.clone());
            desk.pushed(u64::from(range.end - range.start));
            desk.endings.add(push.ending(false));
        }
    }

    /// Gives a push up, and says so when nothing of it moves any more.
    fn fail(&mut self, request_id: RequestId, desk: &mut Desk) {
        if let Some(push) = self.open.remove(&request_id) {
            self.note_over(push.transfer_id, desk);
            for put in &push.puts {
                put.abort();
            }
            desk.endings.add(push.ending(true));
        }
    }
}

impl Push {
    fn take_offer(&mut self, grant: &v1::KvGrant, came: Time, desk: &Desk) {
        let read = wire::read_grant(&desk.pool, grant, self.peer, came, self.num_blocks);
        let offer = read.filter(|(grant, _)| grant.rights == Rights::Write);
        self.offer = offer.map(|(grant, range)| Offer { grant, range });
        if self.offer.is_none() {
            // Of no use, and known to be: the taker computes at once.
            self.deadline = Time::ZERO;
        }
    }

    fn ending(self, tells: bool) -> Ending {
        let parts = self.parts;
        Ending {
            holds: parts.iter().map(|part| part.hold).collect(),
            blocks: parts.into_iter().flat_map(|part| part.blocks).collect(),
            answer: tells.then_some((self.worker_id, self.transfer_id)),
        }
    }

    fn advance(
        &mut self,
        progress: StepProgress,
        now: Time,
        desk: &mut Desk,
        num_posted: &mut usize,
    ) -> Verdict {
        let num_layers = desk.pool.config().num_layers;
        for part in &mut self.parts {
            let ready = match part.step_id.cmp(&progress.step_id) {
                std::cmp::Ordering::Less => num_layers,
                std::cmp::Ordering::Equal => progress.layers.min(num_layers),
                std::cmp::Ordering::Greater => 0,
            };
            part.layers_ready = part.layers_ready.max(ready);
        }
        let mut failure = None;
        self.puts.retain(|put| {
            let result = put.result();
            let is_open = result.is_none();
            failure = failure.take().or_else(|| result?.err());
            is_open
        });
        if let Some(error) = failure {
            tracing::debug!(%error, "KV could not be pushed");
            desk.leave(self.epoch);
            return Verdict::Failed;
        }
        if self.is_last_posted && self.puts.is_empty() {
            return Verdict::Done;
        }
        if now >= self.deadline {
            return Verdict::Failed;
        }
        match self.post_ready(desk) {
            Ok(posted) => *num_posted += posted,
            Err(error) => {
                tracing::debug!(%error, "KV cannot be pushed");
                return Verdict::Failed;
            }
        }
        Verdict::GoesOn
    }

    /// Posts what is computed and not posted.
    fn post_ready(&mut self, desk: &Desk) -> Result<usize, MemoryError> {
        let mut posted = 0;
        while self.puts.len() < PUTS_MAX
            && let Some((at, layer)) = self.next_layer(&desk.pool)
        {
            let is_last = self.is_last(at, layer, desk.pool.config().num_layers);
            if is_last && !self.puts.is_empty() {
                break;
            }
            if let Some(put) = self.put(at, layer, is_last, desk)? {
                self.puts.push(put);
                self.is_last_posted |= is_last;
                posted += 1;
            }
            self.parts[at].layers_posted = layer + 1;
        }
        Ok(posted)
    }

    /// The next layer of the first part that has one to post: parts go in order, so the last of all comes last.
    fn next_layer(&self, pool: &super::pool::KvPool) -> Option<(usize, u32)> {
        self.offer.as_ref()?;
        let num_layers = pool.config().num_layers;
        let mut parts = self.parts.iter().enumerate();
        let (at, part) = parts.find(|(_, part)| part.layers_posted < num_layers)?;
        (part.layers_posted < part.layers_ready).then_some((at, part.layers_posted))
    }

    /// Whether this is the last layer of the last block that was granted.
    fn is_last(&self, at: usize, layer: u32, num_layers: u32) -> bool {
        let part = &self.parts[at];
        let end = part.first_block + part.blocks.len() as u32;
        let granted = self.offer.as_ref().map_or(0, |it| it.range.end);
        layer + 1 == num_layers && part.first_block < granted && granted <= end
    }

    /// Puts what the taker wants of one layer of a part; `None` where that is nothing.
    fn put(
        &self,
        at: usize,
        layer: u32,
        is_last: bool,
        desk: &Desk,
    ) -> Result<Option<Transfer>, MemoryError> {
        let part = &self.parts[at];
        let Some(Offer { grant, range }) = &self.offer else {
            return Ok(None);
        };
        let start = range.start.max(part.first_block);
        let end = range.end.min(part.first_block + part.blocks.len() as u32);
        if start >= end {
            return Ok(None);
        }
        let blocks =
            &part.blocks[(start - part.first_block) as usize..(end - part.first_block) as usize];
        let pool = &desk.pool;
        let handles = pool.handles(layer..layer + 1, blocks)?;
        pool.seal(&handles)?;
        let now = pool.now();
        let options = TransferOptions {
            timeout: self.deadline.since(now).max(Duration::from_micros(1)),
            first: layer as usize * range.len() + (start - range.start) as usize,
            ends_grant: is_last,
            ..TransferOptions::default()
        };
        let put = pool
            .manager()
            .put(pool.pool(), &handles, grant, &options, now)?;
        Ok(Some(put))
    }
}
