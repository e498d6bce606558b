//! Plans one replica's steps: which sequences run, how many of their tokens, in which KV blocks.
//!
//! Reading order: `plan` is the contract with the runner; `scheduler` holds the state, `schedule` plans a step,
//! `micro_batch` divides the work where several are in flight, `preempt` says who gives way, `commit` takes the result,
//! `forget` starts over; `waiting`, `sequence`, `block_pool` and `host_tier` are
//! what they work on, `step_cost` and `lateness` are what they learn; `moves` is what other workers bring and take. The rules, their bounds and the reasons are in
//! `docs/step_scheduler.md`.

mod block_pool;
mod build_plan;
mod commit;
mod config;
mod error;
mod forget;
mod host_cache;
mod host_hits;
mod host_tier;
mod integrity;
mod keep;
mod kv_events;
mod lateness;
mod lru;
mod micro_batch;
mod moves;
mod plan;
mod preempt;
mod schedule;
mod scheduler;
mod sealed;
mod sequence;
mod stats;
mod step_cost;
mod waiting;

pub use config::StepSchedulerConfig;
pub use error::StepError;
pub use moves::{AwaitedBlocks, HeldBlocks, HoldId};
pub use plan::{
    BlockCopies, FilledBlocks, FinishReason, KvEvent, PENDING_TOKEN, Request, Sample,
    SequenceStart, StepOutput, StepPlan, TokenLogprobs, TokenUpdate,
};
pub use scheduler::StepScheduler;
pub use sealed::SealedChain;
pub use stats::StepStats;
