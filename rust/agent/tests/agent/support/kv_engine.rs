//! An engine whose KV lies in a pool, and whose tokens depend on every byte of it that a sequence sees.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use orchestra_agent::{Agent, AgentConfig, KvPool, KvPoolConfig, KvTransports};
use orchestra_core::{
    BlockId, TokenId,
    step::{BlockCopies, StepOutput, StepPlan},
};

use super::eventually;

pub(crate) const LAYERS: u32 = 3;
/// A digest of four words for each token, so that a block is more than a line of memory.
const ENTRY_BYTES: usize = 32;

/// The memory of a worker with these settings.
pub(crate) fn kv_pool(config: &AgentConfig, transports: KvTransports) -> Arc<KvPool> {
    kv_pool_with(config, transports, |_| {})
}

/// The same, changed.
pub(crate) fn kv_pool_with(
    config: &AgentConfig,
    transports: KvTransports,
    change: impl FnOnce(&mut KvPoolConfig),
) -> Arc<KvPool> {
    let mut settings = KvPoolConfig {
        num_layers: LAYERS,
        num_blocks: config.scheduler.num_blocks,
        num_host_blocks: config.scheduler.num_host_blocks,
        layer_block_bytes: u64::from(config.scheduler.block_size) * ENTRY_BYTES as u64,
        layout: "test".to_owned(),
        transports,
        ..KvPoolConfig::default()
    };
    change(&mut settings);
    Arc::new(KvPool::new(settings).unwrap())
}

/// A thread that drives an agent.
pub(crate) struct KvEngine {
    pub(crate) agent: Arc<Agent>,
    pub(crate) pool: Arc<KvPool>,
    /// Layers of the next steps that may be computed; it stands still before more.
    allowance: Arc<AtomicU32>,
    has_ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl KvEngine {
    pub(crate) fn start(config: &AgentConfig, pool: Arc<KvPool>) -> Self {
        let agent = Arc::new(Agent::with_kv(config.clone(), Arc::clone(&pool)).unwrap());
        let allowance = Arc::new(AtomicU32::new(u32::MAX));
        let has_ended = Arc::new(AtomicBool::new(false));
        let mut model = Model {
            pool: Arc::clone(&pool),
            block_size: config.scheduler.block_size,
            tables: vec![
                vec![0; config.scheduler.num_blocks as usize];
                config.scheduler.max_num_seqs as usize
            ],
        };
        let thread = thread::spawn({
            let (agent, allowance) = (Arc::clone(&agent), Arc::clone(&allowance));
            let has_ended = Arc::clone(&has_ended);
            move || {
                while let Ok(plan) = agent.next_step(Duration::from_millis(100)) {
                    let Some(plan) = plan else { continue };
                    let output = model.execute(&plan, |layer| {
                        agent.layer_done(plan.step_id, layer);
                        while allowance.load(Ordering::SeqCst) == 0 {
                            if has_ended.load(Ordering::SeqCst) {
                                return;
                            }
                            thread::sleep(Duration::from_millis(1));
                        }
                        let spend =
                            |left: u32| Some(left.saturating_sub(u32::from(left < u32::MAX)));
                        let _ = allowance.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend);
                    });
                    if agent.commit(&output).is_err() {
                        return;
                    }
                }
            }
        });
        Self {
            agent,
            pool,
            allowance,
            has_ended,
            thread: Some(thread),
        }
    }

    /// From now on so many layers may be computed.
    pub(crate) fn allow(&self, layers: u32) {
        self.allowance.store(layers, Ordering::SeqCst);
    }

    /// Whether anything lies in the first block of a layer.
    pub(crate) fn has_first_block(&self, layer: u32) -> bool {
        let mut entry = [0; ENTRY_BYTES];
        self.pool.read(layer, BlockId(0), &mut entry).unwrap();
        entry != [0; ENTRY_BYTES]
    }

    /// Waits until no block is held or withheld for anybody.
    pub(crate) fn wait_until_quiet(&self) {
        eventually("every block is free again", || {
            let stats = self.agent.stats();
            stats.is_idle() && stats.kv_blocks_used == 0
        });
    }
}

impl Drop for KvEngine {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::SeqCst);
        self.agent.close();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || thread::panicking());
    }
}

struct Model {
    pool: Arc<KvPool>,
    block_size: u32,
    tables: Vec<Vec<u32>>,
}

type Entry = [u8; ENTRY_BYTES];

