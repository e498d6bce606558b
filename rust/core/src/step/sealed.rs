//! Chains of cached blocks that are to be written through to another worker.
//!
//! A sequence is noted when enough of its blocks are new, and when its prompt is computed. A later note of a sequence
//! replaces the one that waits, since it says more: a queue that is served slowly holds each sequence once.

use std::collections::VecDeque;

use super::{scheduler::StepScheduler, sequence::Running};
use crate::{
    hash::HashSeed,
    ids::{RequestId, TokenId},
};

/// Chains that may wait; beyond that the oldest is dropped, and counted.
const CHAINS_MAX: usize = 256;

/// The beginning of a sequence: whole blocks that the prefix cache held when it was noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedChain {
    /// The sequence.
    pub request_id: RequestId,
    /// Start of its hash chain.
    pub hash_seed: HashSeed,
    /// Tokens of its blocks.
    pub token_ids: Vec<TokenId>,
}

/// Chains that wait.
#[derive(Debug)]
pub(super) struct SealedChains {
    min_blocks: usize,
    block_size: usize,
    chains: VecDeque<SealedChain>,
    pub(super) num_dropped: u64,
}

impl SealedChains {
    /// Notes a running sequence whose computed blocks are cached, where it has enough new ones.
    pub(super) fn note(&mut self, running: &mut Running) {
        let num_blocks = running.num_cached_blocks;
        let sequence = &mut running.sequence;
        let num_new = num_blocks.saturating_sub(sequence.num_noted_blocks);
        let num_prompt_blocks = sequence.num_prompt_tokens / self.block_size;
        let ends_prompt =
            sequence.num_noted_blocks < num_prompt_blocks && num_blocks >= num_prompt_blocks;
        if num_new == 0 || (num_new < self.min_blocks && !ends_prompt) {
            return;
        }
        sequence.num_noted_blocks = num_blocks;
        let chain = SealedChain {
            request_id: sequence.id,
            hash_seed: sequence.hash_seed,
            token_ids: sequence.token_ids[..num_blocks * self.block_size].to_vec(),
        };
        match self.waiting(chain.request_id) {
            Some(waiting) => *waiting = chain,
            None => self.push(chain),
        }
    }

    fn waiting(&mut self, id: RequestId) -> Option<&mut SealedChain> {
        self.chains.iter_mut().find(|it| it.request_id == id)
    }

    fn push(&mut self, chain: SealedChain) {
        if self.chains.len() == CHAINS_MAX {
            self.chains.pop_front();
            self.num_dropped += 1;
        }
        self.chains.push_back(chain);
    }
}

impl StepScheduler {
    /// Notes from now on what is cached, for [`take_sealed`](Self::take_sealed): a sequence's blocks when `min_blocks`
    /// of them are new, and when its prompt is computed.
    pub fn note_sealed(&mut self, min_blocks: u32) {
        self.sealed = Some(SealedChains {
            min_blocks: min_blocks.max(1) as usize,
            block_size: self.block_size(),
            chains: VecDeque::new(),
            num_dropped: 0,
        });
    }

    /// The chain that has waited longest. Its blocks may have been evicted meanwhile.
    pub fn take_sealed(&mut self) -> Option<SealedChain> {
        self.sealed.as_mut()?.chains.pop_front()
    }

    /// Takes back a chain that nobody has written through: it waits again, behind those that wait already. One of the
    /// same sequence that is noted meanwhile says all of it and more.
    pub fn return_sealed(&mut self, chain: SealedChain) {
        if let Some(sealed) = &mut self.sealed
            && sealed.waiting(chain.request_id).is_none()
        {
            sealed.push(chain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sampling::SamplingParams,
        step::{Request, StepOutput, StepSchedulerConfig},
        time::Time,
    };

    fn scheduler() -> StepScheduler {
        let mut scheduler = StepScheduler::new(StepSchedulerConfig {
            block_size: 2,
            num_blocks: 64,
            max_num_batched_tokens: 8,
            max_num_seqs: 4,
            max_model_len: 64,
            ..StepSchedulerConfig::default()
        })
        .unwrap();
        scheduler.note_sealed(3);
        scheduler
    }

    fn add(scheduler: &mut StepScheduler, id: u64, prompt: u32, max_tokens: u32) {
        let request = Request {
            id: RequestId(id),
            prompt_token_ids: (0..prompt).map(|token| token + 100 * id as u32).collect(),
            output_token_ids: Vec::new(),
            sampling: SamplingParams {
                max_tokens,
                ..SamplingParams::default()
            },
            hash_seed: HashSeed(id),
        };
        scheduler.add_request(request, Time::ZERO).unwrap();
    }

    fn step(scheduler: &mut StepScheduler) {
        let plan = scheduler.schedule(Time::ZERO).unwrap();
        let output = StepOutput {
            step_id: plan.step_id,
            token_ids: vec![7; plan.samples.len()],
            logprobs: Vec::new(),
        };
        scheduler.update_from_output(&output, Time::ZERO).unwrap();
    }

    fn taken(scheduler: &mut StepScheduler) -> Vec<usize> {
        std::iter::from_fn(|| scheduler.take_sealed())
            .map(|chain| chain.token_ids.len())
            .collect()
    }

    #[test]
    fn a_prompt_is_noted_when_it_is_computed_and_an_output_by_so_many_blocks() {
        let mut scheduler = scheduler();
        add(&mut scheduler, 1, 12, 20);
        step(&mut scheduler);
        assert_eq!(taken(&mut scheduler), [8]);
        step(&mut scheduler);
        assert_eq!(taken(&mut scheduler), [12], "the end of the prompt");
        for _ in 0..5 {
            step(&mut scheduler);
        }
        assert!(taken(&mut scheduler).is_empty(), "two blocks of output");
        step(&mut scheduler);
        assert_eq!(taken(&mut scheduler), [18]);
    }

    #[test]
    fn what_is_returned_waits_again_unless_more_of_it_waits_already() {
        let mut scheduler = scheduler();
        add(&mut scheduler, 1, 12, 1);
        add(&mut scheduler, 2, 6, 1);
        step(&mut scheduler);
        let first = scheduler.take_sealed().unwrap();
        assert_eq!((first.request_id, first.token_ids.len()), (RequestId(2), 6));
        step(&mut scheduler);
        step(&mut scheduler);
        scheduler.return_sealed(first.clone());
        let whole = scheduler.take_sealed().unwrap();
        assert_eq!(
            (whole.request_id, whole.token_ids.len()),
            (RequestId(1), 12)
        );
        scheduler.return_sealed(whole.clone());
        let less = SealedChain {
            token_ids: whole.token_ids[..8].to_vec(),
            ..whole.clone()
        };
        scheduler.return_sealed(less);
        let left = std::iter::from_fn(|| scheduler.take_sealed());
        assert_eq!(left.collect::<Vec<_>>(), [first, whole]);
    }

    #[test]
    fn a_later_note_replaces_an_earlier_one_and_the_oldest_of_too_many_is_dropped() {
        let mut scheduler = scheduler();
        add(&mut scheduler, 0, 16, 1);
        for _ in 0..2 {
            step(&mut scheduler);
        }
        assert_eq!(scheduler.stats().write_throughs_dropped, 0);
        for id in 1..=CHAINS_MAX as u64 {
            add(&mut scheduler, id, 3, 1);
            step(&mut scheduler);
        }
        assert_eq!(scheduler.stats().write_throughs_dropped, 1);
        let all = taken(&mut scheduler);
        assert_eq!(all, vec![2; CHAINS_MAX], "that of 16 tokens came first");
    }
}
