//! A request's prompt in the eyes of each group of workers: its block hashes there, and who may hold them.

use std::{ops::Deref, rc::Rc};

use super::{
    Scheduler,
    bits::Bits,
    exchange::WorkerRole,
    group::Model,
    route::{HashedPrompt, RouteRequest},
    worker::hash_seed,
};
use crate::hash::{BlockHash, HashSeed, block_hashes};

/// A request's usable hashes on the workers of one group.
pub(super) struct Chain<'a> {
    pub(super) group: u32,
    pub(super) block_size: u32,
    seed: HashSeed,
    pub(super) blocks: Blocks<'a>,
    /// Workers that may hold these blocks: those of the groups that differ in terms alone.
    pub(super) num_sharers: usize,
    /// Slots of the workers that have the request's adapter; `None` where it wants none.
    pub(super) residents: Option<&'a Bits>,
    /// The group's, here so that a decision need not look at it there.
    pub(super) role: WorkerRole,
    /// Whether the group's workers exchange KV.
    pub(super) has_exchange: bool,
}

impl Chain<'_> {
    /// Whether its blocks have the identities that the other one's have.
    pub(super) fn has_blocks_of(&self, other: &Chain<'_>) -> bool {
        (self.seed, self.block_size) == (other.seed, other.block_size)
    }

    /// The hashes, for other requests of this prompt.
    pub(super) fn hashed(&self) -> HashedPrompt<'_> {
        HashedPrompt {
            seed: self.seed,
            block_size: self.block_size,
            blocks: &self.blocks,
        }
    }
}

/// Hashes that the caller had, or that groups with the same chain share.
#[derive(Clone)]
pub(super) enum Blocks<'a> {
    Given(&'a [BlockHash]),
    Hashed(Rc<[BlockHash]>),
}

impl Deref for Blocks<'_> {
    type Target = [BlockHash];

    fn deref(&self) -> &[BlockHash] {
        match self {
            Self::Given(blocks) => blocks,
            Self::Hashed(blocks) => blocks,
        }
    }
}

impl Scheduler {
    /// The request's hashes for each group of its model whose workers may take it.
    pub(super) fn chains<'a>(
        &'a self,
        model: &Model,
        request: &RouteRequest<'a>,
    ) -> Vec<Chain<'a>> {
        let residents = request
            .lora
            .map(|lora| self.loras.residents(request.model, lora));
        let mut chains: Vec<Chain<'a>> = Vec::with_capacity(model.groups.len());
        for (key, &group) in &model.groups {
            if key.refusal(request).is_some() {
                continue;
            }
            let block_size = key.block_size;
            let seed = match (request.salt, request.lora) {
                ("", None) => self.groups.get(group).seed,
                (salt, lora) => hash_seed(request.model, key.weights_epoch, salt, lora),
            };
            let same = chains
                .iter()
                .find(|other| (other.seed, other.block_size) == (seed, block_size));
            let (blocks, num_sharers) = match same {
                Some(other) => (other.blocks.clone(), other.num_sharers),
                None => (
                    usable_chain(request, seed, block_size),
                    self.groups.num_sharers(model, key),
                ),
            };
            chains.push(Chain {
                group,
                block_size,
                seed,
                blocks,
                num_sharers,
                residents,
                role: key.terms.role(),
                has_exchange: key.terms.exchange().is_some(),
            });
        }
        chains
    }

    /// Puts the chains of workers that are there for prompts last; returns how many others there are.
    pub(super) fn set_prefill_last(chains: &mut [Chain<'_>]) -> usize {
        let is_prefill = |chain: &Chain<'_>| chain.role == WorkerRole::Prefill;
        let num_prefill = chains.iter().filter(|chain| is_prefill(chain)).count();
        if num_prefill > 0 {
            chains.sort_by_key(is_prefill);
        }
        chains.len() - num_prefill
    }
}

/// Hashes of the prompt's blocks that a prefix hit can use: at least one token is always computed, because the first
/// output token is drawn from its logits.
pub(super) fn usable_chain<'a>(
    request: &RouteRequest<'a>,
    seed: HashSeed,
    block_size: u32,
) -> Blocks<'a> {
    let (_last, usable) = request.token_ids.split_last().unwrap_or((&0, &[]));
    match request.hashed {
        Some(hashed) if hashed.seed == seed && hashed.block_size == block_size => {
            let num_usable = (usable.len() / block_size as usize).min(hashed.blocks.len());
            Blocks::Given(&hashed.blocks[..num_usable])
        }
        _ => Blocks::Hashed(block_hashes(seed, usable, block_size as usize).into()),
    }
}
