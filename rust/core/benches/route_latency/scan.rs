//! The full scan: a hash map from block to holders, loads as arrays, every worker judged by the product score.

use orchestra_core::{BlockHash, scheduler::RouteRequest};
use rustc_hash::FxHashMap;

pub(crate) const MAX_NUM_SEQS: u32 = 256;

pub(crate) struct Scan {
    holders: FxHashMap<BlockHash, Vec<u32>>,
    pub(crate) queued: Vec<u64>,
    pub(crate) batch: Vec<u32>,
    pub(crate) kv_used: Vec<u64>,
    num_blocks: u64,
    /// Blocks that each worker holds of the prompt last judged.
    pub(crate) depths: Vec<u32>,
}

impl Scan {
    /// Idle workers of `num_blocks` KV blocks each.
    pub(crate) fn new(num_workers: usize, num_blocks: u64) -> Self {
        Self {
            holders: FxHashMap::default(),
            queued: vec![0; num_workers],
            batch: vec![0; num_workers],
            kv_used: vec![0; num_workers],
            num_blocks,
            depths: vec![0; num_workers],
        }
    }

    pub(crate) fn apply(&mut self, worker: u32, stored: &[BlockHash], removed: &[BlockHash]) {
        for &hash in stored {
            self.holders.entry(hash).or_default().push(worker);
        }
        for &hash in removed {
            let holders = self.holders.get_mut(&hash).unwrap();
            let position = holders.iter().position(|&holder| holder == worker).unwrap();
            holders.swap_remove(position);
            if holders.is_empty() {
                self.holders.remove(&hash);
            }
        }
    }

    /// The least `(no room, cost)` and who has it: of equals the next one from `first` on.
    pub(crate) fn best(
        &mut self,
        request: &RouteRequest<'_>,
        block: u32,
        chain: &[BlockHash],
        first: usize,
    ) -> ((bool, u64), usize) {
        self.depths.fill(0);
        for (depth, hash) in (0_u32..).zip(chain) {
            let Some(holders) = self.holders.get(hash) else {
                break;
            };
            for &holder in holders {
                let held = &mut self.depths[holder as usize];
                *held += u32::from(*held == depth);
            }
        }
        let mut best = ((true, u64::MAX), 0);
        for workers in [first..self.queued.len(), 0..first] {
            for worker in workers {
                let cost = self.cost(request, block, worker);
                if cost < best.0 {
                    best = (cost, worker);
                }
            }
        }
        best
    }

    pub(crate) fn cost(
        &self,
        request: &RouteRequest<'_>,
        block: u32,
        worker: usize,
    ) -> (bool, u64) {
        let prompt = request.token_ids.len() as u64;
        let needed = (prompt + u64::from(request.max_tokens)).div_ceil(block.into());
        let (depth, batch) = (u64::from(self.depths[worker]), self.batch[worker]);
        let is_full = batch >= MAX_NUM_SEQS
            || needed - depth + self.kv_used[worker].min(self.num_blocks) > self.num_blocks;
        let left = prompt - depth * u64::from(block) + self.queued[worker];
        (is_full, left * (u64::from(batch) + 1))
    }
}
