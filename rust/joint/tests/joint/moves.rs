//! KV that moves between real agents because a real router says so. Their model computes nothing of use, but each token that
//! it draws depends on every byte of KV that the sequence sees: one wrong block, and an answer differs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future};
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

#[path = "../../router/src/text/fixtures.rs"]
#[expect(
    dead_code,
    reason = "shared with the router's tests, which use more of it"
)]
mod fixtures;
#[path = "../../agent/tests/agent/support/kv_engine.rs"]
#[expect(
    dead_code,
    reason = "shared with the agent's tests, which use more of it"
)]
mod kv_engine;

use kv_engine::{KvEngine, kv_pool, reference};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);
const MODEL: &str = "demo";
/// 100 blocks of four tokens, and a tail.
const PROMPT: u32 = 402;

pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

struct Cluster {
    state: Arc<RouterState>,
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Cluster {
    async fn start() -> Self {
        let limits = CorridorLimits {
            // The machine may be busy with other tests.
            heartbeat_timeout: Duration::from_secs(60),
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
    fn worker(&self, name: &str, role: Role, transports: KvTransports) -> KvEngine {
        let config = AgentConfig {
            router: format!("http://{}", self.address),
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
        };
        let before = self.num_workers();
        let engine = KvEngine::start(&config, kv_pool(&config, transports));
        eventually("the worker", || self.num_workers() > before);
        engine
    }

    fn num_workers(&self) -> u32 {
        let models = self.state.list_models();
        models.first().map_or(0, |model| model.num_workers)
    }

    async fn begin(&self, prompt: &[TokenId], max_tokens: u32) -> TokenStream {
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
    async fn check(&self, prompt: &[TokenId], max_tokens: u32) {
        let stream = self.begin(prompt, max_tokens).await;
        let token_ids = collect(stream).await;
        assert_eq!(token_ids, reference(prompt, max_tokens as usize));
    }

    fn moves(&self, kind: &str, outcome: &str) -> u32 {
        let labels = format!("kind=\"{kind}\",outcome=\"{outcome}\"");
        let name = format!("orchestra_kv_moves_total{{{labels}}} ");
        let text = self.state.metrics.encode().unwrap();
        let mut figures = text.lines().filter_map(|line| line.strip_prefix(&name));
        figures.next().unwrap().parse().unwrap()
    }
}

async fn collect(mut stream: TokenStream) -> Vec<TokenId> {
    let mut token_ids = Vec::new();
    while let Some(chunk) = stream.next().await {
        token_ids.extend(chunk.unwrap().token_ids);
    }
    token_ids
}

fn prompt(seed: u32, len: u32) -> Vec<TokenId> {
    (0..len)
        .map(|index| (index * 7 + seed * 13) % 250 + 3)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_with_a_common_beginning_spreads_and_fetches_it() {
    let cluster = Cluster::start().await;
    let a = cluster.worker("a", Role::Both, KvTransports::Auto);
    let b = cluster.worker("b", Role::Both, KvTransports::Auto);
    let common = prompt(1, PROMPT);
    cluster.check(&common, 2).await;
    let prompts: Vec<Vec<TokenId>> = (0..6)
        .map(|number| [&common[..], &prompt(50 + number, 9)].concat())
        .collect();
    let answers = prompts.iter().map(|prompt| cluster.check(prompt, 12));
    future::join_all(answers).await;
    assert!(cluster.moves("fetch", "moved") > 0);
    assert_eq!(cluster.moves("fetch", "computed"), 0);
    for worker in [&a, &b] {
        worker.wait_until_quiet();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_prompts_are_computed_by_one_worker_for_the_other() {
    for transports in [KvTransports::Auto, KvTransports::Tcp] {
        let cluster = Cluster::start().await;
        let p = cluster.worker("p", Role::Prefill, transports);
        let d = cluster.worker("d", Role::Decode, transports);
        for seed in 0..2 {
            cluster.check(&prompt(seed, PROMPT), 6).await;
        }
        assert_eq!(cluster.moves("split", "moved"), 2);
        assert_eq!(d.agent.stats().kv_blocks_fetched, 200);
        p.wait_until_quiet();
        d.wait_until_quiet();
        // Whole requests go where only prompts were computed, once nobody else is left.
        drop(d);
        eventually("the loss", || cluster.num_workers() == 1);
        cluster.check(&prompt(7, 30), 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_whose_worker_dies_is_computed_where_it_is_awaited() {
    let cluster = Cluster::start().await;
    let p = cluster.worker("p", Role::Prefill, KvTransports::Auto);
    let d = cluster.worker("d", Role::Decode, KvTransports::Auto);
    // It stands still behind the first layer of its first step.
    p.allow(0);
    let prompt = prompt(5, PROMPT);
    let kill = async {
        let stop = move || {
            eventually("the prompt is being computed", || p.agent.stats().steps > 0);
            drop(p);
        };
        tokio::task::spawn_blocking(stop).await.unwrap();
    };
    tokio::join!(cluster.check(&prompt, 6), kill);
    assert_eq!(cluster.moves("split", "computed"), 1);
    d.wait_until_quiet();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_dies_while_decoding_is_replaced_and_nothing_is_lost() {
    let cluster = Cluster::start().await;
    let p = cluster.worker("p", Role::Prefill, KvTransports::Auto);
    let d = cluster.worker("d", Role::Decode, KvTransports::Auto);
    let prompt = prompt(9, PROMPT);
    let mut stream = cluster.begin(&prompt, 40).await;
    let mut token_ids = stream.next().await.unwrap().unwrap().token_ids;
    let e = cluster.worker("e", Role::Decode, KvTransports::Auto);
    tokio::task::spawn_blocking(move || drop(d)).await.unwrap();
    token_ids.extend(collect(stream).await);
    assert_eq!(token_ids, reference(&prompt, 40));
    for worker in [&p, &e] {
        worker.wait_until_quiet();
    }
}
