//! Blocks that host memory keeps by their hash: the second level of the prefix cache.
//!
//! **Hashes find, tokens prove**, as on the device. There a block's parent is another block; here it may be on either
//! side, so what a prefix is gets a number when it is first cached, its [`ContentId`], and a block is found again only
//! after the content that it followed. The number goes with the KV from one tier to the other.
//!
//! **Both tiers together are closed under parents.** Where a content leaves them, what host memory keeps of its
//! continuations goes too: nobody could reach it, and routers count on it.

use rustc_hash::FxHashMap;

use super::lru::LruList;
use crate::{
    hash::{BlockHash, HashSeed},
    ids::{BlockId, TokenId},
};

/// One prefix of whole blocks, as long as a tier holds its last block; never given out twice by one scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ContentId(pub(super) u64);

/// What comes before a block, wherever that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    /// Nothing: the block is the first of its chain.
    Seed(HashSeed),
    /// A content that one of the tiers holds.
    Content(ContentId),
}

/// What a block of host memory holds, besides its tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) hash: BlockHash,
    pub(super) before: Before,
    pub(super) content: ContentId,
}

/// Where a kept block came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The device's cache gave it up.
    Evicted,
    /// Another worker wrote it through to this one.
    Received,
}

#[derive(Clone, Copy, Debug, Default)]
struct HostBlock {
    /// Set while the block can be found.
    kept: Option<Kept>,
    /// Readers that keep it from being used anew.
    num_pins: u32,
    is_received: bool,
}

/// Blocks that were taken out, and what of it is to be told.
#[derive(Debug, Default)]
pub(super) struct Gone {
    /// Free from now on.
    pub(super) blocks: Vec<u32>,
    /// Not held by this tier any more, children before parents.
    pub(super) hashes: Vec<BlockHash>,
}

/// The kept blocks. Which of host memory's blocks are free is for [`HostTier`](super::host_tier::HostTier) to know.
#[derive(Debug)]
pub(super) struct HostCache {
    block_size: usize,
    blocks: Vec<HostBlock>,
    /// `[num_blocks, block_size]`; a row means something while its block is kept.
    token_ids: Vec<TokenId>,
    index: FxHashMap<BlockHash, u32>,
    /// Kept blocks by the content that they follow.
    children: FxHashMap<ContentId, Vec<u32>>,
    /// Kept blocks that nobody reads, by where they came from.
    evicted: LruList,
    received: LruList,
    num_received: usize,
}

impl HostCache {
    pub(super) fn new(num_blocks: u32, block_size: u32) -> Self {
        let (count, block_size) = (num_blocks as usize, block_size as usize);
        Self {
            block_size,
            blocks: vec![HostBlock::default(); count],
            token_ids: vec![0; count * block_size],
            index: FxHashMap::default(),
            children: FxHashMap::default(),
            evicted: LruList::new(count),
            received: LruList::new(count),
            num_received: 0,
        }
    }

    /// Kept blocks that came from other workers.
    pub(super) const fn num_received(&self) -> usize {
        self.num_received
    }

    /// Kept blocks that nobody reads.
    pub(super) fn num_unread(&self) -> usize {
        self.evicted.len() + self.received.len()
    }

    /// Blocks that can be found.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Whether a block of this hash is kept. Good for an estimate, not for reuse.
    pub(super) fn contains(&self, hash: BlockHash) -> bool {
        self.index.contains_key(&hash)
    }

    /// The block with these tokens after that content.
    pub(super) fn find(
        &self,
        before: Before,
        hash: BlockHash,
        token_ids: &[TokenId],
    ) -> Option<(u32, ContentId)> {
        let &block = self.index.get(&hash)?;
        let kept = self.blocks[block as usize].kept?;
        let is_it = kept.before == before && self.tokens_of(block) == token_ids;
        is_it.then_some((block, kept.content))
    }

    /// Keeps a block under a hash that no other one has. It counts as used last.
    pub(super) fn insert(&mut self, block: u32, kept: Kept, token_ids: &[TokenId], origin: Origin) {
        let is_received = origin == Origin::Received;
        self.blocks[block as usize] = HostBlock {
            kept: Some(kept),
            num_pins: 0,
            is_received,
        };
        self.num_received += usize::from(is_received);
        self.index.insert(kept.hash, block);
        if let Before::Content(parent) = kept.before {
            self.children.entry(parent).or_default().push(block);
        }
        let start = block as usize * self.block_size;
        self.token_ids[start..start + self.block_size].copy_from_slice(token_ids);
        self.list(block).push_newest(BlockId(block));
    }

    /// Keeps a block's bytes as they are until [`unpin`](Self::unpin), also where it stops to be kept.
    pub(super) fn pin(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        state.num_pins += 1;
        if state.num_pins == 1 && state.kept.is_some() {
            self.list(block).remove(BlockId(block));
        }
    }

    /// Ends a reading; `true` where the block is free now.
    pub(super) fn unpin(&mut self, block: u32) -> bool {
        let state = &mut self.blocks[block as usize];
        debug_assert!(state.num_pins > 0, "host block {block} is not read");
        state.num_pins -= 1;
        if state.num_pins > 0 {
            return false;
        }
        let is_kept = state.kept.is_some();
        if is_kept {
            self.list(block).push_newest(BlockId(block));
        }
        !is_kept
    }

    /// Forgets the unread block whose last use is longest ago, and what follows it; of those of other workers where
    /// that is asked for, or where there are no others.
    pub(super) fn evict(&mut self, prefer: Origin) -> Option<Gone> {
        let lists = match prefer {
            Origin::Evicted => [&self.evicted, &self.received],
            Origin::Received => [&self.received, &self.evicted],
        };
        let oldest = lists.into_iter().find_map(LruList::oldest)?;
        let mut gone = Gone::default();
        self.remove(oldest.0, &mut gone);
        Some(gone)
    }

