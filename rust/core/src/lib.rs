//! Orchestra's decisions: which request runs where, when and in which memory.
//!
//! The crate does no IO, reads no clock, starts no thread and holds no lock. Time comes in as a [`Time`],
//! effects go out as values. The router, the agent and the simulator drive the same code.
//!
//! Reading order: [`error`], [`sampling`] and [`hash`] are shared words; [`step`] plans one replica's steps;
//! [`scheduler`] chooses among replicas and GPUs; [`partition`] divides a model among the stages of a pipeline.

pub mod config;
pub mod error;
pub mod hash;
pub mod ids;
pub mod partition;
pub mod sampling;
pub mod scheduler;
pub mod step;
pub mod time;

pub use error::{ErrorCode, RejectReason};
pub use hash::{BlockHash, HashSeed, block_hashes};
pub use ids::{BlockId, RequestId, TokenId};
pub use sampling::SamplingParams;
pub use time::Time;
