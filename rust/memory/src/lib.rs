//! Registered memory: KV blocks that the network can see, that never lie, and that stay in one piece.
//!
//! A transfer library moves bytes; it does not make moving them safe. Releasing a request does not stop its
//! writes, and deregistering memory does not revoke a peer's right to it. So this crate decides when a block
//! may be read, moved or used again, and never rests that on the fabric refusing anything.
//!
//! Reading order: [`error`], [`tier`] and [`config`] are shared words; [`slab`] is the memory ([`cuda`] where it is a
//! device's), [`table`] says what each block
//! of it is, [`runs`] finds free ones that lie together, [`pool`] joins the three; [`fragmentation`] scores it, [`defragment`] keeps it in one piece;
//! [`registrations`] are buffers of others; [`transport`] is what moves bytes between processes, [`transfer`] keeps watch over it, [`lease`] is what peers may do;
//! [`manager`] is the whole, and [`driver`] a thread for it.
//!
//! `unsafe` is denied by the workspace. The few modules that need it say so in an `#![expect(unsafe_code)]`
//! of their own, and each block carries its argument.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod config;
pub mod cuda;
pub mod defragment;
pub mod dlpack;
pub mod driver;
pub mod error;
pub mod fragmentation;
pub mod lease;
pub mod manager;
mod memlock;
pub mod pool;
pub mod random;
pub mod registrations;
pub mod runs;
pub mod slab;
mod sync;
pub mod table;
pub mod tier;
pub mod transfer;
pub mod transport;

pub use config::{ManagerConfig, MemlockPolicy, PoolConfig};
pub use defragment::{DefragmentConfig, DefragmentReport, Defragmenter};
pub use driver::{Chime, Driver};
pub use error::{MemoryError, TransferError};
pub use fragmentation::Fragmentation;
pub use lease::{GrantId, Lease, RemoteBlock, RemoteGrant, Rights};
pub use manager::{Arrival, BufferManager, Event, ManagerStats};
pub use pool::{BlockHandle, BlockSet, BlockView, PinGuard, Pool, PoolId, PoolStats};
pub use registrations::{ForeignMemory, Region, RegistrationGuard, RegistrationStats};
pub use runs::Extent;
pub use slab::{PageKind, Slab, SlabConfig};
pub use table::BlockState;
pub use tier::Tier;
pub use transfer::{Transfer, TransferOptions, TransferResult, TransferStats};
pub use transport::{
    Direction, Notification, PeerId, Progress, Quiet, Segment, SlabId, TransferId, Transport,
};
