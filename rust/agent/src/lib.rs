//! The replica's side of Orchestra: attaches to a router and owns the step loop.
//!
//! ```text
//!  the engine's thread                            the thread "orchestra-agent"
//!  ───────────────────                            ────────────────────────────
//!  Agent::next_step ─► StepLoop ◄── commands ──── attach: dial, hello, read the stream
//!  execute the plan    (owns the                                            ▲
//!  Agent::commit ────►  StepScheduler) ─ outbound ─► uplink: tokens, events ┘ + load every heartbeat
//! ```
//!
//! One owner per state: the [`StepScheduler`](orchestra_core::step::StepScheduler) is touched only by the thread
//! that calls [`Agent::next_step`] and [`Agent::commit`]; the network side never blocks it, except through the
//! outbound queue, whose bound and answer are in [`AgentConfig::outbound_stall_limit`].
//!
//! Reading order: [`config`] and [`error`]; [`agent`] is the handle; `step_loop` is the corridor; `attach` is the
//! network side; [`kv`] moves KV between workers, on a thread of its own; [`plan_codec`] is what the shards read and answer.

pub mod config;
pub mod error;

pub mod agent;
mod step_loop;

mod admission;
mod attachment;
mod outputs;
mod park;

mod attach;
mod backoff;
mod uplink;

pub mod kv;

mod load;
pub mod plan_codec;

pub use agent::Agent;
pub use config::{AgentConfig, ModelFiles, ReconnectConfig, Role};
pub use error::AgentError;
pub use kv::{
    pool::{KvPool, KvPoolError},
    pool_config::{KvPoolConfig, KvTransports},
};
pub use load::AgentStats;
pub use plan_codec::{OutputBuffers, OutputError, encode_plan};
