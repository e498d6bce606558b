//! A simulated prefix cache: it knows which blocks of text it has seen, as an engine knows its KV blocks.

use std::collections::VecDeque;

use rustc_hash::FxHashSet;

use crate::words::{count_ids, hash};

/// Tokens in a block.
const BLOCK_TOKENS: usize = 16;
/// Bytes in a block: three to a token.
const BLOCK_BYTES: usize = 3 * BLOCK_TOKENS;

/// The blocks of recent prompts, the oldest forgotten first.
#[derive(Debug)]
pub(super) struct PrefixCache {
    known: FxHashSet<u64>,
    order: VecDeque<u64>,
    max_blocks: usize,
}

impl PrefixCache {
    pub(super) fn new(max_blocks: usize) -> Self {
        Self {
            known: FxHashSet::default(),
            order: VecDeque::new(),
            max_blocks,
        }
    }

    /// Remembers a prompt; returns how many of its tokens were known, at most all but one, as in real engines.
    pub(super) fn insert(&mut self, prompt: &[u8]) -> usize {
        if self.max_blocks == 0 {
            return 0;
        }
        let (mut chain, mut hits, mut is_prefix) = (0, 0, true);
        for block in prompt.chunks_exact(BLOCK_BYTES) {
            chain = hash(chain, block);
            is_prefix &= !self.known.insert(chain);
            if is_prefix {
                hits += 1;
            } else {
                self.order.push_back(chain);
            }
        }
        while self.order.len() > self.max_blocks {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
        (hits * BLOCK_TOKENS).min(count_ids(prompt.len()).saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(shared: usize, own: u8) -> Vec<u8> {
        [vec![b'a'; shared * BLOCK_BYTES], vec![own; 2 * BLOCK_BYTES]].concat()
    }

    #[test]
    fn only_what_was_sent_before_is_cached() {
        let mut cache = PrefixCache::new(100);
        assert_eq!(cache.insert(&prompt(4, b'x')), 0);
        assert_eq!(cache.insert(&prompt(4, b'y')), 4 * BLOCK_TOKENS);
        assert_eq!(cache.insert(&prompt(4, b'y')), 6 * BLOCK_TOKENS - 1);
        assert_eq!(cache.insert(b"short"), 0);
    }

    #[test]
    fn the_oldest_blocks_are_forgotten() {
        let mut cache = PrefixCache::new(6);
        cache.insert(&prompt(0, b'x'));
        cache.insert(&prompt(0, b'y'));
        cache.insert(&prompt(0, b'z'));
        assert_eq!(cache.order.len(), 6);
        cache.insert(&prompt(0, b'v'));
        assert_eq!(cache.known.len(), 6);
        assert_eq!(cache.insert(&prompt(0, b'x')), 0);
    }
}
