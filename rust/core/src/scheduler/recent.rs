//! The blocks that one worker was given last: forgets the least recently used.
//!
//! A prompt's blocks are marked as used from the last to the first, so a block is always used more recently than those
//! that follow it in any prompt. The oldest of all is therefore never in the middle of a chain, and what is left after
//! forgetting it is still chains from their first block on: the index's rule that holder sets are nested.
//!
//! Memory: 24 bytes a block and 4 to 8 for its place in the hash table; the index's entry (20 to 30) is besides.

use super::{chunks::Chunks, standing::NIL};
use crate::{hash::BlockHash, time::Time};

/// Blocks that are looked up together.
const WARM: usize = 32;

/// Nodes that are allocated together: 6 KiB.
const NODES: usize = 256;

/// One remembered block. 24 bytes.
#[derive(Clone, Copy, Debug)]
struct Node {
    hash: BlockHash,
    /// Neighbours by use. Of a free node, `older` is the next free one.
    older: u32,
    newer: u32,
    /// The next node of the same bucket.
    next: u32,
    /// When a prompt last used it, in seconds.
    used_at_s: u32,
}

/// The blocks of one worker, by use and by hash.
#[derive(Clone, Debug)]
pub(super) struct RecentBlocks {
    max_blocks: usize,
    ttl_s: u32,
    nodes: Chunks<Node, NODES>,
    /// Head of the list of free nodes.
    free: u32,
    oldest: u32,
    newest: u32,
    /// First node of each bucket. Linear hashing: buckets are added one at a time and split one other each, so no
    /// insertion waits for a rehash of all.
    buckets: Vec<u32>,
    len: usize,
}

/// What the index is to hear of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Blocks that are no longer remembered. To be taken out before `stored` is put in: a block may be in both.
    pub(super) removed: Vec<BlockHash>,
    pub(super) stored: Vec<BlockHash>,
}

impl RecentBlocks {
    /// Nothing remembered. `ttl_s` 0: no block is forgotten for its age.
    pub(super) fn new(max_blocks: usize, ttl_s: u32) -> Self {
        Self {
            max_blocks,
            ttl_s,
            nodes: Chunks::default(),
            free: NIL,
            oldest: NIL,
            newest: NIL,
            buckets: Vec::new(),
            len: 0,
        }
    }

    /// Marks the blocks of a chain as used; as many from the first on as can be remembered. O(chain).
    pub(super) fn touch(&mut self, chain: &[BlockHash], now: Time) -> Change {
        let mut change = Change {
            removed: self.expire(now),
            stored: Vec::new(),
        };
        let remembered = &chain[..chain.len().min(self.max_blocks)];
        self.warm(remembered);
        for &hash in remembered.iter().rev() {
            let at = if let Some(at) = self.find(hash) {
                self.unlink(at);
                at
            } else {
                if self.len == self.max_blocks {
                    change.removed.extend(self.forget_oldest());
                }
                change.stored.push(hash);
                self.insert(hash)
            };
            self.nodes[at as usize].used_at_s = seconds(now);
            self.link_newest(at);
        }
        change
    }

    /// Forgets the blocks whose time is over; names them. O(that).
    pub(super) fn expire(&mut self, now: Time) -> Vec<BlockHash> {
        let mut removed = Vec::new();
        if self.ttl_s == 0 {
            return removed;
        }
        while let Some(oldest) = self.nodes.get(self.oldest as usize)
            && seconds(now) >= oldest.used_at_s.saturating_add(self.ttl_s)
        {
            removed.extend(self.forget_oldest());
        }
        removed
    }

    /// Forgets everything and gives the memory back.
    pub(super) fn clear(&mut self) {
        self.nodes = Chunks::default();
        self.buckets = Vec::new();
        (self.free, self.oldest, self.newest) = (NIL, NIL, NIL);
        self.len = 0;
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.nodes.heap_bytes() + self.buckets.capacity() * size_of::<u32>()
    }

    /// # Panics
    /// If the lists and the buckets do not agree.
    pub(super) fn check_integrity(&self) {
        let mut older = NIL;
        let mut at = self.oldest;
        let mut count = 0;
        while at != NIL {
            let node = &self.nodes[at as usize];
            assert_eq!(node.older, older);
            assert_eq!(self.find(node.hash), Some(at), "a block is lost");
            (older, at) = (at, node.newer);
            count += 1;
        }
        assert_eq!(older, self.newest);
        assert_eq!(count, self.len);
        assert!(self.len <= self.max_blocks && self.len <= self.buckets.len());
        assert!(self.nodes.len() <= self.max_blocks);
    }
}

// === the order of use ===

impl RecentBlocks {
    fn unlink(&mut self, at: u32) {
        let Node { older, newer, .. } = self.nodes[at as usize];
        match older {
            NIL => self.oldest = newer,
            _ => self.nodes[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            _ => self.nodes[newer as usize].older = older,
        }
    }

    fn link_newest(&mut self, at: u32) {
        let node = &mut self.nodes[at as usize];
        (node.older, node.newer) = (self.newest, NIL);
        match self.newest {
            NIL => self.oldest = at,
            newest => self.nodes[newest as usize].newer = at,
        }
        self.newest = at;
    }

    fn forget_oldest(&mut self) -> Option<BlockHash> {
        let at = self.oldest;
        let hash = self.nodes.get(at as usize)?.hash;
        self.unlink(at);
        let next = self.nodes[at as usize].next;
        let bucket = self.bucket_of(hash);
        let mut before = self.buckets[bucket];
        if before == at {
            self.buckets[bucket] = next;
        } else {
            while self.nodes[before as usize].next != at {
                before = self.nodes[before as usize].next;
            }
            self.nodes[before as usize].next = next;
        }
        self.nodes[at as usize].older = self.free;
        self.free = at;
        self.len -= 1;
        Some(hash)
    }
}

// === the hash table ===

impl RecentBlocks {
    fn find(&self, hash: BlockHash) -> Option<u32> {
        let mut at = *self.buckets.get(self.bucket_of(hash))?;
        while at != NIL {
            let node = &self.nodes[at as usize];
            if node.hash == hash {
                return Some(at);
            }
            at = node.next;
        }
        None
    }

