//! Engines that come, go and come back.

use std::time::Duration;

use orchestra_router::{
    Router,
    engines::{EngineConfig, EngineKind},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use crate::support::{
    Client, Engine, MODEL, answer, ask, chat, config, eventually, get, num_up, post, start,
    start_with_file,
};

async fn status(address: std::net::SocketAddr, path: &str) -> u16 {
    get(address, path).await.status
}

#[tokio::test]
async fn readiness_follows_the_engines() {
    let engine = Engine::start().await;
    let (_router, address) = start(config(), &[&engine]).await;
    assert_eq!(status(address, "/ready").await, 200);
    assert_eq!(status(address, "/health").await, 200);
    let at = engine.stop().await;
    eventually("not ready", || async {
        status(address, "/ready").await == 503
    })
    .await;
    let answer = ask(address, chat("")).await;
    assert_eq!(
        (answer.status, answer.code()),
        (503, "no_workers".to_owned())
    );
    assert!(answer.header("retry-after").is_some());
    assert!(
        get(address, "/v1/models").await.json()["data"]
            .as_array()
            .unwrap()
            .is_empty()
    );

    let mut engine = Engine::start_at(at, MODEL, "vllm").await;
    eventually("ready", || async { status(address, "/ready").await == 200 }).await;
    let client = Client::send(address, chat("")).await;
    engine.call().await.answer(200, "{}").await;
    assert_eq!(client.answer().await.status, 200);
}

/// Answers as a vLLM that does not say so with its models. `None`: hangs up on the first question of what it is.
fn page(path: &str, is_asked_again: bool) -> Option<String> {
    let (status, body) = match path {
        "/health" => (200, "{}"),
        "/v1/models" => (200, r#"{"data": [{"id": "m"}]}"#),
        "/version" => (200, r#"{"version": "1"}"#),
        _ if is_asked_again => (404, "{}"),
        _ => return None,
    };
    Some(answer(status, "", body))
}

/// The path of the next request.
async fn next_path(socket: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    Some(head.split(' ').nth(1).unwrap().to_owned())
}

#[tokio::test]
async fn an_engine_that_was_cut_off_is_asked_again_what_it_is() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let serving = async {
        let mut is_asked_again = false;
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            while let Some(path) = next_path(&mut socket).await {
                let Some(page) = page(&path, is_asked_again) else {
                    is_asked_again = true;
                    break;
                };
                socket.write_all(page.as_bytes()).await.unwrap();
            }
        }
    };
    let router = Router::start(&config()).unwrap();
    let engine = EngineConfig::new(url.parse().unwrap());
    router.state().add_engine(engine).unwrap();
    let known = eventually("the kind", || async {
        let engine = router.state().list_engines().remove(0);
        assert!(
            !engine.is_up || engine.kind == EngineKind::Vllm,
            "it is up, and nobody knows what it is"
        );
        engine.is_up
    });
    tokio::select! {
        biased;
        () = known => {}
        () = serving => {}
    }
}

#[tokio::test]
async fn models_are_those_that_engines_list() {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let (a, b) = (
        Engine::start_at(any, "a", "vllm").await,
        Engine::start_at(any, "b", "sglang").await,
    );
    let (_router, address) = start(config(), &[&a, &b]).await;
    let list = get(address, "/v1/models").await.json();
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].clone())
        .collect();
    assert_eq!(ids, ["a", "b"]);
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    let mut b = b;
    let body = "{\"model\": \"b\", \"prompt\": \"x\"}";
    let client = Client::send(address, post("/v1/completions", body)).await;
    b.call().await.answer(200, "{}").await;
    assert_eq!(client.answer().await.status, 200);
}

