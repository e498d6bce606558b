//! What one foreign engine is, and how all of them are treated.

use std::{path::PathBuf, time::Duration};

use orchestra_cluster::StoreUrl;
use orchestra_core::{config::ConfigIssue, scheduler::NAME_BYTES_MAX};
use serde::{Deserialize, Serialize};

use super::url::EngineUrl;
use crate::{
    config::{Secret, Span},
    kv_events::Endpoint,
};

/// One foreign engine. Flags give the URL alone; files and the admin API give all of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// `http://host:port`, with a base path where the engine's routes do not begin at the root.
    pub url: EngineUrl,
    /// The one model to use it for; without it, all that its `GET /v1/models` lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Sent to the engine as `Authorization: Bearer KEY`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<Secret>,
    /// Requests that it runs at once; those above wait in its own queue.
    #[serde(default = "max_num_seqs")]
    pub max_num_seqs: u32,
    /// Tokens that its KV cache holds, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_tokens: Option<u32>,
    /// How a broken stream is continued on it.
    #[serde(default)]
    pub replay: ReplayMeans,
    /// Tokens of one block of its KV cache; counts where `model_files` are given.
    #[serde(default = "kv_block_size")]
    pub kv_block_size: u32,
    /// ZMQ endpoint where it publishes its KV events: `tcp://host:port` or `ipc:///path`. Needs `model_files`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_events: Option<Endpoint>,
    /// The topic that it publishes them under; empty takes all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kv_topic: String,
    /// ZMQ endpoint that gives lost KV events again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_replay: Option<Endpoint>,
    /// Directory with the model's tokeniser and template, for exact prefixes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_files: Option<PathBuf>,
}

/// vLLM's own default.
const fn max_num_seqs() -> u32 {
    256
}

/// vLLM's own default.
const fn kv_block_size() -> u32 {
    16
}

/// Longest topic of KV events, bytes.
const TOPIC_BYTES_MAX: usize = 128;

/// How an engine continues an answer that another one began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplayMeans {
    /// What its kind is known to offer.
    #[default]
    Auto,
    /// A prompt of token ids, where the ids of the answer so far are known; completions only.
    TokenIds,
    /// A last message of the assistant with `continue_final_message` (vLLM, `SGLang`).
    ContinueFinalMessage,
    /// The prompt's text with the answer so far behind it; chats end with a message of the assistant that the engine
    /// goes on with by itself (llama.cpp).
    PromptText,
    /// It offers none: a stream that breaks ends with an error.
    None,
}

impl EngineConfig {
    /// An engine with the defaults.
    pub fn new(url: EngineUrl) -> Self {
        Self {
            url,
            model: None,
            api_key: None,
            max_num_seqs: max_num_seqs(),
            kv_tokens: None,
            replay: ReplayMeans::Auto,
            kv_block_size: kv_block_size(),
            kv_events: None,
            kv_topic: String::new(),
            kv_replay: None,
            model_files: None,
        }
    }

    /// Everything that is wrong, as keys below `engine`.
    pub fn validate(&self) -> Result<(), Vec<ConfigIssue>> {
        let mut issues = Vec::new();
        let mut check = |key, is_fine: bool, message: &str| {
            if !is_fine {
                issues.push(ConfigIssue::new(key, message));
            }
        };
        let is_name = |name: &String| (1..=NAME_BYTES_MAX).contains(&name.len());
        check(
            "engine.model",
            self.model.as_ref().is_none_or(is_name),
            "must have 1 to 128 bytes",
        );
        check(
            "engine.max_num_seqs",
            self.max_num_seqs > 0,
            "must be at least 1",
        );
        check(
            "engine.kv_tokens",
            self.kv_tokens != Some(0),
            "must be at least 1",
        );
        check(
            "engine.kv_block_size",
            self.kv_block_size > 0,
            "must be at least 1",
        );
        check(
            "engine.kv_events",
            self.kv_events.is_none() || self.model_files.is_some(),
            "needs model_files: events tell of tokens",
        );
        check(
            "engine.kv_replay",
            self.kv_replay.is_none() || self.kv_events.is_some(),
            "needs kv_events",
        );
        check(
            "engine.kv_topic",
            self.kv_topic.len() <= TOPIC_BYTES_MAX,
            "must have at most 128 bytes",
        );
        let key = self.api_key.as_ref();
        check(
            "engine.api_key",
            key.is_none_or(|key| !key.is_empty() && key.is_header_value()),
            "must be visible ASCII characters",
        );
        if issues.is_empty() {
            Ok(())
        } else {
            Err(issues)
        }
    }
}

