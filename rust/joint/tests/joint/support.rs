//! A router of this process, and workers that dial it.

use std::{
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use orchestra_agent::{AgentConfig, KvTransports, ModelFiles, ReconnectConfig, Role};
use orchestra_core::{TokenId, step::StepSchedulerConfig};
use orchestra_router::{
    caller::Caller,
    corridor::{TokenStream, generate},
    metrics::Metrics,
    observe::Record,
    request::{GenerateInput, Prompt, SamplingPatch},
    state::{CorridorLimits, RouterState},
    workers::gateway_service,
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

#[path = "../../../router/src/text/fixtures.rs"]
#[expect(
    dead_code,
    reason = "shared with the router's tests, which use more of it"
)]
mod fixtures;
#[path = "../../../agent/tests/agent/support/kv_engine.rs"]
#[expect(
    dead_code,
    reason = "shared with the agent's tests, which use more of it"
)]
mod kv_engine;

pub(crate) use kv_engine::{KvEngine, kv_pool_with, reference};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const MODEL: &str = "demo";
/// 100 blocks of four tokens, and a tail.
pub(crate) const PROMPT: u32 = 402;
/// Its whole blocks.
pub(crate) const PROMPT_BLOCKS: u64 = 100;

pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The settings of a worker.
pub(crate) fn config(address: SocketAddr, name: &str, role: Role) -> AgentConfig {
    AgentConfig {
        router: format!("http://{address}"),
        worker_id: name.to_owned(),
        model: MODEL.to_owned(),
        role,
        vocab_size: 1000,
        model_files: ModelFiles {
            tokenizer_json: fixtures::byte_level(fixtures::LLAMA3_WORDS),
            tokenizer_config_json: b"{}".to_vec(),
            ..ModelFiles::default()
        },
        scheduler: StepSchedulerConfig {
            block_size: 4,
            num_blocks: 1024,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            max_model_len: 2048,
            max_num_waiting: 16,
            eos_token_ids: vec![2],
            ..StepSchedulerConfig::default()
        },
        heartbeat: Duration::from_millis(20),
        close_grace: Duration::from_millis(20),
        reconnect: ReconnectConfig {
            initial: Duration::from_millis(5),
            max: Duration::from_millis(50),
            seed: Some(1),
        },
        ..AgentConfig::default()
    }
}

/// A router.
pub(crate) struct Cluster {
    pub(crate) state: Arc<RouterState>,
    pub(crate) address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Cluster {
    /// The machine may be busy with other tests, so nobody is taken for lost who is silent.
    pub(crate) async fn start() -> Self {
        Self::start_with(Duration::from_secs(60)).await
    }

    /// One that takes a worker for lost when it was silent for so long.
    pub(crate) async fn start_with(heartbeat_timeout: Duration) -> Self {
        let limits = CorridorLimits {
            heartbeat_timeout,
            hang_timeout: Duration::from_secs(60),
            ..CorridorLimits::default()
        };
        let state = RouterState::new(limits, Metrics::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder()
            .add_service(gateway_service(Arc::clone(&state)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { server.await.unwrap() });
        Self {
            state,
            address,
            _tasks: tasks,
        }
    }

    /// Starts a worker, and returns once requests can be placed on it.
    pub(crate) fn worker(&self, name: &str, role: Role, transports: KvTransports) -> KvEngine {
        let config = config(self.address, name, role);
        let before = self.num_workers();
        let engine = KvEngine::start(&config, kv_pool_with(&config, transports, |_| {}));
        eventually("the worker", || self.num_workers() > before);
        engine
    }

    pub(crate) fn num_workers(&self) -> u32 {
        let models = self.state.list_models();
        models.first().map_or(0, |model| model.num_workers)
    }

    pub(crate) async fn begin(&self, prompt: &[TokenId], max_tokens: u32) -> TokenStream {
        let input = GenerateInput {
            model: MODEL.to_owned(),
            prompt: Prompt::TokenIds(prompt.to_vec()),
            sampling: SamplingPatch {
                max_tokens: Some(max_tokens),
                ..SamplingPatch::default()
            },
            stop: Vec::new(),
            n: 1,
            timeout: None,
            cache_salt: String::new(),
            caller: Caller::default(),
            record: Record::default(),
        };
        generate(&self.state, input).await.unwrap()
    }

    /// Runs a request and compares its tokens with those that the prompt has to give.
    pub(crate) async fn check(&self, prompt: &[TokenId], max_tokens: u32) {
        let stream = self.begin(prompt, max_tokens).await;
        let token_ids = collect(stream).await;
        assert_eq!(token_ids, reference(prompt, max_tokens as usize));
    }

    pub(crate) fn moves(&self, kind: &str, outcome: &str) -> u64 {
        self.metric(&format!(
            "orchestra_kv_moves_total{{kind=\"{kind}\",outcome=\"{outcome}\"}}"
        ))
    }

    /// Blocks that workers have copied for others, as they have reported it.
    pub(crate) fn num_kept(&self) -> u64 {
        self.metric("orchestra_worker_kv_blocks_kept_total")
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.state.metrics.encode().unwrap();
        let mut figures = text.lines().filter_map(|line| line.strip_prefix(name));
        figures.next().unwrap().trim().parse().unwrap()
    }
}

/// Waits until a keeper has so many blocks.
pub(crate) async fn wait_for_kept(keeper: &KvEngine, num_blocks: u64) {
    let agent = Arc::clone(&keeper.agent);
    let wait = move || {
        eventually("the copies", || agent.stats().kv_blocks_kept >= num_blocks);
    };
    tokio::task::spawn_blocking(wait).await.unwrap();
}

pub(crate) async fn collect(mut stream: TokenStream) -> Vec<TokenId> {
    let mut token_ids = Vec::new();
    while let Some(chunk) = stream.next().await {
        token_ids.extend(chunk.unwrap().token_ids);
    }
    token_ids
}

pub(crate) fn prompt(seed: u32, len: u32) -> Vec<TokenId> {
    (0..len)
        .map(|index| (index * 7 + seed * 13) % 250 + 3)
        .collect()
}
