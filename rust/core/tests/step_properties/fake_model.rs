//! A model whose next token depends on every KV entry that a plan lets it see.
//!
//! Each KV slot remembers which token was written there, at which position, and a digest of all tokens before it
//! as they were seen through the block table. A mixed-up block, a block that is read before its step committed,
//! or one that is written by two sequences changes a digest, and with it the tokens that follow.

use std::hash::Hasher;

use orchestra_core::{
    BlockId, RequestId, SamplingParams, TokenId,
    step::{BlockCopies, PENDING_TOKEN, StepOutput, StepPlan, StepSchedulerConfig, TokenLogprobs},
};
use rustc_hash::FxHasher;

/// The fake model's vocabulary. Small, so that stop tokens and equal continuations are common.
pub(crate) const VOCAB_SIZE: u32 = 24;

#[derive(Clone, Copy, Debug)]
struct KvEntry {
    token: TokenId,
    position: u32,
    digest: u64,
    /// The step and the row that wrote it.
    written_by: (u64, usize),
}

/// What a sampler slot holds.
#[derive(Clone, Debug)]
struct Slot {
    sampling: SamplingParams,
    history: Vec<TokenId>,
    /// The token that was last drawn for it.
    drawn: Option<TokenId>,
}

/// KV, block tables and sampler slots of one replica.
#[derive(Debug)]
pub(crate) struct FakeModel {
    block_size: u32,
    kv: Vec<Option<KvEntry>>,
    host_kv: Vec<Option<KvEntry>>,
    slots: Vec<Option<Slot>>,
    /// One row per slot, as the plans have written it; what earlier owners of a slot left behind stays.
    block_tables: Vec<Vec<Option<u32>>>,
}

impl FakeModel {
    pub(crate) fn new(config: &StepSchedulerConfig) -> Self {
        Self {
            block_size: config.block_size,
            kv: vec![None; (config.num_blocks * config.block_size) as usize],
            host_kv: vec![None; (config.num_host_blocks * config.block_size) as usize],
            slots: vec![None; config.max_num_seqs as usize],
            block_tables: vec![
                vec![None; config.max_model_len.div_ceil(config.block_size) as usize];
                config.max_num_seqs as usize
            ],
        }
    }

    /// Nothing of what was computed is there any more.
    pub(crate) fn lose_kv(&mut self) {
        self.kv.fill(None);
        self.host_kv.fill(None);
    }

    /// Runs a plan. Panics where it is not one that a real runner could execute.
    pub(crate) fn execute(&mut self, plan: &StepPlan) -> StepOutput {
        for start in &plan.starts {
            let mut history = start.prompt_token_ids.clone();
            history.extend(&start.output_token_ids);
            let sampling = start.sampling.as_ref().clone();
            self.slots[start.slot as usize] = Some(Slot {
                sampling,
                history,
                drawn: None,
            });
        }
        for (index, &slot) in plan.update_slots.iter().enumerate() {
            let column = plan.update_columns[index] as usize;
            let block = plan.update_blocks[index];
            self.block_tables[slot as usize][column] = Some(block);
        }
        self.copy_blocks(plan);
        for row in 0..plan.context_lens.len() {
            self.write_row(plan, row);
        }
        let digests: Vec<u64> = (0..plan.context_lens.len())
            .map(|row| self.read_row(plan, row))
            .collect();

        let mut output = StepOutput {
            step_id: plan.step_id,
            ..StepOutput::default()
        };
        for sample in &plan.samples {
            let row = sample.sequence_index as usize;
            assert_eq!(
                sample.position, plan.context_lens[row],
                "{}",
                sample.request_id
            );
            let slot = self.slots[sample.slot as usize]
                .as_mut()
                .expect("a slot that was started");
            assert_eq!(slot.sampling.seed, sample.request_id.0, "the slot's owner");
            assert_eq!(
                slot.sampling.logprobs, sample.logprobs,
                "{}",
                sample.request_id
            );
            let token = next_token(digests[row], &slot.sampling, &slot.history);
            slot.history.push(token);
            slot.drawn = Some(token);
            output.token_ids.push(token);
            output.logprobs.push(
                sample
                    .logprobs
                    .map(|_| logprobs_of(sample.request_id, token)),
            );
        }
        if plan.samples.iter().all(|sample| sample.logprobs.is_none()) {
            output.logprobs.clear();
        }
        output
    }