/// Foreign engines: where they are, and how long they may take.
#[derive(Clone, Debug, clap::Args)]
pub struct EnginesConfig {
    /// URL of an engine that speaks OpenAI's HTTP API (vLLM, `SGLang`, TGI, llama.cpp), to be used as a worker; give it
    /// several times, or separated by commas. Orchestra's own workers dial the address of --workers instead.
    #[arg(long = "worker", visible_alias = "engine", value_name = "URL")]
    #[arg(env = "ORCHESTRA_WORKER", value_delimiter = ',')]
    pub urls: Vec<EngineUrl>,
    /// The file's `[[engine]]` tables.
    #[arg(skip)]
    pub listed: Vec<EngineConfig>,
    /// A file with engines, TOML (`[[engine]]`) or JSON, which is followed while the router runs; it says more of each
    /// than a URL can.
    #[arg(long, value_name = "PATH", env = "ORCHESTRA_ENGINES_FILE")]
    pub engines_file: Option<PathBuf>,
    /// An etcd with engines, which is followed while the router runs: a JSON object for each under
    /// `PREFIX/engines/NAME`, with the fields of --engines-file. The prefix is `/orchestra` unless it is given.
    #[arg(
        long,
        value_name = "etcd://HOST:PORT[,…][/PREFIX]",
        env = "ORCHESTRA_STORE"
    )]
    pub store: Option<StoreUrl>,
    /// How long a connection to an engine may take to open.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_ENGINE_CONNECT_TIMEOUT")]
    #[arg(default_value_t = Self::default().engine_connect_timeout)]
    pub engine_connect_timeout: Span,
    /// How long the first event of an engine's stream may take; after that the request goes to another engine.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_ENGINE_TTFT_TIMEOUT")]
    #[arg(default_value_t = Self::default().engine_ttft_timeout)]
    pub engine_ttft_timeout: Span,
    /// The longest silence between two events of an engine's stream; after that it is continued on another engine.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_ENGINE_STALL_TIMEOUT")]
    #[arg(default_value_t = Self::default().engine_stall_timeout)]
    pub engine_stall_timeout: Span,
    /// How long an engine may take for an answer that is not streamed; after that the request goes to another engine.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_ENGINE_ANSWER_TIMEOUT")]
    #[arg(default_value_t = Self::default().engine_answer_timeout)]
    pub engine_answer_timeout: Span,
    /// How many engines a request may be sent to before its first byte has gone to the client.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_ENGINE_MAX_ATTEMPTS")]
    #[arg(default_value_t = Self::default().engine_max_attempts)]
    pub engine_max_attempts: u32,
    /// Retries that the engines get at most, in percent of the requests of the last ten seconds; ten a second are
    /// always allowed.
    #[arg(long, value_name = "PERCENT", env = "ORCHESTRA_ENGINE_RETRY_PERCENT")]
    #[arg(default_value_t = Self::default().engine_retry_percent)]
    pub engine_retry_percent: u32,
}

impl Default for EnginesConfig {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            listed: Vec::new(),
            engines_file: None,
            store: None,
            engine_connect_timeout: Span(Duration::from_secs(1)),
            engine_ttft_timeout: Span(Duration::from_secs(60)),
            engine_stall_timeout: Span(Duration::from_secs(10)),
            engine_answer_timeout: Span(Duration::from_secs(300)),
            engine_max_attempts: 3,
            engine_retry_percent: 20,
        }
    }
}

