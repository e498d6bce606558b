//! The router's host: the real HTTP door and the real workers' door on simulated sockets.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use futures_util::future::BoxFuture;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use orchestra_router::{
    App, RouterConfig,
    engines::{
        EngineConfig, EngineUrl, Engines,
        connect::{Connect, Socket},
    },
    http_service,
    metrics::Metrics,
    state::RouterState,
    workers::gateway_service,
};
use tonic::service::Routes;
use turmoil::net::{TcpListener, TcpStream};

use crate::engine;

/// The host's name.
pub(crate) const ROUTER: &str = "router";
/// The hosts of foreign engines.
pub(crate) const ENGINES: [&str; 4] = ["e0", "e1", "e2", "e3"];
/// Where clients connect.
pub(crate) const HTTP_PORT: u16 = 8000;
/// Where workers attach.
pub(crate) const WORKERS_PORT: u16 = 8002;
/// Silence on a worker's connection after which a ping asks whether it is there, and how long the answer may take.
const PING: Duration = Duration::from_millis(400);

/// Long patience, so that every request comes to its proper end, and a short watch over hangs, so that there are many.
pub(crate) fn config() -> RouterConfig {
    let mut config = RouterConfig::default();
    let corridor = &mut config.corridor;
    corridor.hang_timeout.0 = Duration::from_secs(1);
    corridor.request_timeout.0 = Duration::from_secs(3600);
    corridor.replay_wait.0 = Duration::from_secs(1800);
    corridor.max_replays = u32::MAX;
    let engines = &mut config.engines;
    engines.engine_stall_timeout.0 = Duration::from_millis(500);
    engines.engine_ttft_timeout.0 = Duration::from_secs(1);
    engines.engine_answer_timeout.0 = Duration::from_secs(2);
    engines.engine_max_attempts = u32::MAX;
    engines.engine_retry_percent = 10_000;
    config
}

/// Runs the router until the simulation ends.
pub(crate) async fn run() -> turmoil::Result {
    let config = config();
    let engines = Engines::on_network(config.engines.limits(), Arc::new(SimulatedTcp));
    let limits = config.corridor.limits();
    let state = RouterState::simulated_with_engines(limits, Metrics::new(), engines);
    for name in ENGINES {
        let url = format!("http://{name}:{}", engine::PORT);
        state.add_engine(EngineConfig {
            // As for workers: batch requests have to give way.
            max_num_seqs: 2,
            ..EngineConfig::new(url.parse().unwrap())
        })?;
    }
    let clients = http_service(Arc::clone(&state), &config);
    let workers = Routes::new(gateway_service(state))
        .prepare()
        .into_axum_router();
    tokio::spawn(serve_clients(clients));
    serve_workers(workers).await;
    Ok(())
}

/// The way to the engines.
struct SimulatedTcp;

impl Connect for SimulatedTcp {
    fn connect(&self, url: &EngineUrl) -> BoxFuture<'static, io::Result<Box<dyn Socket>>> {
        let (host, port) = (url.host().to_owned(), url.port());
        Box::pin(async move {
            let stream = TcpStream::connect((host, port)).await?;
            Ok(Box::new(stream) as Box<dyn Socket>)
        })
    }
}

async fn serve_clients(app: App) {
    let listener = TcpListener::bind(("0.0.0.0", HTTP_PORT)).await.unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let app = app.clone();
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let app = app.clone();
            async move { Ok::<_, Infallible>(app.answer(request.map(Body::new)).await) }
        });
        // How a connection ends is the client's affair.
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn serve_workers(app: Router) {
    let listener = TcpListener::bind(("0.0.0.0", WORKERS_PORT)).await.unwrap();
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let service = TowerToHyperService::new(app.clone());
        tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
    }
}
