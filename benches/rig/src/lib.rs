//! What a router is measured and broken with. Two programs, neither of which knows anything of Orchestra's:
//!
//! * `mock-engine`, an OpenAI-compatible engine that computes nothing: its words are a pure function of the
//!   conversation, so that a reader can tell a lost, doubled or reordered one; it fails on demand.
//! * `loadgen`, a closed loop of keep-alive clients that measures, and checks those words.
//!
//! Reading order: [`words`], then [`engine`] or [`load`]; [`http1`] and [`pace`] are below both.

pub mod engine;
pub mod http1;
pub mod load;
pub mod pace;
pub mod words;
