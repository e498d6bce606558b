//! The requests: as many copies of the trace at once, each with conversations of its own and at another place, as the
//! workers would see in a fleet of their number. The time between two turns of a conversation is then the same in all.

use std::rc::Rc;

use dynamo_kv_router::{LocalBlockHash, protocols::compute_seq_hash_for_block};
use orchestra_core::BlockHash;

use crate::trace::{TRACE_BLOCK, TraceRow};

pub struct Prompt {
    /// Counts all requests.
    pub number: u64,
    /// Tokens.
    pub input: u32,
    /// Tokens.
    pub output: u32,
    /// Hashes of the full blocks, each of its block alone, as the rival looks them up.
    pub local: Rc<[LocalBlockHash]>,
    /// Hashes of the full blocks, each of its block and all before it: the rival's own function of the local ones, which
    /// one of its indexes counts on. They name the blocks on all sides.
    pub chain: Rc<[BlockHash]>,
}

impl Prompt {
    /// Where the rule that fills the caches puts it: a conversation stays on one worker.
    ///
    /// All prompts share their first block, so the second one tells conversations apart.
    pub fn home(&self, num_workers: usize) -> usize {
        let hash = self.chain.get(1).or(self.chain.first());
        hash.map_or(0, |hash| (hash.0 % num_workers as u64) as usize)
    }

    /// The blocks that may count as cached: one token at least is left to compute.
    pub fn usable(&self) -> &[BlockHash] {
        let limit = (self.input as usize - 1) / TRACE_BLOCK as usize;
        &self.chain[..self.chain.len().min(limit)]
    }
}

/// A copy of the trace has 3.3 requests a second, which keeps about so many workers as busy as they are here.
pub const WORKERS_PER_COPY: usize = 8;

#[derive(Clone)]
pub struct Prompts {
    trace: Rc<[TraceRow]>,
    /// Makes the conversations of one seed different from another's.
    seed: u64,
    num_copies: u64,
    next: u64,
}

impl Prompts {
    pub fn new(trace: Rc<[TraceRow]>, seed: u64, num_copies: usize) -> Self {
        Self {
            trace,
            seed,
            num_copies: num_copies.max(1) as u64,
            next: 0,
        }
    }
}

impl Iterator for Prompts {
    type Item = Prompt;

    fn next(&mut self) -> Option<Prompt> {
        let (number, length) = (self.next, self.trace.len() as u64);
        self.next += 1;
        let copy = number % self.num_copies;
        let step = number / self.num_copies + copy * length / self.num_copies;
        let row = &self.trace[(step % length) as usize];
        let replay = step / length * self.num_copies + copy;
        let blocks = row.chain(TRACE_BLOCK, (self.seed << 32) + replay);
        let local: Rc<[LocalBlockHash]> =
            blocks.iter().map(|hash| LocalBlockHash(hash.0)).collect();
        let chain = compute_seq_hash_for_block(&local);
        Some(Prompt {
            number,
            input: row.input,
            output: row.output,
            local,
            chain: chain.into_iter().map(BlockHash).collect(),
        })
    }
}