    fn copy_blocks(&mut self, plan: &StepPlan) {
        let block_size = self.block_size as usize;
        let slots = |block: u32| block as usize * block_size..(block as usize + 1) * block_size;
        let pairs = |copies: &BlockCopies| {
            assert_eq!(copies.blocks.len(), copies.host_blocks.len());
            let hosts = copies.host_blocks.clone();
            copies.blocks.clone().into_iter().zip(hosts)
        };
        for (block, host_block) in pairs(&plan.swap_out) {
            self.host_kv[slots(host_block)].copy_from_slice(&self.kv[slots(block)]);
        }
        for (block, host_block) in pairs(&plan.swap_in) {
            self.kv[slots(block)].copy_from_slice(&self.host_kv[slots(host_block)]);
        }
    }

    /// The KV of a block as other workers name it: host memory's come behind the device's.
    fn block_mut(&mut self, block: BlockId) -> &mut [Option<KvEntry>] {
        let (start, block_size) = (block.0 * self.block_size, self.block_size as usize);
        let both = [&mut self.kv, &mut self.host_kv];
        let mut start = start as usize;
        for tier in both {
            if start < tier.len() {
                return &mut tier[start..start + block_size];
            }
            start -= tier.len();
        }
        unreachable!("{block} is in neither tier")
    }

    /// Puts the KV of some blocks of a prompt where another worker brings it.
    pub(crate) fn bring(&mut self, prompt: &[TokenId], first_block: u32, blocks: &[BlockId]) {
        let block_size = self.block_size as usize;
        let entries = entries_of(prompt);
        let contents = entries.chunks(block_size).skip(first_block as usize);
        for (block, content) in blocks.iter().zip(contents) {
            for (offset, &entry) in content.iter().enumerate() {
                self.block_mut(*block)[offset] = Some(entry);
            }
        }
    }

    /// Late bytes of somebody who was given up.
    pub(crate) fn spoil(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            self.block_mut(*block).fill(None);
        }
    }

    /// Whether blocks of a prompt hold their KV.
    pub(crate) fn has(&mut self, prompt: &[TokenId], first_block: u32, blocks: &[BlockId]) -> bool {
        let block_size = self.block_size as usize;
        let entries = entries_of(prompt);
        let contents = entries.chunks(block_size).skip(first_block as usize);
        let is_same = |held: &Option<KvEntry>, entry: &KvEntry| {
            held.is_some_and(|held| {
                (held.token, held.position, held.digest)
                    == (entry.token, entry.position, entry.digest)
            })
        };
        blocks.iter().zip(contents).all(|(&block, content)| {
            let held = self.block_mut(block);
            held.iter()
                .zip(content)
                .all(|(held, entry)| is_same(held, entry))
        })
    }

    /// Writes the KV of a row's tokens, each with the digest of what the block table shows before it.
    fn write_row(&mut self, plan: &StepPlan, row: usize) {
        let range = plan.query_start[row] as usize..plan.query_start[row + 1] as usize;
        assert!(!range.is_empty(), "row {row} computes something");
        for index in range {
            let position = plan.positions[index];
            let kv_slot = self.kv_slot(plan, row, position);
            assert_eq!(
                kv_slot, plan.slot_mapping[index],
                "where position {position} goes"
            );
            let before = match position.checked_sub(1) {
                Some(before) => self.entry(plan, row, before).digest,
                None => 0,
            };
            if let Some(old) = self.kv[kv_slot as usize] {
                assert_ne!(
                    old.written_by.0, plan.step_id,
                    "one writer of slot {kv_slot} a step"
                );
            }
            let token = self.token(plan, row, index);
            self.kv[kv_slot as usize] = Some(KvEntry {
                token,
                position,
                digest: extend_digest(before, token),
                written_by: (plan.step_id, row),
            });
        }
    }

    /// The token of a plan, or what was drawn in its place.
    fn token(&self, plan: &StepPlan, row: usize, index: usize) -> TokenId {
        let token = plan.token_ids[index];
        if token != PENDING_TOKEN {
            return token;
        }
        let slot = self.slots[plan.slots[row] as usize].as_ref();
        let drawn = slot.and_then(|slot| slot.drawn);
        drawn.expect("a step before has drawn a token of this slot's owner")
    }

    /// Reads the whole context as attention does, and returns its digest.
    fn read_row(&self, plan: &StepPlan, row: usize) -> u64 {
        let mut digest = 0;
        for position in 0..plan.context_lens[row] {
            let entry = self.entry(plan, row, position);
            digest = extend_digest(digest, entry.token);
            assert_eq!(
                entry.digest, digest,
                "row {row}, position {position} holds other KV"
            );
        }
        digest
    }

    fn entry(&self, plan: &StepPlan, row: usize, position: u32) -> KvEntry {
        let kv_slot = self.kv_slot(plan, row, position);
        let entry = self.kv[kv_slot as usize].expect("KV that was written");
        assert_eq!(
            entry.position, position,
            "position of what slot {kv_slot} holds"
        );
        let (step, writer) = entry.written_by;
        assert!(
            step < plan.step_id || writer == row,
            "slot {kv_slot} is read before its commit"
        );
        entry
    }

    fn kv_slot(&self, plan: &StepPlan, row: usize, position: u32) -> u32 {
        let column = position / self.block_size;
        assert!(
            column < plan.block_table_width,
            "position {position} is beyond the block table"
        );
        let table = &self.block_tables[plan.slots[row] as usize];
        let block = table[column as usize].expect("a block that the runner was told of");
        block * self.block_size + position % self.block_size
    }
}

