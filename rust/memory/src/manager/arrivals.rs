//! What a peer says at the end of a transfer, checked by the owner of the blocks before anybody believes it.

use super::{BufferManager, EVENTS_MAX, ManagerState};
use crate::{
    lease::{GrantId, Reader, RemoteBlock, Rights, digest},
    pool::BlockHandle,
    transfer::TransferOptions,
    transport::{Notification, PeerId},
};

/// A peer has filled, or read, blocks of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Who.
    pub peer: PeerId,
    /// Under which grant.
    pub grant: GrantId,
    /// What it was allowed: blocks of a write grant hold its bytes now, those of a read grant have been read.
    pub rights: Rights,
    /// The peer's number for the transfer.
    pub transfer: u64,
    /// The blocks.
    pub handles: Vec<BlockHandle>,
    /// Whether the grant is over with it. Only then can blocks that were filled be sealed.
    pub ends_grant: bool,
    /// What the peer added.
    pub payload: Vec<u8>,
}

/// Something that happened to memory of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A peer's transfer is over and was allowed.
    Arrived(Arrival),
    /// A peer's transfer is over, but its grant had ended or named other lives of the blocks: nothing arrived.
    Stale {
        /// Who.
        peer: PeerId,
        /// The grant that the peer named.
        grant: GrantId,
    },
    /// A peer sent what no manager sends. Nothing changed.
    Malformed(PeerId),
    /// A lease ended before the peer said that it was done: its blocks are in quarantine.
    WriteGrantExpired(GrantId),
}

const MAGIC: u8 = 0xB1;
const ENDS_GRANT: u8 = 1;

/// The notification of a transfer: which grant, which of its blocks, in which life.
pub(super) fn encode(
    grant: GrantId,
    transfer: u64,
    blocks: &[RemoteBlock],
    options: &TransferOptions,
) -> Vec<u8> {
    let mut bytes = vec![MAGIC, u8::from(options.ends_grant) * ENDS_GRANT];
    bytes.extend(grant.0.to_le_bytes());
    bytes.extend(transfer.to_le_bytes());
    bytes.extend((options.first as u32).to_le_bytes());
    bytes.extend((blocks.len() as u32).to_le_bytes());
    bytes.extend(digest(blocks.iter().map(|block| block.generation)).to_le_bytes());
    bytes.extend(&options.payload);
    bytes
}

struct Claim {
    grant: GrantId,
    transfer: u64,
    first: usize,
    len: usize,
    digest: u64,
    ends_grant: bool,
    payload: Vec<u8>,
}

fn decode(bytes: &[u8], max_payload: usize) -> Option<Claim> {
    let mut reader = Reader(bytes);
    let [magic, flags] = reader.take()?;
    let claim = Claim {
        grant: GrantId(reader.u64()?),
        transfer: reader.u64()?,
        first: reader.u32()? as usize,
        len: reader.u32()? as usize,
        digest: reader.u64()?,
        ends_grant: flags == ENDS_GRANT,
        payload: reader.0.to_vec(),
    };
    (magic == MAGIC && flags <= ENDS_GRANT && claim.payload.len() <= max_payload).then_some(claim)
}

impl BufferManager {
    /// Takes what peers have said, while there is room for it.
    pub(super) fn take_notifications(&self, state: &mut ManagerState) -> usize {
        let mut taken = 0;
        for transport in &self.transports {
            while state.events.len() < EVENTS_MAX
                && let Some(notification) = transport.take_notification()
            {
                taken += 1;
                let event = self.judge(state, notification);
                state.events.push_back(event);
            }
        }
        taken
    }

    fn judge(&self, state: &mut ManagerState, notification: Notification) -> Event {
        let Notification { peer, payload } = notification;
        let Some(claim) = decode(&payload, self.config.max_payload_bytes) else {
            return Event::Malformed(peer);
        };
        let grant = state
            .grants
            .get(claim.grant)
            .filter(|grant| grant.peer == peer);
        let arrival = grant.and_then(|grant| {
            let end = claim.first.checked_add(claim.len)?;
            let handles = grant.handles.get(claim.first..end)?;
            let is_same = digest(handles.iter().map(|handle| handle.generation)) == claim.digest;
            is_same.then(|| Arrival {
                peer,
                grant: claim.grant,
                rights: grant.rights,
                transfer: claim.transfer,
                handles: handles.to_vec(),
                ends_grant: claim.ends_grant,
                payload: claim.payload,
            })
        });
        // Over is over, also for a grant that had ended: this is the proof that its blocks waited for.
        if claim.ends_grant {
            state.grants.settle(claim.grant, peer);
        }
        let grant = claim.grant;
        arrival.map_or(Event::Stale { peer, grant }, Event::Arrived)
    }
}
