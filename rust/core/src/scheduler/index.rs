//! The prefix index: which workers hold which KV block.

use rustc_hash::FxHashMap;

use super::worker::WorkerId;
use crate::hash::BlockHash;

/// Block hash → the workers that hold it.
///
/// Hash chains of different models, weights epochs and salts start from different seeds, so one map serves all.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    /// Holder lists are sorted and never empty.
    holders: FxHashMap<BlockHash, Vec<WorkerId>>,
}

impl PrefixIndex {
    /// Whether the worker holds the block.
    pub(super) fn contains(&self, hash: BlockHash, worker: WorkerId) -> bool {
        self.holders_of(hash).binary_search(&worker).is_ok()
    }

    /// The block's holders, ascending.
    pub(super) fn holders_of(&self, hash: BlockHash) -> &[WorkerId] {
        self.holders.get(&hash).map_or(&[], Vec::as_slice)
    }

    /// Adds a holder; `false` where it was one already.
    pub(super) fn insert(&mut self, hash: BlockHash, worker: WorkerId) -> bool {
        let holders = self.holders.entry(hash).or_default();
        match holders.binary_search(&worker) {
            Ok(_) => false,
            Err(position) => {
                holders.insert(position, worker);
                true
            }
        }
    }

    /// Removes a holder; `false` where it was none.
    pub(super) fn remove(&mut self, hash: BlockHash, worker: WorkerId) -> bool {
        let Some(holders) = self.holders.get_mut(&hash) else {
            return false;
        };
        let Ok(position) = holders.binary_search(&worker) else {
            return false;
        };
        holders.remove(position);
        if holders.is_empty() {
            self.holders.remove(&hash);
        }
        true
    }

    /// Forgets all that the worker holds. Walks the whole index.
    pub(super) fn remove_worker(&mut self, worker: WorkerId) {
        self.holders.retain(|_, holders| {
            if let Ok(position) = holders.binary_search(&worker) {
                holders.remove(position);
            }
            !holders.is_empty()
        });
    }

    /// How many leading blocks of the chain each worker holds. `workers` is ascending; the answer is in its order.
    pub(super) fn depths(&self, chain: &[BlockHash], workers: &[WorkerId]) -> Vec<u32> {
        let mut depths = vec![0_u32; workers.len()];
        for (depth, &hash) in (0_u32..).zip(chain) {
            let mut is_held = false;
            for holder in self.holders_of(hash) {
                // A holder whose chain broke earlier cannot use this block.
                let Ok(position) = workers.binary_search(holder) else {
                    continue;
                };
                if depths[position] == depth {
                    depths[position] += 1;
                    is_held = true;
                }
            }
            if !is_held {
                break;
            }
        }
        depths
    }

    /// Distinct blocks.
    pub(super) fn len(&self) -> usize {
        self.holders.len()
    }

    /// Every (block, holder) pair, in no order.
    pub(super) fn entries(&self) -> impl Iterator<Item = (BlockHash, WorkerId)> + '_ {
        self.holders
            .iter()
            .flat_map(|(&hash, holders)| holders.iter().map(move |&worker| (hash, worker)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_leading_blocks_only() {
        let chain: Vec<BlockHash> = (10..14).map(BlockHash).collect();
        let workers = [WorkerId(1), WorkerId(2), WorkerId(3)];
        let mut index = PrefixIndex::default();
        for &hash in &chain {
            index.insert(hash, WorkerId(1));
        }
        index.insert(chain[0], WorkerId(2));
        index.insert(chain[2], WorkerId(2)); // block 1 was evicted there
        assert_eq!(index.depths(&chain, &workers), [4, 1, 0]);

        index.remove_worker(WorkerId(1));
        assert_eq!(index.depths(&chain, &workers), [0, 1, 0]);
        assert_eq!(index.len(), 2);
    }
}
