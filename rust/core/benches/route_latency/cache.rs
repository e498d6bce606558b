//! What a simulated worker caches.

use std::{collections::VecDeque, rc::Rc};

use orchestra_core::BlockHash;
use rustc_hash::FxHashMap;

#[derive(Default)]
pub(crate) struct Cache {
    /// Chains that have the block.
    pub(crate) uses: FxHashMap<BlockHash, u32>,
    chains: VecDeque<Rc<[BlockHash]>>,
}

impl Cache {
    /// Takes a chain in and evicts the oldest ones down to `limit` blocks, leaves first: what was stored and removed.
    pub(crate) fn store(
        &mut self,
        chain: Rc<[BlockHash]>,
        limit: usize,
    ) -> (Vec<BlockHash>, Vec<BlockHash>) {
        let (mut stored, mut removed) = (Vec::new(), Vec::new());
        for &hash in &*chain {
            let uses = self.uses.entry(hash).or_default();
            *uses += 1;
            if *uses == 1 {
                stored.push(hash);
            }
        }
        self.chains.push_back(chain);
        while self.uses.len() > limit {
            let Some(oldest) = self.chains.pop_front() else {
                break;
            };
            for hash in oldest.iter().rev() {
                let uses = self.uses.get_mut(hash).unwrap();
                *uses -= 1;
                if *uses == 0 {
                    self.uses.remove(hash);
                    removed.push(*hash);
                }
            }
        }
        (stored, removed)
    }
}
