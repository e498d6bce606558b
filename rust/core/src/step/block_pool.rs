//! The replica's KV blocks: who holds them, and which of them can be reused.
//!
//! ```text
//!           allocate                cache (after the step that computed it)
//!   free ────────────▶ private ───────────────────────────────▶ cached, held
//!    ▲                    │ release                     acquire ▲ │ release by the last holder
//!    ├────────────────────┘                                     │ ▼
//!    └──────────────────────────────────────────────────── cached, unused
//!                     evict (least recently used)
//! ```
//!
//! Only a private block is ever written, and it has exactly one holder. A cached block is complete and stays as
//! it is until it is evicted.
//!
//! **Hashes find, tokens prove.** The index is keyed by the chained hash, but a block is reused only where its
//! tokens and its parent *block* are the ones looked for. By induction from the seed the whole prefix is equal,
//! so a collision of hashes costs a miss and never gives wrong KV.
//!
//! **The cache is closed under parents.** A block is cached only in the table where all blocks before it are
//! cached ones; tables are released from their end. So whoever holds a block holds its parents, a parent was used
//! after its children, and eviction takes children first: the parent of a cached block is always there.

mod integrity;
#[cfg(test)]
mod tests;

use rustc_hash::FxHashMap;

use super::{
    config::StepSchedulerConfig,
    host_cache::{Before, ContentId, Kept},
    host_tier::HostTier,
    kv_events::KvEventLog,
    lru::LruList,
    plan::KvEvent,
};
use crate::{
    hash::{BlockHash, HashSeed},
    ids::{BlockId, TokenId},
};

/// What comes before a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parent {
    /// Nothing: the block is the first of its chain.
    Seed(HashSeed),
    /// A cached block.
    Block(BlockId),
}

/// What a cached block holds, besides its tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) hash: BlockHash,
    pub(super) parent: Parent,
    pub(super) content: ContentId,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    ref_count: u32,
    /// Set while the block is cached.
    identity: Option<Identity>,
}

/// A chain of full blocks as a sequence knows it: what to look for, or to cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain<'a> {
    pub(super) seed: HashSeed,
    /// One for each full block.
    pub(super) hashes: &'a [BlockHash],
    /// All tokens of the full blocks, or more.
    pub(super) token_ids: &'a [TokenId],
}

/// What host memory keeps of a chain.
#[derive(Clone, Debug)]
pub(super) struct HostMatch {
    /// Blocks of host memory, in order.
    pub(super) blocks: Vec<u32>,
    /// What the next block would have to follow.
    pub(super) end: Before,
}

/// What caching has made of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cached {
    /// Leading blocks that are cached now.
    pub(super) num_cached: usize,
    /// The first that was replaced by an equal one; the table's length where none was.
    pub(super) first_replaced: usize,
}

/// All KV blocks of a replica.
#[derive(Debug)]
pub(super) struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    /// `[num_blocks, block_size]`; a row means something while its block is cached.
    token_ids: Vec<TokenId>,
    /// Blocks that hold nothing; the last is given out first.
    free: Vec<BlockId>,
    /// Cached blocks that nobody holds.
    unused: LruList,
    index: FxHashMap<BlockHash, BlockId>,
    num_contents: u64,
    pub(super) events: KvEventLog,
    /// Where evicted blocks go.
    pub(super) host: HostTier,
    /// Whether they may: what is evicted must not be written before the next plan has copied it.
    demotes: bool,
}

impl BlockPool {
    /// A pool of free blocks.
    pub(super) fn new(config: &StepSchedulerConfig) -> Self {
        let num_blocks = config.num_blocks;
        let (count, block_size) = (num_blocks as usize, config.block_size as usize);
        let num_host_blocks = config.num_host_blocks as usize;
        Self {
            block_size,
            blocks: vec![Block::default(); count],
            token_ids: vec![0; count * block_size],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            unused: LruList::new(count),
            index: FxHashMap::default(),
            num_contents: 0,
            // One step evicts and stores every block at most once, and with it one of host memory.
            events: KvEventLog::new(2 * (count + num_host_blocks)),
            host: HostTier::new(config),
            demotes: true,
        }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be given out now: free ones and unused cached ones.
    pub(super) fn num_available(&self) -> usize {
        self.free.len() + self.unused.len()
    }

    pub(super) fn ref_count(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].ref_count
    }

    /// The hash of a cached block.
    pub(super) fn hash_of(&self, block: BlockId) -> Option<BlockHash> {
        self.blocks[block.0 as usize]
            .identity
            .map(|identity| identity.hash)
    }

