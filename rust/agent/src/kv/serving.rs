//! KV that other workers read here.

use std::time::Duration;

use orchestra_core::{
    BlockId, HashSeed, Time,
    step::{HeldBlocks, HoldId},
};
use orchestra_memory::{GrantId, Lease, PeerId, RemoteGrant, Rights};
use orchestra_proto::v1::{self, kv_message::Message};
use rustc_hash::FxHashMap;

use super::{ending::Ending, inbox::Report, mover::Desk, pool::LEASE_MAX, wire};

/// Workers that may read here at a time, or wait to; one more is refused and computes.
const SERVINGS_MAX: usize = 128;
/// What is waited beyond the end of a lease before the blocks are looked at.
const LEASE_SLACK: Duration = Duration::from_millis(1);

/// A question that the step loop has not answered.
struct Asked {
    worker_id: String,
    transfer_id: u64,
    ask: v1::KvAsk,
}

/// Blocks that a peer may read.
struct Serving {
    worker_id: String,
    transfer_id: u64,
    peer: PeerId,
    hold: HoldId,
    blocks: Vec<BlockId>,
    expires: Time,
}

/// All of them.
#[derive(Default)]
pub(super) struct Servings {
    asked: FxHashMap<u64, Asked>,
    num_asked: u64,
    granted: FxHashMap<GrantId, Serving>,
}

impl Servings {
    pub(super) fn is_empty(&self) -> bool {
        self.granted.is_empty()
    }

    /// A worker wants to read the beginning of a prompt.
    pub(super) fn on_ask(
        &mut self,
        worker_id: &str,
        transfer_id: u64,
        mut ask: v1::KvAsk,
        is_offered: bool,
        desk: &mut Desk,
    ) {
        let is_full = self.asked.len() + self.granted.len() >= SERVINGS_MAX;
        if is_full || ask.to_epoch != desk.pool.announcement().epoch || ask.from.is_none() {
            desk.send(worker_id, transfer_id, Message::Refusal(v1::KvRefusal {}));
            return;
        }
        self.num_asked += 1;
        desk.report(Report::Wanted {
            number: self.num_asked,
            hash_seed: HashSeed(ask.hash_seed),
            token_ids: std::mem::take(&mut ask.token_ids),
            is_offered,
        });
        let asked = Asked {
            worker_id: worker_id.to_owned(),
            transfer_id,
            ask,
        };
        self.asked.insert(self.num_asked, asked);
    }

    /// What the step loop has found of it, and holds. Returns the move where it is refused.
    pub(super) fn on_held(
        &mut self,
        number: u64,
        held: Option<&HeldBlocks>,
        desk: &mut Desk,
    ) -> Option<u64> {
        let asked = self.asked.remove(&number);
        let hold = held.map(|it| it.hold);
        let served = asked
            .as_ref()
            .zip(held)
            .and_then(|(asked, held)| serve(asked, held, desk));
        if let Some((grant, serving)) = served {
            self.granted.insert(grant, serving);
            return None;
        }
        if let Some(hold) = hold {
            desk.report(Report::Released(hold));
        }
        let asked = asked?;
        let refusal = Message::Refusal(v1::KvRefusal {});
        desk.send(&asked.worker_id, asked.transfer_id, refusal);
        Some(asked.transfer_id)
    }

    /// The reader says that it is done. Returns the move, and how many blocks it was about.
    pub(super) fn on_read(&mut self, grant: GrantId, desk: &mut Desk) -> Option<(u64, usize)> {
        let serving = self.granted.remove(&grant)?;
        let read = (serving.transfer_id, serving.blocks.len());
        desk.endings.add(Ending {
            holds: vec![serving.hold],
            blocks: serving.blocks,
            answer: None,
        });
        Some(read)
    }

    /// Whether this move is, or is to become, a reading here.
    pub(super) fn serves(&self, worker_id: &str, transfer_id: u64) -> bool {
        let is_it = |worker: &str, transfer| worker == worker_id && transfer == transfer_id;
        let mut asked = self.asked.values();
        let mut granted = self.granted.values();
        asked.any(|it| is_it(&it.worker_id, it.transfer_id))
            || granted.any(|it| is_it(&it.worker_id, it.transfer_id))
    }

    /// The reader does not want it any more.
    pub(super) fn on_stop(&mut self, worker_id: &str, transfer_id: u64, desk: &mut Desk) {
        let is_it = |it: &Serving| it.transfer_id == transfer_id && it.worker_id == worker_id;
        let mut granted = self.granted.iter();
        let found = granted
            .find(|(_, it)| is_it(it))
            .map(|(&id, it)| (id, it.peer));
        if let Some((grant, peer)) = found {
            // It may have ended by its time.
            let _ = desk.pool.manager().settle(grant, peer);
            self.on_read(grant, desk);
        }
    }

    /// Ends what has lasted for as long as it may: the manager keeps the blocks a little longer.
    pub(super) fn poll(&mut self, desk: &mut Desk) {
        let now = desk.pool.now();
        let is_over = |it: &Serving| now >= it.expires + LEASE_SLACK;
        let over: Vec<GrantId> = self
            .granted
            .iter()
            .filter(|(_, it)| is_over(it))
            .map(|(&id, _)| id)
            .collect();
        for grant in over {
            self.on_read(grant, desk);
        }
    }
}

/// Grants what the asker lacks of the held blocks; `None` where there is nothing, or it cannot be.
fn serve(asked: &Asked, held: &HeldBlocks, desk: &mut Desk) -> Option<(GrantId, Serving)> {
    let first = asked.ask.first_block as usize;
    let blocks = held
        .blocks
        .get(first..)
        .filter(|it| !it.is_empty())?
        .to_vec();
    let peer = desk.connect(asked.ask.from.as_ref()?)?;
    let grant = match grant(asked, peer, &blocks, desk) {
        Ok(grant) => grant,
        Err(error) => {
            tracing::debug!(%error, "KV blocks cannot be granted");
            return None;
        }
    };
    let described = wire::describe(
        &desk.pool,
        &grant,
        &blocks,
        asked.ask.first_block,
        desk.pool.now(),
    );
    let is_sent = described
        .is_some_and(|it| desk.send(&asked.worker_id, asked.transfer_id, Message::Grant(it)));
    let serving = Serving {
        worker_id: asked.worker_id.clone(),
        transfer_id: asked.transfer_id,
        peer,
        hold: held.hold,
        blocks,
        // Where nobody has heard of it, it is over.
        expires: if is_sent { grant.expires } else { Time::ZERO },
    };
    if !is_sent {
        let _ = desk.pool.manager().settle(grant.id, peer);
    }
    Some((grant.id, serving))
}

fn grant(
    asked: &Asked,
    peer: PeerId,
    blocks: &[BlockId],
    desk: &Desk,
) -> Result<RemoteGrant, orchestra_memory::MemoryError> {
    let pool = &desk.pool;
    let handles = pool.handles(0..pool.config().num_layers, blocks)?;
    pool.seal(&handles)?;
    let timeout = Duration::from_millis(u64::from(asked.ask.timeout_ms));
    let lease = Lease {
        peer,
        rights: Rights::Read,
        lasts: timeout.clamp(Duration::from_millis(1), LEASE_MAX),
    };
    pool.manager()
        .grant(pool.pool(), &handles, lease, pool.now())
}