impl EnginesConfig {
    /// The engines that flags and the file name.
    pub fn engines(&self) -> impl Iterator<Item = EngineConfig> + '_ {
        let urls = self.urls.iter().cloned().map(EngineConfig::new);
        urls.chain(self.listed.iter().cloned())
    }

    /// What is wrong with any of them.
    pub(crate) fn engine_issues(&self) -> Vec<ConfigIssue> {
        let mut seen = Vec::new();
        let mut issues = Vec::new();
        for engine in self.engines() {
            issues.extend(engine.validate().err().into_iter().flatten());
            if seen.contains(&engine.url) {
                let message = format!("{} is given twice", engine.url);
                issues.push(ConfigIssue::new("engine.url", message));
            }
            seen.push(engine.url);
        }
        issues
    }

    /// How all engines are treated.
    pub fn limits(&self) -> EngineLimits {
        EngineLimits {
            connect_timeout: self.engine_connect_timeout.0,
            ttft_timeout: self.engine_ttft_timeout.0,
            stall_timeout: self.engine_stall_timeout.0,
            answer_timeout: self.engine_answer_timeout.0,
            max_attempts: self.engine_max_attempts,
            retry_percent: self.engine_retry_percent,
        }
    }

    /// The time limits for which zero would mean "never works".
    pub(crate) fn spans(&self) -> [(&'static str, Span); 4] {
        [
            ("engine_connect_timeout", self.engine_connect_timeout),
            ("engine_ttft_timeout", self.engine_ttft_timeout),
            ("engine_stall_timeout", self.engine_stall_timeout),
            ("engine_answer_timeout", self.engine_answer_timeout),
        ]
    }
}

/// How all engines are treated; the defaults are those of [`EnginesConfig`], whose fields say what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// For a connection to open.
    pub connect_timeout: Duration,
    /// To the first event of a stream.
    pub ttft_timeout: Duration,
    /// Between two events.
    pub stall_timeout: Duration,
    /// For an answer that is not streamed.
    pub answer_timeout: Duration,
    /// Engines that one request is sent to.
    pub max_attempts: u32,
    /// Retries in percent of requests.
    pub retry_percent: u32,
}

impl Default for EngineLimits {
    fn default() -> Self {
        EnginesConfig::default().limits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_s_entry_has_defaults_and_no_unknown_keys() {
        let minimal: EngineConfig = serde_json::from_str(r#"{"url": "http://a:1"}"#).unwrap();
        assert_eq!(minimal, EngineConfig::new("http://a:1".parse().unwrap()));
        let text = r#"{"url": "http://a:1", "model": "m", "api_key": "sk-1", "replay": "token_ids",
            "max_num_seqs": 8, "kv_tokens": 1000, "kv_events": "tcp://a:2", "kv_replay": "tcp://a:3",
            "model_files": "/m"}"#;
        let full: EngineConfig = serde_json::from_str(text).unwrap();
        full.validate().unwrap();
        assert_eq!((full.max_num_seqs, full.kv_tokens), (8, Some(1000)));
        assert_eq!(full.replay, ReplayMeans::TokenIds);
        let shown = serde_json::to_string(&full).unwrap() + &format!("{full:?}");
        assert!(!shown.contains("sk-1"), "{shown}");
        for wrong in [
            r#"{"url": "http://a:1", "ulr": 1}"#,
            r#"{"url": "https://a:1"}"#,
            r#"{"url": "http://a:1", "replay": "often"}"#,
            r#"{"url": "http://a:1", "kv_events": "a:2"}"#,
            "{}",
        ] {
            assert!(
                serde_json::from_str::<EngineConfig>(wrong).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn all_issues_are_reported_at_once() {
        let config = EngineConfig {
            model: Some(String::new()),
            api_key: Some("a\nb".parse().unwrap()),
            max_num_seqs: 0,
            kv_tokens: Some(0),
            kv_block_size: 0,
            kv_events: Some("tcp://a:1".parse().unwrap()),
            kv_topic: "t".repeat(129),
            ..EngineConfig::new("http://a:1".parse().unwrap())
        };
        let issues = config.validate().unwrap_err();
        let keys: Vec<_> = issues.iter().map(|issue| issue.key.as_str()).collect();
        let expected = [
            "engine.model",
            "engine.max_num_seqs",
            "engine.kv_tokens",
            "engine.kv_block_size",
            "engine.kv_events",
            "engine.kv_topic",
            "engine.api_key",
        ];
        assert_eq!(keys, expected);
    }
}
