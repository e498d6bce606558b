//! Blocks that this replica keeps for another worker, so that they outlive it.
//!
//! ```text
//!   keep_for ──▶ incoming ── kv_arrived ──▶ kept in host memory, as if the device had evicted them
//!                   │ kv_failed
//!                   ▼
//!                 withheld ── release_hold ──▶ free
//! ```
//!
//! Outside this crate a block of host memory goes by a [`BlockId`] behind those of the device.

use super::{
    block_pool::Chain,
    host_cache::{Before, Kept, Origin},
    moves::{AwaitedBlocks, Hold},
    scheduler::StepScheduler,
};
use crate::{
    hash::{BlockHash, HashSeed},
    ids::{BlockId, TokenId},
};

/// Blocks of host memory that another worker's KV is to be written to.
#[derive(Debug)]
pub(super) struct Incoming {
    seed: HashSeed,
    /// Of the chain up to the last block that is to come.
    token_ids: Vec<TokenId>,
    hashes: Vec<BlockHash>,
    /// Which block of the chain the first of them is.
    first: usize,
    pub(super) host_blocks: Vec<u32>,
}

impl Incoming {
    fn chain(&self) -> Chain<'_> {
        Chain {
            seed: self.seed,
            hashes: &self.hashes,
            token_ids: &self.token_ids,
        }
    }
}

impl StepScheduler {
    /// Makes room in host memory for those blocks of a chain that neither tier has, at most `max_blocks` and as many as
    /// others may fill. Returns where they belong, until [`kv_arrived`](Self::kv_arrived). `None`: there is nothing to bring, or no
    /// room, or a step may still write to host memory.
    pub fn keep_for(
        &mut self,
        seed: HashSeed,
        token_ids: &[TokenId],
        max_blocks: u32,
    ) -> Option<AwaitedBlocks> {
        let is_quiet = self.executing.is_empty() && !self.pool.host.has_copies();
        if !is_quiet || !self.config.enable_prefix_cache {
            return None;
        }
        let hashes = self.hash_prompt(seed, token_ids);
        let chain = Chain {
            seed,
            hashes: &hashes,
            token_ids,
        };
        self.pool.match_prefix(chain, &mut self.matched);
        let found = self.pool.match_host(chain, &self.matched).blocks;
        let first = self.matched.len() + found.len();
        // What they follow must not make room for them.
        self.pool.host.pin_hits(found);
        let num_blocks = (hashes.len() - first).min(max_blocks as usize);
        let num_incoming = self.moves.num_incoming_host_blocks();
        let host_blocks = self.pool.reserve_host(num_blocks, num_incoming);
        self.pool.host.drop_hits();
        if host_blocks.is_empty() {
            return None;
        }
        let end = first + host_blocks.len();
        let hold = self.moves.next_hold();
        let blocks = host_blocks.iter().map(|&it| self.host_block_id(it));
        let awaited = AwaitedBlocks {
            hold,
            first_block: first as u32,
            blocks: blocks.collect(),
        };
        let incoming = Incoming {
            seed,
            token_ids: token_ids[..end * self.block_size()].to_vec(),
            hashes: hashes[..end].to_vec(),
            first,
            host_blocks,
        };
        self.moves.incoming.insert(hold, incoming);
        Some(awaited)
    }

