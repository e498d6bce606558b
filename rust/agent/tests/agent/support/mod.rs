//! A router and an engine to test with.

mod cluster;
mod engine;
mod kv_engine;
mod messages;
mod router;

use std::time::{Duration, Instant};

use orchestra_agent::{AgentConfig, ModelFiles, ReconnectConfig};
use orchestra_core::step::StepSchedulerConfig;

pub(crate) use cluster::{Cluster, Line};
pub(crate) use engine::{Engine, execute};
pub(crate) use kv_engine::{KvEngine, LAYERS, kv_pool, kv_pool_with, reference};
pub(crate) use messages::{VOCAB_SIZE, abort, collect, drawn_token, outputs_of, start};
pub(crate) use router::{FakeRouter, Session};

/// Longest wait for anything: far above what it takes, below the patience of a person.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Settings of a small worker of the router at `address`.
pub(crate) fn config(address: std::net::SocketAddr) -> AgentConfig {
    AgentConfig {
        router: format!("http://{address}"),
        worker_id: "worker-1".to_owned(),
        model: "demo".to_owned(),
        weights_epoch: 3,
        vocab_size: VOCAB_SIZE,
        model_files: ModelFiles {
            tokenizer_json: b"{}".to_vec(),
            chat_template: "{{ messages }}".to_owned(),
            ..ModelFiles::default()
        },
        scheduler: StepSchedulerConfig {
            block_size: 4,
            num_blocks: 64,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            max_model_len: 128,
            max_num_waiting: 16,
            eos_token_ids: vec![2],
            ..StepSchedulerConfig::default()
        },
        heartbeat: Duration::from_millis(10),
        // Most tests leave their end of the stream open.
        close_grace: Duration::from_millis(20),
        reconnect: ReconnectConfig {
            initial: Duration::from_millis(5),
            max: Duration::from_millis(50),
            seed: Some(1),
        },
        ..AgentConfig::default()
    }
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    assert!(
        happens_within(PATIENCE, condition),
        "never happened: {what}"
    );
}

/// Whether `condition` holds before this time is over.
pub(crate) fn happens_within(time: Duration, condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + time;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}