    /// Forgets everything, and gives the blocks that are free then: what is read stays as it is until it is unpinned.
    pub(super) fn clear(&mut self) -> Vec<u32> {
        let mut free = Vec::new();
        for block in 0..self.blocks.len() as u32 {
            if let Some(kept) = self.blocks[block as usize].kept
                && self.forget(block, kept)
            {
                free.push(block);
            }
        }
        free
    }

    /// Forgets the block of this hash, but not what follows it: its content lives on, or is told of elsewhere.
    pub(super) fn take(&mut self, hash: BlockHash) -> Option<(Kept, Option<u32>)> {
        let &block = self.index.get(&hash)?;
        let kept = self.blocks[block as usize].kept?;
        let is_free = self.forget(block, kept);
        Some((kept, is_free.then_some(block)))
    }

    /// Forgets everything that follows a content.
    pub(super) fn remove_after(&mut self, content: ContentId, gone: &mut Gone) {
        for child in self.children.remove(&content).unwrap_or_default() {
            self.remove(child, gone);
        }
    }

    /// Forgets a block and all that follows it. A chain is as deep as a sequence is long, so this does not recurse.
    fn remove(&mut self, block: u32, gone: &mut Gone) {
        let first = gone.hashes.len();
        let mut next = vec![block];
        while let Some(block) = next.pop() {
            let Some(kept) = self.blocks[block as usize].kept else {
                continue;
            };
            gone.hashes.push(kept.hash);
            if self.forget(block, kept) {
                gone.blocks.push(block);
            }
            next.extend(self.children.remove(&kept.content).unwrap_or_default());
        }
        gone.hashes[first..].reverse();
    }

    /// Takes a block out of every list; `true` where it is free then.
    fn forget(&mut self, block: u32, kept: Kept) -> bool {
        self.index.remove(&kept.hash);
        if let Before::Content(parent) = kept.before
            && let Some(siblings) = self.children.get_mut(&parent)
        {
            siblings.retain(|&sibling| sibling != block);
            if siblings.is_empty() {
                self.children.remove(&parent);
            }
        }
        let is_free = self.blocks[block as usize].num_pins == 0;
        if is_free {
            self.list(block).remove(BlockId(block));
        }
        let state = &mut self.blocks[block as usize];
        state.kept = None;
        self.num_received -= usize::from(std::mem::take(&mut state.is_received));
        is_free
    }

    fn list(&mut self, block: u32) -> &mut LruList {
        if self.blocks[block as usize].is_received {
            &mut self.received
        } else {
            &mut self.evicted
        }
    }

    fn tokens_of(&self, block: u32) -> &[TokenId] {
        let start = block as usize * self.block_size;
        &self.token_ids[start..start + self.block_size]
    }

    /// The hash of every kept block, parents before children.
    pub(super) fn hashes(&self) -> Vec<BlockHash> {
        let kept = || {
            (0_u32..)
                .zip(&self.blocks)
                .filter_map(|(id, it)| Some((id, it.kept?)))
        };
        let contents: FxHashMap<ContentId, u32> =
            kept().map(|(block, kept)| (kept.content, block)).collect();
        let is_root = |kept: &Kept| match kept.before {
            Before::Seed(_) => true,
            Before::Content(parent) => !contents.contains_key(&parent),
        };
        let roots = kept().filter(|(_, kept)| is_root(kept));
        let mut next: Vec<u32> = roots.map(|(block, _)| block).collect();
        let mut hashes = Vec::with_capacity(self.index.len());
        while let Some(block) = next.pop() {
            if let Some(kept) = self.blocks[block as usize].kept {
                hashes.push(kept.hash);
                next.extend(self.children.get(&kept.content).into_iter().flatten());
            }
        }
        hashes
    }

    /// Asserts that all lists agree, and that what a kept block follows is a content of one of the tiers. Gives the
    /// blocks that are kept or read.
    pub(super) fn check_integrity(&self, is_on_device: impl Fn(ContentId) -> bool) -> Vec<u32> {
        let mut taken = Vec::new();
        let contents: Vec<ContentId> = self
            .blocks
            .iter()
            .filter_map(|it| Some(it.kept?.content))
            .collect();
        let (mut num_unread, mut num_received) = (0, 0);
        for (block, state) in (0_u32..).zip(&self.blocks) {
            if state.kept.is_some() || state.num_pins > 0 {
                taken.push(block);
            }
            let Some(kept) = state.kept else { continue };
            num_unread += usize::from(state.num_pins == 0);
            num_received += usize::from(state.is_received);
            assert_eq!(
                self.index.get(&kept.hash),
                Some(&block),
                "host block {block}"
            );
            assert!(
                !is_on_device(kept.content),
                "host block {block} is in both tiers"
            );
            if let Before::Content(parent) = kept.before {
                assert!(
                    self.children[&parent].contains(&block),
                    "a child of its parent"
                );
                assert!(
                    is_on_device(parent) || contents.contains(&parent),
                    "host block {block} can be reached"
                );
            }
        }
        let num_children: usize = self.children.values().map(Vec::len).sum();
        assert!(num_children <= contents.len(), "children");
        assert_eq!(self.index.len(), contents.len(), "entries of the index");
        assert_eq!(
            self.evicted.len() + self.received.len(),
            num_unread,
            "unread blocks"
        );
        assert_eq!(self.num_received, num_received, "received blocks");
        taken
    }
}
