//! A worker as the scheduler sees it: what it is, what it last reported, and what was promised to it since.

use std::{fmt, sync::Arc};

use rustc_hash::FxHashSet;

use super::{
    assumed::KvSource,
    error::SchedulerError,
    exchange::{KvExchange, WorkerRole},
    held::Held,
    index::HolderId,
    kv_feed::KvFeed,
    loras::Lora,
    pace::Pace,
    recent::RecentBlocks,
};
use crate::{
    hash::{BlockHash, HashSeed, SeedParts},
    time::Time,
};

/// Longest worker, GPU, model, domain or node name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Most taints, and most service classes, of one worker.
const NAMES_MAX: usize = 16;

/// Names a registered worker. Never used again once the worker is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId {
    /// Counts registrations; first, so that ids are ordered by it.
    pub(super) number: u32,
    /// Where the worker is found, if what is there has this number.
    pub(super) slot: u32,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.number)
    }
}

/// What a worker is; fixed while it is registered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerSpec {
    /// Unique among the registered workers, 1 to 128 bytes.
    pub name: String,
    /// The model that it serves, 1 to 128 bytes.
    pub model: String,
    /// Version of the weights; part of every block's identity.
    pub weights_epoch: u64,
    /// Tokens per KV block, at least 1.
    pub block_size: u32,
    /// KV blocks in all, at least 1.
    pub num_blocks: u32,
    /// Blocks of host memory that it keeps besides, from which it copies back; 0: none.
    pub num_host_blocks: u32,
    /// Most sequences in one step, at least 1.
    pub max_num_seqs: u32,
    /// Most prompt and output tokens of one sequence, at least 1.
    pub max_model_len: u32,
    /// Takes only requests that tolerate every one of these; at most 16, each 1 to 128 bytes.
    pub taints: Vec<String>,
    /// Takes only requests of one of these service classes, or any where there are none; at most 16, each 1 to 128
    /// bytes.
    pub slo_classes: Vec<String>,
    /// LoRA adapters that it holds at a time; 0: it serves none.
    pub max_loras: u32,
    /// How it becomes known which blocks it holds.
    pub kv_source: KvSource,
    /// What its blocks have in common with those that it can exchange; `None`: it can give and take none.
    pub kv_exchange: Option<KvExchange>,
    /// What it is there for.
    pub role: WorkerRole,
}

impl WorkerSpec {
    pub(super) fn validate(&self) -> Result<(), SchedulerError> {
        validate_name("name", &self.name)?;
        validate_name("model", &self.model)?;
        let counts = [
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_num_seqs", self.max_num_seqs),
            ("max_model_len", self.max_model_len),
        ];
        if let Some((field, _)) = counts.into_iter().find(|&(_, value)| value == 0) {
            return Err(SchedulerError::InvalidField {
                field,
                expected: "at least 1",
            });
        }
        if let KvSource::Assumed { max_blocks, .. } = self.kv_source
            && !(1..=self.num_blocks).contains(&max_blocks)
        {
            return Err(SchedulerError::InvalidField {
                field: "kv_source.max_blocks",
                expected: "1 to num_blocks",
            });
        }
        if let Some(exchange) = &self.kv_exchange {
            exchange.validate()?;
        }
        for (field, names) in [("taints", &self.taints), ("slo_classes", &self.slo_classes)] {
            if names.len() > NAMES_MAX {
                let expected = "at most 16 names";
                return Err(SchedulerError::InvalidField { field, expected });
            }
            for name in names {
                validate_name(field, name)?;
            }
        }
        Ok(())
    }

    /// Start of the hash chain of a request with this salt and adapter on this worker.
    pub fn hash_seed(&self, salt: &str, lora: Option<Lora<'_>>) -> HashSeed {
        hash_seed(&self.model, self.weights_epoch, salt, lora)
    }
}

/// Start of the hash chain of a request on the workers of one model and weights epoch.
pub(super) fn hash_seed(
    model: &str,
    weights_epoch: u64,
    salt: &str,
    lora: Option<Lora<'_>>,
) -> HashSeed {
    let (lora_id, lora_version) = lora.map_or(("", 0), |lora| (lora.id, lora.version));
    let parts = SeedParts {
        model,
        weights_epoch,
        lora_id,
        lora_version,
        salt,
    };
    parts.seed()
}

pub(super) fn validate_name(field: &'static str, name: &str) -> Result<(), SchedulerError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(SchedulerError::InvalidField {
            field,
            expected: "1 to 128 bytes long",
        });
    }
    Ok(())
}

/// What a worker reports about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerLoad {
    /// Sequences in the running batch.
    pub num_running: u32,
    /// Sequences accepted and not yet running.
    pub num_waiting: u32,
    /// KV blocks that sequences hold. Blocks that are only cached count as free.
    pub kv_blocks_used: u32,
    /// Prompt tokens accepted and not yet computed.
    pub queued_prefill_tokens: u64,
}