    /// A block to write, held once. Evicts where no free block is left; `None` where all are held.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| self.evict())?;
        self.blocks[block.0 as usize].ref_count = 1;
        Some(block)
    }

    /// A table of `len` blocks that begins with the cached blocks `matched`, or nothing where fewer than
    /// `reserve` blocks would remain available.
    pub(super) fn allocate_table(
        &mut self,
        matched: &[BlockId],
        len: usize,
        reserve: usize,
    ) -> Option<Vec<BlockId>> {
        let num_held = matched
            .iter()
            .filter(|&&block| self.ref_count(block) > 0)
            .count();
        if len - num_held + reserve > self.num_available() {
            return None;
        }
        // Matched blocks are taken first, so that filling up the table cannot evict them.
        for &block in matched {
            self.acquire(block);
        }
        let mut table = Vec::with_capacity(len + 1);
        table.extend_from_slice(matched);
        table.extend(std::iter::from_fn(|| self.allocate()).take(len - matched.len()));
        Some(table)
    }

    /// [`allocate_table`](Self::allocate_table) for blocks that others write at once: what has to make room for them
    /// is lost, since no plan could copy it first.
    pub(super) fn allocate_table_for_others(
        &mut self,
        matched: &[BlockId],
        len: usize,
        reserve: usize,
    ) -> Option<Vec<BlockId>> {
        self.demotes = false;
        let table = self.allocate_table(matched, len, reserve);
        self.demotes = true;
        table
    }

    /// Takes a share of a block that is cached or held.
    pub(super) fn acquire(&mut self, block: BlockId) {
        let state = &mut self.blocks[block.0 as usize];
        state.ref_count += 1;
        if state.ref_count == 1 {
            self.unused.remove(block);
        }
    }

    /// Gives back a table, from its end: a chain's tail is evicted before its head.
    pub(super) fn release_table(&mut self, table: &mut Vec<BlockId>) {
        while let Some(block) = table.pop() {
            self.release(block);
        }
    }

    fn release(&mut self, block: BlockId) {
        let state = &mut self.blocks[block.0 as usize];
        debug_assert!(
            state.ref_count > 0,
            "{block} is released more often than it is held"
        );
        state.ref_count -= 1;
        if state.ref_count == 0 {
            match state.identity {
                Some(_) => self.unused.push_newest(block),
                None => self.free.push(block),
            }
        }
    }

    /// Forgets the unused block whose last use is longest ago; host memory may keep it.
    fn evict(&mut self) -> Option<BlockId> {
        let block = self.unused.pop_oldest()?;
        let Some(Identity {
            hash,
            parent,
            content,
        }) = self.blocks[block.0 as usize].identity.take()
        else {
            return Some(block);
        };
        self.index.remove(&hash);
        let before = self.before(parent);
        let kept = Kept {
            hash,
            before,
            content,
        };
        let start = block.0 as usize * self.block_size;
        let token_ids = &self.token_ids[start..start + self.block_size];
        if !self.demotes || !self.host.demote(block, kept, token_ids, &mut self.events) {
            self.events.removed(hash);
            self.host.forget_after(content, &mut self.events);
        }
        Some(block)
    }

    /// Makes every cached block an ordinary one: free where nobody holds it, private to its holders where somebody
    /// does.
    pub(super) fn forget_cached(&mut self) {
        for block in &mut self.blocks {
            block.identity = None;
        }
        self.index.clear();
        while let Some(block) = self.unused.pop_oldest() {
            self.free.push(block);
        }
        self.host.forget_all();
        self.events.cleared();
    }

    /// What a block follows, as both tiers know it.
    fn before(&self, parent: Parent) -> Before {
        match parent {
            Parent::Seed(seed) => Before::Seed(seed),
            Parent::Block(block) => {
                let identity = self.blocks[block.0 as usize].identity;
                debug_assert!(identity.is_some(), "{block} is cached, as its children are");
                Before::Content(identity.map_or(ContentId(0), |identity| identity.content))
            }
        }
    }

    /// What comes behind the `matched` blocks of a chain.
    fn end_of(&self, chain: Chain<'_>, matched: &[BlockId]) -> Before {
        self.before(match matched.last() {
            Some(&last) => Parent::Block(last),
            None => Parent::Seed(chain.seed),
        })
    }

    /// Finds what host memory keeps of a chain behind its `matched` blocks.
    pub(super) fn match_host(&self, chain: Chain<'_>, matched: &[BlockId]) -> HostMatch {
        let mut end = self.end_of(chain, matched);
        let mut blocks = Vec::new();
        let contents = chain
            .hashes
            .iter()
            .zip(chain.token_ids.chunks(self.block_size));
        for (&hash, token_ids) in contents.skip(matched.len()) {
            let Some((block, content)) = self.host.cache.find(end, hash, token_ids) else {
                break;
            };
            blocks.push(block);
            end = Before::Content(content);
        }
        HostMatch { blocks, end }
    }

    /// Finds what host memory keeps of a chain behind its `matched` blocks, and holds it until the host's
    /// [`take_hits`](HostTier::take_hits): making room for the sequence must not cost it just that.
    pub(super) fn pin_host_hits(&mut self, chain: Chain<'_>, matched: &[BlockId]) {
        if self.host.offers_hits() && matched.len() < chain.hashes.len() {
            let found = self.match_host(chain, matched).blocks;
            self.host.pin_hits(found);
        }
    }

    /// A number that no content has had.
    pub(super) fn next_content(&mut self) -> ContentId {
        self.num_contents += 1;
        ContentId(self.num_contents)
    }

    /// Whether the device holds a block of this hash.
    pub(super) fn contains(&self, hash: BlockHash) -> bool {
        self.index.contains_key(&hash)
    }

    /// [`estimate_prefix`](Self::estimate_prefix), counting what host memory keeps.
    pub(super) fn estimate_both_tiers(&self, chain: Chain<'_>) -> usize {
        chain
            .hashes
            .partition_point(|&hash| self.contains(hash) || self.host.cache.contains(hash))
    }

    /// How many leading blocks of a chain are probably cached: by bisection, since parents are cached where their
    /// children are, and by hash alone. Good for an estimate, not for reuse.
    pub(super) fn estimate_prefix(&self, chain: Chain<'_>) -> usize {
        chain
            .hashes
            .partition_point(|hash| self.index.contains_key(hash))
    }

    /// Finds the longest cached prefix of a chain and writes its blocks into `matched`. Takes no share of them.
    pub(super) fn match_prefix(&self, chain: Chain<'_>, matched: &mut Vec<BlockId>) {
        matched.clear();
        let mut parent = Parent::Seed(chain.seed);
        for (&hash, token_ids) in chain
            .hashes
            .iter()
            .zip(chain.token_ids.chunks(self.block_size))
        {
            let Some(&block) = self.index.get(&hash) else {
                return;
            };
            if !self.holds(block, parent, token_ids) {
                return;
            }
            matched.push(block);
            parent = Parent::Block(block);
        }
    }

    /// Makes the blocks of `table` that a chain covers reusable, given that the first `num_cached` already are.
    ///
    /// Where another sequence has computed the same block meanwhile, the table takes a share of that one and
    /// gives its own back, so that equal content is kept once. A block whose hash belongs to other content stays
    /// private, and so do the blocks after it.
    pub(super) fn cache_blocks(
        &mut self,
        chain: Chain<'_>,
        table: &mut [BlockId],
        num_cached: usize,
    ) -> Cached {
        let mut parent = match num_cached.checked_sub(1) {
            Some(last) => Parent::Block(table[last]),
            None => Parent::Seed(chain.seed),
        };
        let mut stored = Vec::new();
        let mut now = Cached {
            num_cached,
            first_replaced: table.len(),
        };
        let token_ids = chain.token_ids[num_cached * self.block_size..].chunks(self.block_size);
        let contents = chain.hashes[num_cached..].iter().zip(token_ids);
        for (block, (&hash, token_ids)) in table[num_cached..].iter_mut().zip(contents) {
            match self.index.get(&hash) {
                None => {
                    self.insert(*block, hash, parent, token_ids);
                    stored.push(hash);
                }
                Some(&same) if self.holds(same, parent, token_ids) => {
                    self.acquire(same);
                    self.release(std::mem::replace(block, same));
                    now.first_replaced = now.first_replaced.min(now.num_cached);
                }
                Some(_) => break,
            }
            parent = Parent::Block(*block);
            now.num_cached += 1;
        }
        self.events.stored(stored);
        now
    }

    fn insert(&mut self, block: BlockId, hash: BlockHash, parent: Parent, token_ids: &[TokenId]) {
        let before = self.before(parent);
        let known = self
            .host
            .supersede(before, hash, token_ids, &mut self.events);
        let content = known.unwrap_or_else(|| self.next_content());
        let identity = Identity {
            hash,
            parent,
            content,
        };
        self.blocks[block.0 as usize].identity = Some(identity);
        self.index.insert(hash, block);
        let start = block.0 as usize * self.block_size;
        self.token_ids[start..start + self.block_size].copy_from_slice(token_ids);
    }

    /// Whether a cached block holds these tokens after this parent.
    fn holds(&self, block: BlockId, parent: Parent, token_ids: &[TokenId]) -> bool {
        self.blocks[block.0 as usize]
            .identity
            .is_some_and(|identity| identity.parent == parent)
            && self.tokens_of(block) == token_ids
    }

    fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let start = block.0 as usize * self.block_size;
        &self.token_ids[start..start + self.block_size]
    }

    /// Changes of the cache since the last call.
    pub(super) fn take_events(&mut self) -> Vec<KvEvent> {
        let Self {
            events,
            blocks,
            host,
            ..
        } = self;
        events.take(|| (cached_hashes(blocks), host.cache.hashes()))
    }

    /// The hash of every cached block, parents before children.
    pub(super) fn cached_hashes(&self) -> Vec<BlockHash> {
        cached_hashes(&self.blocks)
    }
}

fn cached_hashes(blocks: &[Block]) -> Vec<BlockHash> {
    let mut hashes = Vec::new();
    let mut is_listed = vec![false; blocks.len()];
    let mut path = Vec::new();
    for start in 0..blocks.len() {
        // Up to the first ancestor that is listed already, then down again.
        let mut next = Some(start);
        while let Some(index) = next.filter(|&index| !is_listed[index]) {
            let Some(identity) = blocks[index].identity else {
                break;
            };
            is_listed[index] = true;
            path.push(identity.hash);
            next = match identity.parent {
                Parent::Block(parent) => Some(parent.0 as usize),
                Parent::Seed(_) => None,
            };
        }
        hashes.extend(path.drain(..).rev());
    }
    hashes
}