/// The output of a request that runs alone, with no cache and no batch: what every request has to get.
pub(crate) fn reference_output(
    prompt: &[TokenId],
    sampling: &SamplingParams,
    eos_token_ids: &[TokenId],
) -> Vec<TokenId> {
    let mut token_ids = prompt.to_vec();
    let mut digest = prompt
        .iter()
        .fold(0, |digest, &token| extend_digest(digest, token));
    while token_ids.len() < prompt.len() + sampling.max_tokens as usize {
        let history: &[TokenId] = if sampling.has_penalties() {
            &token_ids
        } else {
            &[]
        };
        let token = next_token(digest, sampling, history);
        token_ids.push(token);
        digest = extend_digest(digest, token);
        let is_eos = eos_token_ids.contains(&token) && !sampling.ignore_eos;
        if is_eos || sampling.stop_token_ids.contains(&token) {
            break;
        }
    }
    token_ids.split_off(prompt.len())
}

/// Log-probabilities by which their owner can be told.
pub(crate) fn logprobs_of(request_id: RequestId, token: TokenId) -> TokenLogprobs {
    TokenLogprobs {
        chosen: -(request_id.0 as f32),
        top: vec![(token, 0.0)],
    }
}

fn extend_digest(digest: u64, token: TokenId) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write_u64(digest);
    hasher.write_u32(token);
    hasher.finish()
}

/// Depends on the context, on the request's own parameters and, with penalties, on the slot's token history.
fn next_token(digest: u64, sampling: &SamplingParams, history: &[TokenId]) -> TokenId {
    let mut hasher = FxHasher::default();
    hasher.write_u64(digest);
    hasher.write_u64(sampling.seed);
    if sampling.has_penalties() {
        for &token in history {
            hasher.write_u32(token);
        }
    }
    (hasher.finish() >> 32) as u32 % VOCAB_SIZE
}

/// The KV of a prompt, as a worker computes it before its first step.
fn entries_of(prompt: &[TokenId]) -> Vec<KvEntry> {
    let mut digest = 0;
    let positions = (0..).zip(prompt);
    positions
        .map(|(position, &token)| {
            digest = extend_digest(digest, token);
            KvEntry {
                token,
                position,
                digest,
                written_by: (0, 0),
            }
        })
        .collect()
}
