//! What an agent is told at start: one struct, one default, one validator.

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

use orchestra_core::{config::ConfigIssue, scheduler::NAME_BYTES_MAX, step::StepSchedulerConfig};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tonic::transport::Endpoint;

/// Most that the model files may weigh together: they travel as one message.
const MODEL_FILES_BYTES_MAX: usize = 64 << 20;
/// Plans carry token ids as `int32`.
const INT32_MAX: u64 = i32::MAX as u64;

/// Settings of an [`Agent`](crate::Agent).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// The router's worker gateway, `http://host:port`.
    pub router: String,
    /// Stable name of this worker, unique in the cluster; 1 to 128 bytes.
    pub worker_id: String,
    /// The name under which clients ask for the model; 1 to 128 bytes.
    pub model: String,
    /// What the worker is for. Only where KV can move does it matter.
    pub role: Role,
    /// Version of the weights, counted by commits.
    pub weights_epoch: u64,
    /// Rows of the embedding: a token id at or above it is refused.
    pub vocab_size: u32,
    /// What the router needs to read and write text for the model.
    pub model_files: ModelFiles,
    /// Limits of the step scheduler.
    pub scheduler: StepSchedulerConfig,
    /// Time between two load reports.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// Longest wait for a connection, and for the router's welcome.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Time between two HTTP/2 pings, so that a vanished router is noticed.
    #[serde(with = "humantime_serde")]
    pub keepalive: Duration,
    /// A ping unanswered for this long ends the connection.
    #[serde(with = "humantime_serde")]
    pub keepalive_timeout: Duration,
    /// How long a step may wait for a router that reads too slowly. Then the attachment is dropped as dead: its
    /// sequences are aborted here (the router replays them elsewhere) and the worker attaches anew.
    #[serde(with = "humantime_serde")]
    pub outbound_stall_limit: Duration,
    /// How long `close` waits for the last outputs to reach the router.
    #[serde(with = "humantime_serde")]
    pub close_grace: Duration,
    /// Pauses between attempts to reach the router.
    pub reconnect: ReconnectConfig,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            router: String::new(),
            worker_id: String::new(),
            model: String::new(),
            role: Role::Both,
            weights_epoch: 0,
            vocab_size: 0,
            model_files: ModelFiles::default(),
            scheduler: StepSchedulerConfig::default(),
            heartbeat: Duration::from_millis(100),
            connect_timeout: Duration::from_secs(5),
            keepalive: Duration::from_secs(1),
            keepalive_timeout: Duration::from_secs(2),
            outbound_stall_limit: Duration::from_secs(1),
            close_grace: Duration::from_secs(1),
            reconnect: ReconnectConfig::default(),
        }
    }
}

impl AgentConfig {
    /// Checks every setting and returns all problems at once.
    pub fn validate(&self) -> Result<(), Vec<ConfigIssue>> {
        let mut issues = Vec::new();
        self.check_names(&mut issues);
        self.check_sizes(&mut issues);
        self.check_durations(&mut issues);
        if let Err(nested) = self.scheduler.validate() {
            issues.extend(nested.into_iter().map(|issue| ConfigIssue {
                key: format!("scheduler.{}", issue.key),
                ..issue
            }));
        }
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }

    fn check_names(&self, issues: &mut Vec<ConfigIssue>) {
        let is_url = self.router.starts_with("http://");
        if !is_url || Endpoint::from_shared(self.router.clone()).is_err() {
            issues.push(ConfigIssue::new(
                "router",
                "must be a URL like http://127.0.0.1:8002",
            ));
        }
        for (key, name) in [("worker_id", &self.worker_id), ("model", &self.model)] {
            let is_long = name.len() > NAME_BYTES_MAX;
            if name.is_empty() || is_long || name.chars().any(char::is_control) {
                let message =
                    format!("must have 1 to {NAME_BYTES_MAX} bytes, without control characters");
                issues.push(ConfigIssue::new(key, message));
            }
        }
    }