    /// The first `num_blocks` of what was to be kept are there. Those whose beginning has gone meanwhile are of no use, nor
    /// are those at the front that came another way too.
    pub(super) fn kept_arrived(&mut self, incoming: &Incoming, num_blocks: usize) {
        let first = incoming.first;
        let end = first + num_blocks.min(incoming.host_blocks.len());
        let whole = incoming.chain();
        let chain = Chain {
            hashes: &whole.hashes[..end],
            ..whole
        };
        self.pool.match_prefix(chain, &mut self.matched);
        let matched = self.pool.match_host(chain, &self.matched);
        let num_found = self.matched.len() + matched.blocks.len();
        let num_known = num_found.saturating_sub(first);
        let is_useful = num_found >= first;
        let mut before = matched.end;
        let mut num_kept = 0;
        let tokens = chain.token_ids.chunks(self.config.block_size as usize);
        let contents = chain.hashes.iter().zip(tokens).skip(num_found);
        let targets = incoming.host_blocks.iter().skip(num_known);
        for ((&hash, token_ids), &host_block) in contents.zip(targets).filter(|_| is_useful) {
            if self.pool.contains(hash) || self.pool.host.cache.contains(hash) {
                break;
            }
            let content = self.pool.next_content();
            let kept = Kept {
                hash,
                before,
                content,
            };
            let host = &mut self.pool.host;
            host.cache
                .insert(host_block, kept, token_ids, Origin::Received);
            self.pool.events.kept(hash);
            before = Before::Content(content);
            num_kept += 1;
        }
        self.stats.blocks_kept_for_others += num_kept as u64;
        let host = &mut self.pool.host;
        let num_known = num_known.min(incoming.host_blocks.len());
        host.give_back(&incoming.host_blocks[..num_known]);
        host.give_back(&incoming.host_blocks[num_known + num_kept..]);
    }

    /// What host memory keeps of a chain behind the matched blocks, pinned for a reader; nothing while a step may still
    /// have to write it.
    pub(super) fn pin_for_reader(&mut self, chain: Chain<'_>) -> Vec<u32> {
        if !self.executing.is_empty() || self.pool.host.has_copies() {
            return Vec::new();
        }
        let found = self.pool.match_host(chain, &self.matched).blocks;
        for &host_block in &found {
            self.pool.host.cache.pin(host_block);
        }
        found
    }

    /// Gives back blocks of host memory that a hold kept.
    pub(super) fn release_host(&mut self, hold: &Hold) {
        for &host_block in &hold.pinned {
            self.pool.host.unpin(host_block);
        }
        self.pool.host.give_back(&hold.withheld);
    }

    pub(super) fn host_block_id(&self, host_block: u32) -> BlockId {
        BlockId(self.config.num_blocks + host_block)
    }

    /// The hashes of the whole blocks of a prompt.
    pub(super) fn hash_prompt(&self, seed: HashSeed, token_ids: &[TokenId]) -> Vec<BlockHash> {
        let mut parent = seed.0;
        let full_blocks = token_ids.chunks_exact(self.block_size());
        full_blocks
            .map(|tokens| {
                let hash = (self.hash_block)(parent, tokens);
                parent = hash.0;
                hash
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::StepSchedulerConfig;

    /// A sequence goes on while its beginning is being read, and is offered again.
    #[test]
    fn offers_of_one_sequence_that_overlap_are_kept_to_the_end_of_the_longest() {
        let token_ids: Vec<TokenId> = (0..12).collect();
        for is_short_first in [true, false] {
            let mut scheduler = StepScheduler::new(StepSchedulerConfig {
                block_size: 2,
                num_blocks: 16,
                num_host_blocks: 32,
                max_num_batched_tokens: 8,
                max_num_seqs: 4,
                max_model_len: 32,
                ..StepSchedulerConfig::default()
            })
            .unwrap();
            let mut keep = |tokens: &[TokenId]| {
                let awaited = scheduler.keep_for(HashSeed(1), tokens, 99).unwrap();
                (awaited.hold, awaited.blocks.len() as u32)
            };
            let mut arrivals = [keep(&token_ids[..8]), keep(&token_ids)];
            assert_eq!(arrivals.map(|(_, num_blocks)| num_blocks), [4, 6]);
            if !is_short_first {
                arrivals.reverse();
            }
            for (hold, num_blocks) in arrivals {
                assert!(scheduler.kv_arrived(hold, num_blocks));
                scheduler.check_integrity();
            }
            let stats = scheduler.stats();
            assert_eq!(
                (stats.host_blocks_kept, stats.blocks_kept_for_others),
                (6, 6)
            );
        }
    }
}