    /// Reads where the blocks are, or would be, so that their cache lines arrive together rather than one after the
    /// other.
    fn warm(&self, hashes: &[BlockHash]) {
        if self.buckets.is_empty() {
            return;
        }
        let mut sum = 0;
        for hashes in hashes.chunks(WARM) {
            let mut heads = [NIL; WARM];
            for (head, &hash) in heads.iter_mut().zip(hashes) {
                *head = self.buckets[self.bucket_of(hash)];
            }
            for head in heads {
                let node = self.nodes.get(head as usize);
                sum ^= node.map_or(0, |node| node.older ^ node.newer);
            }
        }
        std::hint::black_box(sum);
    }

    /// Adds a block that is not there, without a place in the order of use.
    fn insert(&mut self, hash: BlockHash) -> u32 {
        if self.len == self.buckets.len() {
            self.add_bucket();
        }
        let bucket = self.bucket_of(hash);
        let node = Node {
            hash,
            older: NIL,
            newer: NIL,
            next: self.buckets[bucket],
            used_at_s: 0,
        };
        let at = if let Some(empty) = self.nodes.get_mut(self.free as usize) {
            let at = self.free;
            self.free = empty.older;
            *empty = node;
            at
        } else {
            self.nodes.push(node) as u32
        };
        self.buckets[bucket] = at;
        self.len += 1;
        at
    }

    /// Adds a bucket and deals the nodes out again of the one whose keys it shares.
    fn add_bucket(&mut self) {
        let added = self.buckets.len();
        self.buckets.push(NIL);
        if added == 0 {
            return;
        }
        let split = added - (1 << added.ilog2());
        let mut at = std::mem::replace(&mut self.buckets[split], NIL);
        while at != NIL {
            let Node { hash, next, .. } = self.nodes[at as usize];
            let bucket = self.bucket_of(hash);
            self.nodes[at as usize].next = self.buckets[bucket];
            self.buckets[bucket] = at;
            at = next;
        }
    }

    /// By as many low bits as name all buckets; one less for a bucket that is not there yet.
    fn bucket_of(&self, hash: BlockHash) -> usize {
        // Spreads small integers too; a real block hash is spread already.
        let spread = (hash.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize;
        let mask = self.buckets.len().next_power_of_two() - 1;
        let bucket = spread & mask;
        if bucket < self.buckets.len() {
            bucket
        } else {
            spread & (mask >> 1)
        }
    }
}

fn seconds(now: Time) -> u32 {
    u32::try_from(now.0 / 1_000_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Families share their first blocks, as prompts do: blocks 0 to 3 of all, 4 to 7 of every other one.
    fn chain(family: u64, len: u64) -> Vec<BlockHash> {
        let block = |at: u64| match at {
            0..4 => at,
            4..8 => at + 100 * (family % 2 + 1),
            _ => at + 1000 * (family + 1),
        };
        (0..len).map(|at| BlockHash(block(at))).collect()
    }

    proptest! {
        #[test]
        fn it_equals_a_list_by_use(
            max_blocks in 1_usize..40,
            ttl_s in 0_u32..6,
            steps in prop::collection::vec((0_u64..6, 0_u64..24, 0_u64..3, 0_u8..20), 1..80),
        ) {
            let mut real = RecentBlocks::new(max_blocks, ttl_s);
            // Least recently used first, with the time of use.
            let mut naive: Vec<(BlockHash, u64)> = Vec::new();
            let mut held: BTreeSet<BlockHash> = BTreeSet::new();
            let mut now_s = 0;
            for (family, len, seconds, op) in steps {
                now_s += seconds;
                if op == 0 {
                    real.clear();
                    naive.clear();
                    held.clear();
                    prop_assert_eq!(real.heap_bytes(), 0);
                }
                let chain = chain(family, len);
                let change = real.touch(&chain, Time(now_s * 1_000_000));
                naive.retain(|&(_, used)| ttl_s == 0 || now_s - used < u64::from(ttl_s));
                for &hash in chain.iter().take(max_blocks).rev() {
                    naive.retain(|&(other, _)| other != hash);
                    naive.push((hash, now_s));
                }
                let excess = naive.len().saturating_sub(max_blocks);
                naive.drain(..excess);

                prop_assert!(change.removed.iter().all(|hash| held.remove(hash)));
                prop_assert!(change.stored.iter().all(|&hash| held.insert(hash)));
                prop_assert!(held.iter().eq(naive.iter().map(|(hash, _)| hash).collect::<BTreeSet<_>>()));
                real.check_integrity();
            }
        }
    }

    #[test]
    fn a_block_costs_little_memory() {
        let mut recent = RecentBlocks::new(1 << 16, 0);
        let chain: Vec<BlockHash> = (0..1 << 17).map(BlockHash).collect();
        for prompt in chain.chunks(32) {
            recent.touch(prompt, Time::ZERO);
        }
        assert_eq!(size_of::<Node>(), 24);
        // And what says where each piece is.
        let pieces = (1 << 16) / NODES * size_of::<Vec<Node>>();
        assert!(
            recent.heap_bytes() <= (1 << 16) * 28 + pieces,
            "at a full power of two"
        );
        recent.check_integrity();
    }
}
