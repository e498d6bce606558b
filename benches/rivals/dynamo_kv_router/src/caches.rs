//! What the workers of one side cache, and the changes that a router is told of.

use std::rc::Rc;

use dynamo_kv_router::LocalBlockHash;
use orchestra_core::BlockHash;

use crate::{
    cache::Cache,
    fleet::Size,
    prompts::{Prompt, Prompts},
    trace::TRACE_BLOCK,
};

/// Requests whose events are applied together while the caches are filled.
const FILL_BATCH: usize = 256;

/// What a worker's cache did with a prompt. What it stored are the last blocks of the chain.
pub struct Change {
    pub worker: usize,
    chain: Rc<[BlockHash]>,
    local: Rc<[LocalBlockHash]>,
    pub stored: Vec<BlockHash>,
    pub removed: Vec<BlockHash>,
}

impl Change {
    pub fn num_blocks(&self) -> usize {
        self.stored.len() + self.removed.len()
    }

    fn num_held(&self) -> usize {
        self.chain.len() - self.stored.len()
    }

    /// The block before the first one stored.
    pub fn parent(&self) -> Option<BlockHash> {
        let last = self.num_held().checked_sub(1);
        last.map(|last| self.chain[last])
    }

    /// The blocks stored, by their own hashes.
    pub fn stored_local(&self) -> &[LocalBlockHash] {
        &self.local[self.num_held()..]
    }
}

/// The caches of all workers.
pub struct Caches {
    caches: Vec<Cache>,
    limit: usize,
    pub num_entries: usize,
}

impl Caches {
    pub fn new(size: Size) -> Self {
        Self {
            caches: (0..size.num_workers).map(|_| Cache::default()).collect(),
            limit: size.cache_blocks,
            num_entries: 0,
        }
    }

    pub fn store(&mut self, worker: usize, prompt: &Prompt) -> Change {
        let chain = Rc::clone(&prompt.chain);
        let (stored, removed) = self.caches[worker].store(chain, self.limit);
        assert!(prompt.chain.ends_with(&stored), "a cache holds prefixes");
        self.num_entries = self.num_entries + stored.len() - removed.len();
        Change {
            worker,
            chain: Rc::clone(&prompt.chain),
            local: Rc::clone(&prompt.local),
            stored,
            removed,
        }
    }

    /// Fills three quarters of them by the rule, the same for all. What is left of the prompts comes after.
    pub fn fill(&mut self, prompts: &mut Prompts, mut apply: impl FnMut(&[Change])) {
        let num_workers = self.caches.len();
        while self.num_entries < num_workers * self.limit * 3 / 4 {
            let batch = prompts.by_ref().take(FILL_BATCH);
            let changes: Vec<Change> = batch
                .map(|prompt| self.store(prompt.home(num_workers), &prompt))
                .collect();
            apply(&changes);
        }
    }

    pub fn held_tokens(&self, worker: usize, prompt: &Prompt) -> u64 {
        let held = &self.caches[worker].uses;
        let blocks = prompt.usable().iter();
        let num_held = blocks.take_while(|hash| held.contains_key(hash)).count();
        num_held as u64 * u64::from(TRACE_BLOCK)
    }
}
