//! What foreign engines hold in their prefix caches, from the events that vLLM (and engines that took its format over)
//! publishes over `ZeroMQ`.
//!
//! ```text
//! zmtp         subscriber              feed                  batch            blocks
//! messages  →  in order, gaps    →     events, applied  ←    decoded     →    in our names: KvEvent → the scheduler
//!              replayed                or forgotten
//! ```
//!
//! Whatever is lost, unreadable or unknown costs hits and never claims one that is not there.

mod batch;
mod blocks;
mod feed;
mod msgpack;
mod subscriber;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod zmtp;

pub use self::{
    blocks::Ignored,
    feed::Loss,
    subscriber::{KvEventSource, follow},
    zmtp::{Endpoint, InvalidEndpoint},
};
