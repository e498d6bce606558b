//! KV that this worker takes: what is on its way, and what becomes of it.
//!
//! ```text
//!   pull   asked ── grant ──▶ getting ── done ──▶ arrived
//!   push   granted ── the peer's last write ──▶ arrived
//!          any of them ── refusal, deadline, abort, loss ──▶ ending, when quiet: released
//! ```

use std::time::Duration;

use orchestra_core::{BlockId, Time, step::HoldId};
use orchestra_memory::{GrantId, Lease, PeerId, Rights, Transfer, TransferError, TransferOptions};
use orchestra_proto::v1::{self, kv_message::Message};
use rustc_hash::FxHashMap;

use super::{
    inbox::{Report, TakeOrder},
    mover::Desk,
    wire,
};

/// How long a peer that was told to stop may take to say that it has. Then its connection is closed, which proves it.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// How often the router is asked, by a message for the peer, whether the peer is still attached.
const PING_EVERY: Duration = Duration::from_millis(250);

/// Where a move stands.
enum Stage {
    /// The holder was asked for a grant.
    Asked(Time),
    /// The first so many blocks are being read.
    Getting(Transfer, u32),
    /// The peer may write.
    Granted(GrantId),
    /// The peer was told to stop writing, and has until then to say so.
    Stopping(GrantId, Time),
}

struct Incoming {
    hold: HoldId,
    worker_id: String,
    epoch: u64,
    peer: PeerId,
    first_block: u32,
    blocks: Vec<BlockId>,
    deadline: Time,
    pinged: Time,
    stage: Stage,
}

/// All of them, by transfer.
#[derive(Default)]
pub(super) struct IncomingMoves(FxHashMap<u64, Incoming>);

impl IncomingMoves {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Asks for blocks, or lets a peer write them.
    pub(super) fn take(&mut self, order: TakeOrder, desk: &mut Desk) {
        let TakeOrder { hold, source, .. } = &order;
        let (hold, transfer_id) = (*hold, source.transfer_id);
        let Some(from) = source.peer.clone() else {
            return desk.give_up(hold);
        };
        let is_known = self.0.contains_key(&transfer_id);
        let peer = desk.connect(&from).filter(|_| !is_known);
        let Some(peer) = peer else {
            desk.send(&from.worker_id, transfer_id, Message::Stop(v1::KvStop {}));
            return desk.give_up(hold);
        };
        let deadline = desk.pool.time_of(order.deadline);
        let stage = if source.is_pushed {
            offer(&order, peer, deadline, desk)
        } else {
            ask(&order, &from, desk)
        };
        let Some(stage) = stage else {
            return desk.give_up(hold);
        };
        let incoming = Incoming {
            hold,
            worker_id: from.worker_id,
            epoch: from.epoch,
            peer,
            first_block: order.first_block,
            blocks: order.blocks,
            deadline,
            pinged: desk.pool.now(),
            stage,
        };
        self.0.insert(transfer_id, incoming);
    }

    /// The holder lets us read.
    pub(super) fn on_grant(
        &mut self,
        worker_id: &str,
        transfer_id: u64,
        grant: &v1::KvGrant,
        desk: &mut Desk,
    ) {
        let found = self.0.get_mut(&transfer_id);
        let Some(incoming) = found.filter(|it| it.worker_id == worker_id) else {
            // Given up meanwhile: the holder need not hold it any longer.
            desk.send(worker_id, transfer_id, Message::Stop(v1::KvStop {}));
            return;
        };
        let Stage::Asked(asked) = incoming.stage else {
            return;
        };
        match incoming.get(grant, asked, desk) {
            Some(stage) => incoming.stage = stage,
            None => self.stop(transfer_id, desk),
        }
    }

    /// It does not come, and the peer is quiet.
    pub(super) fn on_refusal(&mut self, worker_id: &str, transfer_id: u64, desk: &mut Desk) {
        let found = self.0.get(&transfer_id);
        let Some(incoming) = found.filter(|it| it.worker_id == worker_id) else {
            return;
        };
        match incoming.stage {
            Stage::Asked(_) => {}
            Stage::Getting(..) => return,
            Stage::Granted(grant) | Stage::Stopping(grant, _) => {
                // Unknown where the peer's connection has ended meanwhile, which proves as much.
                let _ = desk.pool.manager().settle(grant, incoming.peer);
            }
        }
        self.end(transfer_id, desk);
    }

