//! Identity of KV blocks. Router and worker call the same functions, so the two can never disagree.
//!
//! A block's hash is chained: it covers every token before it and the seed. The seed folds in all that makes KV
//! reusable or not (model, weights epoch, LoRA, tenant salt), so a weights update invalidates every old block
//! by changing one number.
//!
//! Hashes find, tokens prove: 64 bits are plenty for choosing a worker, but a worker's prefix cache also compares
//! the block's tokens before it reuses KV, so a collision costs a miss and never a wrong answer.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::ids::TokenId;

/// Start of a hash chain; equal seeds may share KV.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct HashSeed(pub u64);

/// Identity of one full block and of everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub u64);

/// What a KV block depends on besides its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct SeedParts<'a> {
    /// Model name.
    pub model: &'a str,
    /// Version of the weights, counted by commits.
    pub weights_epoch: u64,
    /// LoRA adapter, empty for the base model.
    pub lora_id: &'a str,
    /// Version of the adapter.
    pub lora_version: u64,
    /// Tenant salt; requests share KV only where it is equal.
    pub salt: &'a str,
}

impl SeedParts<'_> {
    /// Folds the parts into a seed. Strings are length-prefixed, so no two sets of parts read alike.
    pub fn seed(&self) -> HashSeed {
        let mut hasher = Xxh3::new();
        for text in [self.model, self.lora_id, self.salt] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(&self.weights_epoch.to_le_bytes());
        hasher.update(&self.lora_version.to_le_bytes());
        HashSeed(hasher.digest())
    }
}

/// How strongly a name is drawn to another one: rendezvous hashing takes the highest.
pub fn rendezvous_score(key: &str, candidate: &str) -> u64 {
    xxh3_64_with_seed(candidate.as_bytes(), xxh3_64_with_seed(key.as_bytes(), 0))
}

/// The hash of a block whose predecessor hashes to `parent` (the seed for the first block).
///
/// The tokens are hashed as little-endian `u32`, seeded with the parent: the chain costs one pass.
pub fn next_block_hash(parent: u64, tokens: &[TokenId]) -> BlockHash {
    if cfg!(target_endian = "little") {
        return BlockHash(xxh3_64_with_seed(bytemuck::cast_slice(tokens), parent));
    }
    let mut hasher = Xxh3::with_seed(parent);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    BlockHash(hasher.digest())
}

/// Hashes of the full blocks of `tokens`, in order. A partial last block has no identity and no hash.
///
/// # Panics
/// If `block_size` is zero.
pub fn block_hashes(seed: HashSeed, tokens: &[TokenId], block_size: usize) -> Vec<BlockHash> {
    assert!(block_size > 0, "block_size must be positive");
    let mut parent = seed.0;
    tokens
        .chunks_exact(block_size)
        .map(|block| {
            let hash = next_block_hash(parent, block);
            parent = hash.0;
            hash
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_share_hashes_and_seeds_separate_them() {
        let tokens: Vec<TokenId> = (0..40).collect();
        let seed = SeedParts {
            model: "m",
            ..SeedParts::default()
        }
        .seed();
        let long = block_hashes(seed, &tokens, 16);
        let short = block_hashes(seed, &tokens[..20], 16);
        assert_eq!((long.len(), short.len()), (2, 1));
        assert_eq!(long[0], short[0]);

        let next_epoch = SeedParts {
            model: "m",
            weights_epoch: 1,
            ..SeedParts::default()
        }
        .seed();
        assert_ne!(block_hashes(next_epoch, &tokens, 16)[0], long[0]);
    }

    #[test]
    fn strings_in_the_seed_do_not_run_together() {
        let a = SeedParts {
            model: "ab",
            lora_id: "c",
            ..SeedParts::default()
        }
        .seed();
        let b = SeedParts {
            model: "a",
            lora_id: "bc",
            ..SeedParts::default()
        }
        .seed();
        assert_ne!(a, b);
    }

    #[test]
    fn the_bytes_in_place_are_those_of_little_endian_tokens() {
        for len in [0_u32, 1, 16, 60, 64, 1000] {
            let tokens: Vec<TokenId> = (0..len)
                .map(|token| token.wrapping_mul(77_777_777))
                .collect();
            let mut hasher = Xxh3::with_seed(7);
            for token in &tokens {
                hasher.update(&token.to_le_bytes());
            }
            assert_eq!(next_block_hash(7, &tokens), BlockHash(hasher.digest()));
        }
    }
}
