//! The front of Orchestra: OpenAI HTTP and gRPC in, placed and streamed requests out.
//!
//! Reading order: [`request`] and [`error`] are the words that both halves share. The *doors* (`http`, `grpc`,
//! rendered by [`respond`]) turn what a client wrote into a [`request::GenerateInput`], and what comes back into
//! the client's own format. The [`corridor`] is the one way from there to a worker and back. [`Router`] puts
//! them together.

#![forbid(unsafe_code)]

pub mod config;
pub mod error;
pub mod kv_events;
pub mod logging;
pub mod metrics;
pub mod request;

mod auth;
pub mod caller;
mod clock;
mod grpc;
mod http;
mod listen;
mod operations;
mod process;
mod request_id;
pub mod respond;
mod run;

pub mod corridor;
pub mod engines;
pub mod models;
pub mod observe;
pub mod settings;
pub mod state;
pub mod tasks;
pub mod tenants;
pub mod text;
pub mod workers;

pub use self::{
    config::RouterConfig,
    http::{App, http_service},
    listen::Door,
    operations::Operations,
    process::{exit_status, main_from_args},
    run::{Addresses, Router, RunError},
};
