//! Foreign engines: servers that speak OpenAI's HTTP API (vLLM, `SGLang`, TGI, llama.cpp), used as workers.
//!
//! Reading order: [`config`] is what an operator says of them; [`engine`] is one of them, with its [`wire`] and
//! [`pool`]; [`probe`] and [`health`] find out how it does; [`breaker`], [`outlier`] and [`budget`] decide, with the time
//! passed in, what to do about failures; this file puts them together. Where an engine publishes what
//! its cache holds, [`exact`] follows that, and [`caching`] finds out whether it is so. To the scheduler each model on an engine is a
//! worker like any other; requests reach it through the relay of the corridor.

mod breaker;
mod budget;
mod caching;
mod compare;
pub mod config;
pub mod connect;
pub(crate) mod engine;
mod exact;
pub mod file;
mod follower;
mod health;
mod models;
mod outlier;
mod pool;
mod probe;
mod retire;
mod set;
mod standing;
pub(crate) mod store;
mod url;
pub(crate) mod wire;

pub use self::{
    breaker::BreakerState,
    config::{EngineConfig, EngineLimits, EnginesConfig, ReplayMeans},
    engine::EngineKind,
    set::{EngineError, EngineStatus, Engines},
    url::{EngineUrl, UrlError},
};
pub(crate) use self::{caching::Completed, engine::EngineWorker, standing::Verdict};
