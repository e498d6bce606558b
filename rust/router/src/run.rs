//! A router from its first bound port to its last answered request.

use std::{ffi::OsString, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use orchestra_core::config::ConfigIssue;
use serde::Serialize;
use tonic::service::Routes;

use crate::{
    config::{RouterConfig, join},
    engines::{EngineConfig, Engines, file, store},
    grpc,
    http::{HttpDoor, admin},
    listen::{Door, Listener},
    metrics::Metrics,
    observe::{AccessLog, Exporter, ExporterError, Observers},
    operations::{Operations, unix_seconds},
    state::RouterState,
    workers::gateway_service,
};

/// How long tasks may take to end once the last request has; nothing of a client's is waiting then.
const LAST_TASKS: Duration = Duration::from_secs(3);

/// Why a router did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Settings that cannot be used, all of them.
    #[error("invalid configuration: {}", join(.0))]
    Config(Vec<ConfigIssue>),
    /// A port could not be bound.
    #[error("cannot listen on {address} ({}): {source}", door.as_str())]
    Bind {
        /// Which listener.
        door: Door,
        /// The configured address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The process has no runtime, signals or standard output.
    #[error(transparent)]
    Process(#[from] io::Error),
    /// Spans cannot be sent where the settings say.
    #[error(transparent)]
    Exporter(#[from] ExporterError),
    /// The reflection service refused our own descriptors.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Where a router listens, with its real ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Addresses {
    /// OpenAI HTTP, health and metrics.
    pub http: SocketAddr,
    /// gRPC for clients.
    pub grpc: SocketAddr,
    /// gRPC for workers.
    pub workers: SocketAddr,
    /// HTTP for operators.
    pub admin: SocketAddr,
}

/// A router that is bound and accepts.
pub struct Router {
    state: Arc<RouterState>,
    addresses: Addresses,
    operations: Arc<Operations>,
}

/// Adds the engines of flags and settings, and follows what says more of them.
fn use_engines(
    state: &Arc<RouterState>,
    config: &RouterConfig,
    from_file: Option<(PathBuf, Vec<EngineConfig>)>,
) {
    if let Some((path, engines)) = from_file {
        let following = file::follow(Arc::clone(state), path, engines);
        state.tasks.spawn(following);
    }
    if let Some(url) = config.engines.store.clone() {
        state.tasks.spawn(store::follow(Arc::clone(state), url));
    }
    for engine in state.settings().engines.clone() {
        let url = engine.url.clone();
        if let Err(error) = state.add_engine(engine) {
            tracing::warn!(%url, %error, "engine not added");
        }
    }
}

/// The engines that the file of engines has at start, and where to look for the next ones.
fn engines_of_file(
    config: &RouterConfig,
) -> Result<Option<(PathBuf, Vec<EngineConfig>)>, RunError> {
    let Some(path) = &config.engines.engines_file else {
        return Ok(None);
    };
    let engines = file::read(path).map_err(|error| {
        RunError::Config(vec![ConfigIssue::new("engines_file", error.to_string())])
    })?;
    Ok(Some((path.clone(), engines)))
}

impl Router {
    /// Checks the settings, binds the listeners and begins to accept.
    ///
    /// # Errors
    /// A setting that cannot be used, a port that cannot be bound. Nothing is left open then.
    pub fn start(config: &RouterConfig) -> Result<Self, RunError> {
        Self::start_with(config, Operations::default())
    }

    /// The same for a process that lets its operators change settings and logs.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn start_with(config: &RouterConfig, operations: Operations) -> Result<Self, RunError> {
        config.validate().map_err(RunError::Config)?;
        let from_file = engines_of_file(config)?;
        let bind = |door, address| {
            let listener = Listener::bind(door, address);
            listener.map_err(|source| RunError::Bind {
                door,
                address,
                source,
            })
        };
        let listen = &config.listen;
        let http = bind(Door::Http, listen.http)?;
        let grpc = bind(Door::Grpc, listen.grpc)?;
        let workers = bind(Door::Workers, listen.workers)?;
        let admin = bind(Door::Admin, listen.admin)?;
        let addresses = Addresses {
            http: http.local_addr()?,
            grpc: grpc.local_addr()?,
            workers: workers.local_addr()?,
            admin: admin.local_addr()?,
        };

        let state = RouterState::with_engines(
            config.corridor.limits(),
            Metrics::new(),
            Engines::new(config.engines.limits()),
        );
        let observe = &config.observe;
        let access_log = observe.access_log.as_deref();
        let access_log = access_log
            .map(|path| AccessLog::open(path, &state.tasks, &state.metrics))
            .transpose()?;
        let endpoint = observe.otlp_endpoint.as_deref();
        let exporter = endpoint
            .map(|endpoint| Exporter::new(endpoint, &state.tasks, &state.metrics))
            .transpose()?;
        let metrics = state.metrics.clone();
        state.observe_by(Observers::new(observe, metrics, access_log, exporter));
        state.set_settings(config.into());
        state.metrics.operation.settings_read_at(unix_seconds());
        let operations = Arc::new(operations);
        let gateway = Routes::new(gateway_service(Arc::clone(&state)));
        let served = [
            (http, HttpDoor::new(Arc::clone(&state), config).into_app()),
            (grpc, grpc::router(&state, config)?.into()),
            (workers, gateway.prepare().into_axum_router().into()),
            (
                admin,
                admin::router(Arc::clone(&state), Arc::clone(&operations), config).into(),
            ),
        ];
        for (listener, app) in served {
            state.tasks.spawn(listener.serve(app, Arc::clone(&state)));
        }
        use_engines(&state, config, from_file);
        Ok(Self {
            state,
            addresses,
            operations,
        })
    }

    /// What requests and workers share; engines are added and removed here.
    pub fn state(&self) -> &Arc<RouterState> {
        &self.state
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Reads the settings again, from the command line `args` that the process was started with.
    pub async fn reload(&self, args: Vec<OsString>) {
        self.operations.reload(&self.state, args).await;
    }

    /// Stops: refuses new requests, lets running ones finish within the drain timeout or until `hurry`, ends the
    /// rest with `shutting_down`. `/ready` says 503 meanwhile, so the listeners stay open to the end.
    pub async fn stop(self, hurry: impl Future<Output = ()>) {
        self.state.begin_drain();
        let drained = async {
            let drain_timeout = self.state.settings().listen.drain_timeout.0;
            if tokio::time::timeout(drain_timeout, self.state.drained())
                .await
                .is_err()
            {
                let seconds = drain_timeout.as_secs_f64();
                tracing::warn!(seconds, "drain timeout: ending the requests that still run");
            }
        };
        tokio::select! {
            () = drained => {}
            () = hurry => return self.state.tasks.shutdown_token().cancel(),
        }
        let _ = tokio::time::timeout(LAST_TASKS, self.state.shut_down()).await;
    }
}
