//! Requests to two engines, of which one says that it holds their beginning.

use std::{path::PathBuf, time::Duration};

use axum::{
    Router,
    routing::{get, post},
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::{net::TcpListener, time::timeout};

use crate::{
    corridor::relay::{Outward, Route, read, relay},
    engines::EngineConfig,
    http::fields::Fields,
    kv_events::testing::MockEngine,
    metrics::Metrics,
    state::{CorridorLimits, RouterState},
    tasks::Tasks,
    text::{
        fixtures::{LLAMA3_WORDS, byte_level},
        tokenizer::ModelTokenizer,
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
const BLOCK_SIZE: usize = 16;

/// A directory with a model's files, removed at the end.
struct ModelFiles(PathBuf);

impl ModelFiles {
    fn write(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("orchestra-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("tokenizer.json"), byte_level(LLAMA3_WORDS)).unwrap();
        let template =
            "<|bos|>{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}";
        let config = json!({"chat_template": template}).to_string();
        std::fs::write(path.join("tokenizer_config.json"), config).unwrap();
        Self(path)
    }
}

impl Drop for ModelFiles {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The HTTP side of an engine by hand, which names itself and reports that it had so many tokens in its cache.
async fn http_engine(tasks: &Tasks, name: &'static str, cached_tokens: u32) -> String {
    let models = json!({"data": [{"id": "m"}]}).to_string();
    let details = json!({"cached_tokens": cached_tokens});
    let usage =
        json!({"prompt_tokens": 60, "completion_tokens": 1, "prompt_tokens_details": details});
    let answer = json!({"name": name, "choices": [], "usage": usage}).to_string();
    let app = Router::new()
        .route("/health", get(|| async {}))
        .route("/v1/models", get(move || async { models }))
        .route("/v1/chat/completions", post(move || async { answer }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let token = tasks.shutdown_token().clone();
    tasks.spawn(async move {
        let serving = axum::serve(listener, app).with_graceful_shutdown(token.cancelled_owned());
        serving.await.unwrap();
    });
    url
}

fn body(system: &str) -> Value {
    json!({"model": "m", "messages": [
        {"role": "system", "content": system}, {"role": "user", "content": "hello world"}]})
}

/// The name of the engine that answered.
async fn ask(state: &std::sync::Arc<RouterState>, body: &Value) -> String {
    let body = Bytes::from(body.to_string());
    let fields = Fields::parse(&body).unwrap();
    let model = state.models.foreign("m").unwrap();
    let outward = Outward::of(&axum::http::HeaderMap::new());
    let request = read(Route::Chat, outward, model, &body, &fields).unwrap();
    let response = relay(state, request, PATIENCE).await.unwrap();
    let answer = response.into_body().collect().await.unwrap().to_bytes();
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    answer["name"].as_str().unwrap().to_owned()
}

async fn eventually(mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(timeout(PATIENCE, waiting).await.is_ok());
}

#[tokio::test]
async fn requests_go_where_their_beginning_is_held_and_the_engine_confirms_it() {
    let files = ModelFiles::write("exact");
    let tasks = Tasks::default();
    let state = RouterState::new(CorridorLimits::default(), Metrics::new());
    let mut publishers = Vec::new();
    let mut urls = Vec::new();
    for (name, cached_tokens) in [("first", 0), ("second", 48)] {
        let url = http_engine(&tasks, name, cached_tokens).await;
        let publisher = MockEngine::start().await;
        let config = EngineConfig {
            kv_events: Some(publisher.events.clone()),
            kv_topic: "kv".into(),
            kv_replay: Some(publisher.replay.clone()),
            model_files: Some(files.0.clone()),
            ..EngineConfig::new(url.parse().unwrap())
        };
        state.add_engine(config).unwrap();
        publishers.push(publisher);
        urls.push(url);
    }
    for publisher in &publishers {
        timeout(PATIENCE, publisher.subscribed()).await.unwrap();
    }
    eventually(|| state.list_engines().iter().all(|engine| engine.is_up)).await;

    // What the second engine computed: all full blocks of the prompt, in its own names for them.
    let system = "the quick brown fox jumps over it";
    let tokenizer = ModelTokenizer::from_json(&byte_level(LLAMA3_WORDS)).unwrap();
    let text = format!("<|bos|>system: {system}<|end|>user: hello world<|end|>");
    let token_ids = tokenizer.encode(&text, false).unwrap();
    let num_blocks = token_ids.len() / BLOCK_SIZE;
    assert_eq!(num_blocks, 3, "{} tokens", token_ids.len());
    let hashes: Vec<u64> = (0..num_blocks as u64).map(|at| at + 77).collect();
    let stored = json!({"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": null,
        "token_ids": token_ids[..num_blocks * BLOCK_SIZE], "block_size": BLOCK_SIZE, "lora_id": null,
        "medium": "GPU", "lora_name": null, "extra_keys": [null, null, null], "group_idx": 0});
    publishers[1].publish(&json!([stored]), true);
    let held = |state: &RouterState| state.workers.cached_blocks(&format!("{} m", urls[1]));
    eventually(|| held(&state) == Some(3)).await;

    for _ in 0..5 {
        assert_eq!(ask(&state, &body(system)).await, "second");
    }
    let published = state.metrics.encode().unwrap();
    for figure in ["predicted", "reported"] {
        let worker = format!("{} m", urls[1]);
        let line = format!("cached_tokens_{figure}_total{{worker=\"{worker}\"}} 240\n");
        assert!(published.contains(&line), "{published}");
    }

    // Without them it is a prompt like any other: it takes turns.
    publishers[1].publish(&json!([["AllBlocksCleared"]]), true);
    eventually(|| held(&state) == Some(0)).await;
    let answers = [
        ask(&state, &body(system)).await,
        ask(&state, &body(system)).await,
    ];
    assert!(answers.contains(&"first".to_owned()), "{answers:?}");
    state.remove_engine(&urls[1].parse().unwrap()).unwrap();
    eventually(|| {
        state
            .metrics
            .encode()
            .unwrap()
            .contains("kv_event_streams 1\n")
    })
    .await;
    state.shut_down().await;
    tasks.shut_down().await;
}

/// Against a real engine: `ORCHESTRA_TEST_VLLM="URL EVENTS REPLAY MODEL_FILES"`, with a block size of 32, the topic `kv`
/// and `--enable-prompt-tokens-details`.
#[tokio::test]
#[ignore = "needs a vLLM that runs, named by ORCHESTRA_TEST_VLLM"]
async fn a_real_vllm_confirms_what_its_events_say() {
    let named = std::env::var("ORCHESTRA_TEST_VLLM").unwrap();
    let [url, events, replay, files] = named.split(' ').collect::<Vec<_>>()[..] else {
        panic!("ORCHESTRA_TEST_VLLM must be four words")
    };
    let state = RouterState::new(CorridorLimits::default(), Metrics::new());
    let config = EngineConfig {
        kv_block_size: 32,
        kv_events: Some(events.parse().unwrap()),
        kv_topic: "kv".into(),
        kv_replay: Some(replay.parse().unwrap()),
        model_files: Some(files.into()),
        ..EngineConfig::new(url.parse().unwrap())
    };
    state.add_engine(config).unwrap();
    eventually(|| state.list_engines().iter().all(|engine| engine.is_up)).await;
    let name = format!("{url} {}", state.list_engines()[0].models[0]);
    let held = || state.workers.cached_blocks(&name);
    eventually(|| {
        state
            .metrics
            .encode()
            .unwrap()
            .contains("kv_event_streams 1\n")
    })
    .await;

    // A beginning that it has never seen, and then longer and longer chats with it.
    let salt = fastrand::u64(..);
    let mut messages =
        vec![json!({"role": "system", "content": format!("run {salt} ").repeat(20)})];
    let model = &state.list_engines()[0].models[0];
    let before = u64::from(held().unwrap_or(0));
    for turn in 0..4 {
        messages.push(json!({"role": "user", "content": format!("turn {turn} ").repeat(30)}));
        let body = json!({"model": model, "messages": messages, "max_tokens": 1, "temperature": 0});
        let body = Bytes::from(body.to_string());
        let fields = Fields::parse(&body).unwrap();
        let outward = Outward::of(&axum::http::HeaderMap::new());
        let model = state.models.foreign(model).unwrap();
        let request = read(Route::Chat, outward, model, &body, &fields).unwrap();
        let response = relay(&state, request, PATIENCE).await.unwrap();
        assert_eq!(response.status(), 200);
        let answer = response.into_body().collect().await.unwrap().to_bytes();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        // Each turn fills new blocks, and their events come.
        let num_blocks = answer["usage"]["prompt_tokens"].as_u64().unwrap() / 32;
        eventually(|| held().map(u64::from) >= Some(before + num_blocks)).await;
    }
    let published = state.metrics.encode().unwrap();
    let figure = |of: &str| {
        let line = format!("orchestra_cached_tokens_{of}_total{{worker=\"{name}\"}} ");
        let rest = published.split_once(&line).unwrap().1;
        rest.lines().next().unwrap().parse::<u64>().unwrap()
    };
    assert!(figure("predicted") > 0, "{published}");
    assert_eq!(figure("predicted"), figure("reported"), "{published}");
    state.shut_down().await;
}