    /// The peer has written its last byte under one of our grants.
    pub(super) fn on_written(&mut self, grant: GrantId, desk: &mut Desk) {
        let mut moves = self.0.iter();
        let is_it = |it: &Incoming| matches!(it.stage, Stage::Granted(id) if id == grant);
        let Some(transfer_id) = moves.find(|(_, it)| is_it(it)).map(|(&id, _)| id) else {
            return;
        };
        let Some(incoming) = self.0.remove(&transfer_id) else {
            return;
        };
        match desk.pool.renew(&incoming.blocks) {
            Ok(()) => desk.arrived(incoming.hold, incoming.blocks.len() as u32),
            Err(error) => {
                tracing::error!(%error, "KV that arrived cannot be used");
                desk.fail(incoming.hold, incoming.blocks);
            }
        }
    }

    /// Nobody wants these blocks any more.
    pub(super) fn abandon(&mut self, hold: HoldId, desk: &mut Desk) {
        let mut moves = self.0.iter();
        let found = moves.find(|(_, it)| it.hold == hold).map(|(&id, _)| id);
        if let Some(transfer_id) = found {
            self.stop(transfer_id, desk);
        }
    }

    pub(super) fn abandon_all(&mut self, desk: &mut Desk) {
        for transfer_id in self.0.keys().copied().collect::<Vec<_>>() {
            self.stop(transfer_id, desk);
        }
    }

    /// The router cannot reach this worker: what waits for a message of it waits in vain.
    pub(super) fn lost_touch(&mut self, worker_id: &str, desk: &mut Desk) {
        let theirs = self.0.iter().filter(|(_, it)| it.worker_id == worker_id);
        let waiting = theirs.filter(|(_, it)| !matches!(it.stage, Stage::Getting(..)));
        for transfer_id in waiting.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.stop(transfer_id, desk);
        }
    }

    /// Looks at every move once.
    pub(super) fn poll(&mut self, desk: &mut Desk) {
        let now = desk.pool.now();
        let mut over = Vec::new();
        for (&id, incoming) in &mut self.0 {
            incoming.ping(id, now, desk);
            let is_due = match &incoming.stage {
                Stage::Getting(transfer, _) => transfer.result().is_some(),
                Stage::Stopping(_, until) => now >= *until,
                Stage::Asked(_) | Stage::Granted(_) => false,
            };
            let is_stopping = matches!(incoming.stage, Stage::Stopping(..));
            if is_due || (now >= incoming.deadline && !is_stopping) {
                over.push(id);
            }
        }
        for id in over {
            self.turn(id, desk);
        }
    }

    /// A move whose time has come, one way or the other.
    fn turn(&mut self, transfer_id: u64, desk: &mut Desk) {
        let Some(incoming) = self.0.get(&transfer_id) else {
            return;
        };
        let result = match &incoming.stage {
            Stage::Getting(transfer, num_blocks) => transfer.result().map(|it| (it, *num_blocks)),
            Stage::Stopping(..) => {
                // It said nothing. Closed from here, it is quiet when it is dead or has closed its end too.
                let epoch = incoming.epoch;
                desk.leave(epoch);
                return self.end(transfer_id, desk);
            }
            Stage::Asked(_) | Stage::Granted(_) => None,
        };
        match result {
            Some((Ok(_), num_blocks)) => {
                let hold = incoming.hold;
                self.0.remove(&transfer_id);
                desk.arrived(hold, num_blocks);
            }
            Some((Err(error), _)) => {
                tracing::debug!(%error, "KV did not come");
                if matches!(
                    error,
                    TransferError::PeerGone | TransferError::Transport { .. }
                ) {
                    let epoch = incoming.epoch;
                    desk.leave(epoch);
                }
                self.stop(transfer_id, desk);
            }
            None => self.stop(transfer_id, desk),
        }
    }

    /// Gives a move up.
    fn stop(&mut self, transfer_id: u64, desk: &mut Desk) {
        let Some(incoming) = self.0.get_mut(&transfer_id) else {
            return;
        };
        let stop = Message::Stop(v1::KvStop {});
        match &incoming.stage {
            Stage::Stopping(..) => return,
            Stage::Asked(_) => {}
            Stage::Getting(transfer, _) => transfer.abort(),
            Stage::Granted(grant) => {
                let grant = *grant;
                // The blocks are nobody's from here on, until the peer says that it has stopped.
                let _ = desk.pool.manager().revoke(grant);
                let until = desk.pool.now() + STOP_GRACE;
                incoming.stage = Stage::Stopping(grant, until);
                desk.report(Report::Failed(incoming.hold));
                desk.send(&incoming.worker_id, transfer_id, stop);
                return;
            }
        }
        desk.send(&incoming.worker_id, transfer_id, stop);
        self.end(transfer_id, desk);
    }

    /// The blocks go back when they are quiet.
    fn end(&mut self, transfer_id: u64, desk: &mut Desk) {
        if let Some(incoming) = self.0.remove(&transfer_id) {
            desk.fail(incoming.hold, incoming.blocks);
        }
    }
}