#[tokio::test]
async fn an_engine_that_fails_again_and_again_is_paused_and_tried_again() {
    let (mut a, mut b) = (Engine::start().await, Engine::start().await);
    let (router, address) = start(config(), &[&a, &b]).await;
    let bad = a.url();
    // `a` answers 500 to everything, `b` is well.
    let failing = async {
        loop {
            a.call().await.answer(500, "{}").await;
        }
    };
    let fine = async {
        loop {
            b.call().await.answer(200, "{}").await;
        }
    };
    let asking = async {
        let began = Instant::now();
        let state_of = |url: &str| {
            let engines = router.state().list_engines();
            let engine = engines
                .iter()
                .find(|engine| engine.config.url.as_str() == url);
            engine.unwrap().breaker
        };
        while state_of(&bad) != "open" {
            assert_eq!(ask(address, chat("")).await.status, 200);
            assert!(began.elapsed() < Duration::from_secs(20));
        }
        eventually("half open", || {
            let is_so = state_of(&bad) == "half_open";
            async move { is_so }
        })
        .await;
    };
    // A wait inside for a call that never comes is not a failure here.
    tokio::select! {
        () = asking => {}
        () = failing => {}
        () = fine => {}
    }
    assert_eq!(num_up(&router), 1);
}

#[tokio::test]
async fn a_file_of_engines_is_followed() {
    let (mut a, mut b) = (Engine::start().await, Engine::start().await);
    let path = std::env::temp_dir().join(format!("engines-{}.toml", std::process::id()));
    let write = |text: String| {
        // As a careful writer does it: no reader sees half a file.
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(&fresh, &path).unwrap();
    };
    write(format!("[[engine]]\nurl = '{}'\n", a.url()));
    let (router, address) = start_with_file(&path);
    let urls = || -> Vec<String> {
        let engines = router.state().list_engines();
        engines
            .iter()
            .filter(|engine| engine.is_up)
            .map(|engine| engine.config.url.to_string())
            .collect()
    };
    let only = |url: String| {
        let expected = vec![url];
        eventually("the engine", move || std::future::ready(urls() == expected))
    };
    only(a.url()).await;
    let mut running = Client::send(address, chat(", \"stream\": true")).await;
    let mut call = a.call().await;
    call.begin_stream().await;
    call.say("one ").await;
    running.wait_for("one ").await;

    // A broken file changes nothing, and the next one counts.
    write("[[engine]]\nurl = 'nonsense'\n".to_owned());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(urls(), [a.url()]);
    write(format!(
        "[[engine]]\nurl = '{}'\nmax_num_seqs = 7\n",
        b.url()
    ));
    eventually("both engines", || std::future::ready(urls().len() == 2)).await;
    let client = Client::send(address, chat("")).await;
    b.call().await.answer(200, "{}").await;
    assert_eq!(client.answer().await.status, 200);
    // What runs on the one that is leaving ends in peace.
    call.say("two").await;
    call.finish_stream().await;
    assert_eq!(running.answer().await.text(), ("one two".to_owned(), true));
    only(b.url()).await;
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn a_file_that_is_broken_at_start_is_an_error() {
    let mut config = config();
    config.engines.engines_file = Some("/nowhere/engines.toml".into());
    let error = Router::start(&config).err().unwrap();
    assert!(error.to_string().contains("engines_file"), "{error}");
}

#[tokio::test]
async fn an_engine_that_is_drained_or_removed_gets_no_more() {
    let (a, mut b) = (Engine::start().await, Engine::start().await);
    let (router, address) = start(config(), &[&a, &b]).await;
    let url = a.url().parse().unwrap();
    router.state().drain_engine(&url, true).unwrap();
    for _ in 0..4 {
        let client = Client::send(address, chat("")).await;
        b.call().await.answer(200, "{}").await;
        assert_eq!(client.answer().await.status, 200);
    }
    router.state().remove_engine(&url).unwrap();
    assert!(router.state().remove_engine(&url).is_err());
    assert_eq!(router.state().list_engines().len(), 1);
    router
        .state()
        .remove_engine(&b.url().parse().unwrap())
        .unwrap();
    assert_eq!(ask(address, chat("")).await.status, 404);
}
