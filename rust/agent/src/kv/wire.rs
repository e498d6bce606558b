//! What workers say to each other, checked.

use orchestra_core::{BlockId, Time};
use orchestra_memory::{GrantId, PeerId, RemoteBlock, RemoteGrant, Rights, SlabId};
use orchestra_proto::v1;
use prost::Message as _;

use super::pool::KvPool;

/// Largest payload that a router hands on.
pub(super) const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// The payload; `None` where no router would take it.
pub(super) fn encode(transfer_id: u64, message: v1::kv_message::Message) -> Option<Vec<u8>> {
    let message = Some(message);
    let message = v1::KvMessage {
        transfer_id,
        message,
    };
    let bytes = message.encode_to_vec();
    (bytes.len() <= PAYLOAD_BYTES_MAX).then_some(bytes)
}

pub(super) fn decode(payload: &[u8]) -> Option<(u64, v1::kv_message::Message)> {
    let message = v1::KvMessage::decode(payload).ok()?;
    Some((message.transfer_id, message.message?))
}

/// A grant of blocks in all layers, for the peer. `None` where the layers of a block do not live alike, which would be
/// a fault of ours.
pub(super) fn describe(
    pool: &KvPool,
    grant: &RemoteGrant,
    blocks: &[BlockId],
    first_block: u32,
    now: Time,
) -> Option<v1::KvGrant> {
    let lives =
        |layer: &[RemoteBlock]| -> Vec<u32> { layer.iter().map(|it| it.generation).collect() };
    let mut layers = grant.blocks.chunks(blocks.len());
    let generations = lives(layers.next()?);
    if !layers.all(|layer| lives(layer) == generations) {
        return None;
    }
    Some(v1::KvGrant {
        grant_id: grant.id.0,
        is_write: grant.rights == Rights::Write,
        lasts_us: grant.expires.since(now).as_micros() as u64,
        slab: pool.slab(),
        num_blocks: pool.config().layer_slots(),
        first_block,
        blocks: blocks.iter().map(|&block| pool.place(block)).collect(),
        generations,
    })
}

/// What `owner` grants, and the blocks of the prompt that it is about: at most up to block `end_max`. `None` where it
/// cannot be right.
pub(super) fn read_grant(
    pool: &KvPool,
    grant: &v1::KvGrant,
    owner: PeerId,
    asked: Time,
    end_max: u32,
) -> Option<(RemoteGrant, std::ops::Range<u32>)> {
    let num_blocks = u32::try_from(grant.blocks.len()).ok()?;
    let end = grant.first_block.checked_add(num_blocks)?;
    let is_whole =
        num_blocks > 0 && end <= end_max && grant.generations.len() == grant.blocks.len();
    let is_inside = grant.blocks.iter().all(|&block| block < grant.num_blocks);
    if !is_whole || !is_inside {
        return None;
    }
    let config = pool.config();
    let slots = u64::from(config.num_layers) * u64::from(grant.num_blocks);
    slots.checked_mul(config.layer_block_bytes)?;
    let mut blocks = Vec::with_capacity(grant.blocks.len() * config.num_layers as usize);
    for layer in 0..u64::from(config.num_layers) {
        let lives = grant.blocks.iter().zip(&grant.generations);
        blocks.extend(lives.map(|(&block, &generation)| RemoteBlock {
            slab: SlabId(grant.slab),
            offset: (layer * u64::from(grant.num_blocks) + u64::from(block))
                * config.layer_block_bytes,
            generation,
        }));
    }
    let rights = if grant.is_write {
        Rights::Write
    } else {
        Rights::Read
    };
    let granted = RemoteGrant {
        owner,
        id: GrantId(grant.grant_id),
        rights,
        block_bytes: config.layer_block_bytes,
        expires: asked + std::time::Duration::from_micros(grant.lasts_us),
        blocks,
    };
    Some((granted, grant.first_block..end))
}