impl Incoming {
    /// A peer that has died says nothing: the router does, when it cannot hand a message on.
    fn ping(&mut self, transfer_id: u64, now: Time, desk: &Desk) {
        let waits = matches!(self.stage, Stage::Asked(_) | Stage::Granted(_));
        if waits && now >= self.pinged + PING_EVERY {
            self.pinged = now;
            desk.send(&self.worker_id, transfer_id, Message::Ping(v1::KvPing {}));
        }
    }

    /// Reads as much as the holder has. `None` where its grant is of no use.
    fn get(&self, grant: &v1::KvGrant, asked: Time, desk: &Desk) -> Option<Stage> {
        let end_max = self.first_block + self.blocks.len() as u32;
        let (granted, range) = wire::read_grant(&desk.pool, grant, self.peer, asked, end_max)?;
        if range.start != self.first_block || granted.rights != Rights::Read {
            return None;
        }
        let num_blocks = range.end - range.start;
        let pool = &desk.pool;
        let blocks = &self.blocks[..num_blocks as usize];
        let into = pool.handles(0..pool.config().num_layers, blocks).ok()?;
        let now = pool.now();
        let options = TransferOptions {
            timeout: self.deadline.since(now).max(Duration::from_micros(1)),
            ..TransferOptions::default()
        };
        let manager = pool.manager();
        match manager.get(&granted, pool.pool(), &into, &options, now) {
            Ok(transfer) => Some(Stage::Getting(transfer, num_blocks)),
            Err(error) => {
                tracing::debug!(%error, "KV cannot be read");
                None
            }
        }
    }
}

fn ask(order: &TakeOrder, from: &v1::KvPeer, desk: &mut Desk) -> Option<Stage> {
    let asked = desk.pool.now();
    let ask = v1::KvAsk {
        from: Some(desk.ourselves()),
        to_epoch: from.epoch,
        hash_seed: order.hash_seed.0,
        token_ids: order.token_ids.clone(),
        first_block: order.first_block,
        timeout_ms: order.source.timeout_ms,
    };
    let sent = desk.send(&from.worker_id, order.source.transfer_id, Message::Ask(ask));
    sent.then_some(Stage::Asked(asked))
}

fn offer(order: &TakeOrder, peer: PeerId, deadline: Time, desk: &mut Desk) -> Option<Stage> {
    let pool = &desk.pool;
    let now = pool.now();
    let handles = pool
        .handles(0..pool.config().num_layers, &order.blocks)
        .ok()?;
    let lease = Lease {
        peer,
        rights: Rights::Write,
        lasts: deadline.since(now).max(Duration::from_micros(1)),
    };
    let grant = pool.manager().grant(pool.pool(), &handles, lease, now);
    let grant = match grant {
        Ok(grant) => grant,
        Err(error) => {
            tracing::debug!(%error, "KV blocks cannot be granted");
            return None;
        }
    };
    let described = wire::describe(pool, &grant, &order.blocks, order.first_block, now);
    let worker_id = order.source.peer.as_ref().map(|it| it.worker_id.clone());
    let transfer_id = order.source.transfer_id;
    let is_sent = described
        .zip(worker_id)
        .is_some_and(|(offer, worker)| desk.send(&worker, transfer_id, Message::Grant(offer)));
    if !is_sent {
        // Nobody has heard of it.
        let _ = desk.pool.manager().settle(grant.id, peer);
        return None;
    }
    Some(Stage::Granted(grant.id))
}
