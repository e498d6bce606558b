//! The agent against a router that is not one, over real sockets: what goes over the stream, in which order, and what
//! happens when it breaks.
//!
//! Every wait is for a condition and has a limit ([`support::PATIENCE`]); nothing sleeps and hopes.

#[cfg(test)]
mod attaching;
#[cfg(test)]
mod ends;
#[cfg(test)]
mod keeping;
#[cfg(test)]
mod kv_events;
#[cfg(test)]
mod kv_faults;
mod kv_moves;
#[cfg(test)]
mod losses;
#[cfg(test)]
mod plan_codec;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod replays;
#[cfg(test)]
mod sequences;
#[cfg(test)]
mod support;