/// What reservations ask of a worker, summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Demand {
    pub(super) num_seqs: u32,
    /// Blocks to allocate: those of prompt and output less the cached prefix.
    pub(super) num_blocks: u64,
    /// Prompt tokens to compute.
    pub(super) prefill_tokens: u64,
}

impl Demand {
    pub(super) fn add(&mut self, other: Self) {
        self.num_seqs += other.num_seqs;
        self.num_blocks += other.num_blocks;
        self.prefill_tokens += other.prefill_tokens;
    }

    pub(super) fn subtract(&mut self, other: Self) {
        self.num_seqs -= other.num_seqs;
        self.num_blocks -= other.num_blocks;
        self.prefill_tokens -= other.prefill_tokens;
    }
}

/// A registered worker.
///
/// A report and our own reservations overlap: the report covers (most of) what was placed before it, and the work of
/// other routers, which we cannot see. So the estimate of each quantity is
///
/// ```text
/// max(all live reservations, last report - what was given back since + reservations made since)
/// ```
///
/// Never below what we placed ourselves, so a burst does not herd between two reports; never counting a reservation twice
/// once it is reported; and room that was given back is there at once, not after the next report.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub(super) spec: Arc<WorkerSpec>,
    /// The specification's: decisions read it, and that is elsewhere in memory.
    num_blocks: u32,
    pub(super) is_draining: bool,
    pub(super) load: WorkerLoad,
    /// Counts load reports, so that a reservation knows whether one came after it.
    pub(super) num_reports: u64,
    /// Of every live reservation.
    pub(super) reserved: Demand,
    /// Of the live reservations made since the last report.
    pub(super) unreported: Demand,
    /// What was given back since the last report of reservations made before it.
    pub(super) returned: Demand,
    /// Distinct hashes in the prefix index.
    pub(super) num_cached_blocks: u32,
    /// Those of them that are in its host memory.
    pub(super) kept: FxHashSet<BlockHash>,
    /// What it holds goes by this id in the prefix index.
    pub(super) holder: HolderId,
    /// Number of its group.
    pub(super) group: u32,
    /// Adapters that it has or was chosen for, each once.
    pub(super) loras: Vec<HashSeed>,
    /// The number that its next message of KV events is to have; `None` before the first one.
    pub(super) kv_sequence: Option<u64>,
    pub(super) kv_feed: KvFeed,
    /// What it is taken to hold; `None` where it says so itself.
    pub(super) assumed: Option<RecentBlocks>,
    /// Prompt tokens computed, and the time that they took.
    pub(super) prefill_pace: Pace,
    /// When it had computed the last of them.
    pub(super) prefill_done_at: Time,
}

impl Worker {
    pub(super) fn new(spec: WorkerSpec, holder: HolderId, group: u32) -> Self {
        Self {
            num_blocks: spec.num_blocks,
            assumed: spec.kv_source.assumed(),
            spec: Arc::new(spec),
            is_draining: false,
            load: WorkerLoad::default(),
            num_reports: 0,
            reserved: Demand::default(),
            unreported: Demand::default(),
            returned: Demand::default(),
            num_cached_blocks: 0,
            kept: FxHashSet::default(),
            holder,
            group,
            loras: Vec::new(),
            kv_sequence: None,
            kv_feed: KvFeed::InStep,
            prefill_pace: Pace::default(),
            prefill_done_at: Time::ZERO,
        }
    }

    /// These blocks are not in its host memory, or no longer.
    pub(super) fn uses_device_for(&mut self, hashes: &[BlockHash]) {
        if !self.kept.is_empty() {
            for hash in hashes {
                self.kept.remove(hash);
            }
        }
    }

    /// Gives back some of what a reservation asked for.
    pub(super) fn give_back(&mut self, held: &Held, demand: Demand) {
        self.reserved.subtract(demand);
        if self.num_reports == held.num_reports {
            self.unreported.subtract(demand);
        } else {
            self.returned.add(demand);
        }
    }

    /// Sequences that run or wait there.
    pub(super) fn batch(&self) -> u32 {
        let reported = self.load.num_running.saturating_add(self.load.num_waiting);
        let left = reported.saturating_sub(self.returned.num_seqs);
        self.reserved
            .num_seqs
            .max(left.saturating_add(self.unreported.num_seqs))
    }

    /// Prompt tokens that wait to be computed there.
    pub(super) fn queued_prefill_tokens(&self) -> u64 {
        let reported = self.load.queued_prefill_tokens;
        let left = reported.saturating_sub(self.returned.prefill_tokens);
        self.reserved
            .prefill_tokens
            .max(left.saturating_add(self.unreported.prefill_tokens))
    }

    /// KV blocks that nothing holds and nothing was promised.
    pub(super) fn kv_blocks_free(&self) -> u64 {
        let reported = u64::from(self.load.kv_blocks_used);
        let left = reported.saturating_sub(self.returned.num_blocks);
        let used = self
            .reserved
            .num_blocks
            .max(left + self.unreported.num_blocks);
        u64::from(self.num_blocks).saturating_sub(used)
    }
}