impl Model {
    fn execute(&mut self, plan: &StepPlan, layer_done: impl Fn(u32)) -> StepOutput {
        for (index, &slot) in plan.update_slots.iter().enumerate() {
            let column = plan.update_columns[index] as usize;
            self.tables[slot as usize][column] = plan.update_blocks[index];
        }
        self.copy(&plan.swap_out, |block, host_block| (block, host_block));
        self.copy(&plan.swap_in, |block, host_block| (host_block, block));
        for layer in 0..LAYERS {
            for row in 0..plan.slots.len() {
                let tokens = plan.query_start[row] as usize..plan.query_start[row + 1] as usize;
                let mut context = self.context(plan, row, layer, plan.positions[tokens.start]);
                for index in tokens {
                    let entry = entry(&context, plan.token_ids[index], layer);
                    self.write(plan.slot_mapping[index], layer, entry);
                    context.push(entry);
                }
            }
            layer_done(layer);
        }
        let token_ids = plan.samples.iter().map(|sample| {
            let row = sample.sequence_index as usize;
            let contexts = (0..LAYERS).map(|layer| self.context(plan, row, layer, sample.position));
            drawn(&contexts.collect::<Vec<_>>())
        });
        StepOutput {
            step_id: plan.step_id,
            token_ids: token_ids.collect(),
            logprobs: Vec::new(),
        }
    }

    /// Copies between the tiers; the pool has host memory's blocks behind the others.
    fn copy(
        &self,
        copies: &BlockCopies,
        direction: impl Fn(BlockId, BlockId) -> (BlockId, BlockId),
    ) {
        let num_blocks = self.pool.config().num_blocks;
        let mut bytes = vec![0; self.block_size as usize * ENTRY_BYTES];
        for (&block, &host_block) in copies.blocks.iter().zip(&copies.host_blocks) {
            let (from, to) = direction(BlockId(block), BlockId(num_blocks + host_block));
            for layer in 0..LAYERS {
                self.pool.read(layer, from, &mut bytes).unwrap();
                self.pool.write(layer, to, &bytes).unwrap();
            }
        }
    }

    /// What a layer holds of the first tokens of a row.
    fn context(&self, plan: &StepPlan, row: usize, layer: u32, len: u32) -> Vec<Entry> {
        let table = &self.tables[plan.slots[row] as usize];
        let block_bytes = self.block_size as usize * ENTRY_BYTES;
        let mut context = Vec::new();
        for &block in &table[..len.div_ceil(self.block_size) as usize] {
            let mut bytes = vec![0; block_bytes];
            self.pool.read(layer, BlockId(block), &mut bytes).unwrap();
            context.extend(bytes.as_chunks::<ENTRY_BYTES>().0.iter().copied());
        }
        context.truncate(len as usize);
        context
    }

    /// A block is written as a whole, because that is what the pool offers.
    fn write(&self, slot: u32, layer: u32, entry: Entry) {
        let (block, offset) = (BlockId(slot / self.block_size), slot % self.block_size);
        let mut bytes = vec![0; self.block_size as usize * ENTRY_BYTES];
        self.pool.read(layer, block, &mut bytes).unwrap();
        let at = offset as usize * ENTRY_BYTES;
        bytes[at..at + ENTRY_BYTES].copy_from_slice(&entry);
        self.pool.write(layer, block, &bytes).unwrap();
    }
}

/// Fowler, Noll and Vo's hash.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// What a token leaves in a layer, given what all before it have left.
fn entry(context: &[Entry], token_id: TokenId, layer: u32) -> Entry {
    let before = context.iter().flatten().copied();
    let digest = hash(
        before
            .chain(token_id.to_le_bytes())
            .chain(layer.to_le_bytes()),
    );
    let mut entry = [0; ENTRY_BYTES];
    for (part, word) in entry.chunks_mut(8).zip(0_u64..) {
        part.copy_from_slice(&(digest ^ word).to_le_bytes());
    }
    entry
}

fn drawn(contexts: &[Vec<Entry>]) -> TokenId {
    500 + (hash(contexts.iter().flatten().flatten().copied()) % 400) as u32
}

/// The tokens that a prompt has to give, whoever computes it.
pub(crate) fn reference(prompt: &[TokenId], num_tokens: usize) -> Vec<TokenId> {
    let mut contexts = vec![Vec::new(); LAYERS as usize];
    let mut token_ids = prompt.to_vec();
    let mut next = 0;
    while token_ids.len() < prompt.len() + num_tokens {
        for (layer, context) in (0..).zip(&mut contexts) {
            for &token_id in &token_ids[next..] {
                let entry = entry(context, token_id, layer);
                context.push(entry);
            }
        }
        next = token_ids.len();
        token_ids.push(drawn(&contexts));
    }
    token_ids.split_off(prompt.len())
}
