//! KV that moves between workers: the thread "orchestra-kv", beside the step loop.
//!
//! ```text
//!  step loop ── orders ──▶ mover ──▶ BufferManager ──▶ shared memory, TCP ──▶ the caches of other workers
//!      ▲                    │ ▲
//!      └──── reports ───────┘ └── messages of other workers, handed on by the router
//! ```
//!
//! *Pull*: the taker asks the holder, which holds the blocks and grants them for reading; the taker gets them.
//! *Push*: the taker grants blocks for writing; the one who computes them puts each layer of them when it is there.
//! Either way the taker enters them in its prefix cache, or computes for itself: what moves can be late, refused or
//! lost, and never wrong.
//!
//! Reading order: [`pool`] is the memory and [`pool_config`] what it is made by, `inbox` what the step loop and the
//! thread tell each other, `mover` the thread; `peers` are the connections, `incoming` is what this worker takes,
//! `serving` and `pushing` what it gives, and `offering` what another one keeps for it; `ending` is how blocks become
//! quiet.

mod ending;
mod inbox;
mod incoming;
mod mover;
mod offering;
mod peers;
pub mod pool;
pub mod pool_config;
mod pushing;
mod serving;
mod wire;

pub(crate) use self::{
    inbox::{Inbox, Offered, Order, PushOrder, Report, TakeOrder},
    mover::{Mover, start},
};