    fn check_sizes(&self, issues: &mut Vec<ConfigIssue>) {
        if self.vocab_size == 0 || u64::from(self.vocab_size) > INT32_MAX {
            let got = self.vocab_size;
            issues.push(ConfigIssue::new(
                "vocab_size",
                format!("must be 1 to {INT32_MAX}, is {got}"),
            ));
        }
        let block_size = self.scheduler.block_size;
        if block_size != 0 && !block_size.is_power_of_two() {
            let message = format!("must be a power of two, is {block_size}");
            issues.push(ConfigIssue::new("scheduler.block_size", message));
        }
        let bytes = self.model_files.len();
        if bytes > MODEL_FILES_BYTES_MAX {
            let limit = MODEL_FILES_BYTES_MAX;
            issues.push(ConfigIssue::new(
                "model_files",
                format!("hold {bytes} bytes, at most {limit}"),
            ));
        }
    }

    fn check_durations(&self, issues: &mut Vec<ConfigIssue>) {
        let durations = [
            ("heartbeat", self.heartbeat),
            ("connect_timeout", self.connect_timeout),
            ("keepalive", self.keepalive),
            ("keepalive_timeout", self.keepalive_timeout),
            ("outbound_stall_limit", self.outbound_stall_limit),
            ("reconnect.initial", self.reconnect.initial),
        ];
        for (key, duration) in durations {
            if duration < Duration::from_millis(1) {
                issues.push(ConfigIssue::new(
                    key,
                    format!("must be at least 1ms, is {duration:?}"),
                ));
            }
        }
        let ReconnectConfig { initial, max, .. } = self.reconnect;
        if max < initial {
            let message = format!("must be at least reconnect.initial ({initial:?}), is {max:?}");
            issues.push(ConfigIssue::new("reconnect.max", message));
        }
    }
}

/// What a worker is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prompts and outputs.
    #[default]
    Both,
    /// Prompts, whose KV goes to others; outputs only where nobody else is there.
    Prefill,
    /// Outputs; the KV of long prompts comes from others.
    Decode,
}

/// Pauses between attempts to reach the router: attempt `k` waits a random time up to `initial * 2^k`, capped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReconnectConfig {
    /// Longest first pause.
    #[serde(with = "humantime_serde")]
    pub initial: Duration,
    /// Longest pause of all.
    #[serde(with = "humantime_serde")]
    pub max: Duration,
    /// Seed of the jitter; absent: taken from the worker id, so that workers of one router spread out.
    pub seed: Option<u64>,
}

impl Default for ReconnectConfig {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(100),
            max: Duration::from_secs(5),
            seed: None,
        }
    }
}

/// What a router needs to read and write text for the model. At most 64 MiB together.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelFiles {
    /// `tokenizer.json`.
    #[serde(with = "serde_bytes")]
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`; may be empty.
    #[serde(with = "serde_bytes")]
    pub tokenizer_config_json: Vec<u8>,
    /// `generation_config.json`; may be empty.
    #[serde(with = "serde_bytes")]
    pub generation_config_json: Vec<u8>,
    /// `chat_template.jinja` where it is a file of its own; may be empty.
    pub chat_template: String,
}

impl ModelFiles {
    /// Bytes of all files together.
    pub fn len(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }

    /// Whether there is no file at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hex SHA-256 over the files in the order of the fields, each preceded by its length (`u64`, little-endian),
    /// so that no two sets of files read alike.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        for part in self.parts() {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut hex = String::with_capacity(64);
        for byte in hasher.finalize() {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        hex
    }

    fn parts(&self) -> [&[u8]; 4] {
        [
            &self.tokenizer_json,
            &self.tokenizer_config_json,
            &self.generation_config_json,
            self.chat_template.as_bytes(),
        ]
    }
}

/// Sizes only: the files are megabytes.
impl fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelFiles")
            .field("bytes", &self.parts().map(<[u8]>::len))
            .finish()
    }
}
