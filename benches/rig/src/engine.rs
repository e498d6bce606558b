//! The mock engine: speaks as an OpenAI-compatible engine does, computes nothing, and fails on demand.
//!
//! | route | answer |
//! |---|---|
//! | `POST /v1/chat/completions`, `POST /v1/completions` | words of [`crate::words`] ([`answer`]) |
//! | `GET /v1/models`, `/health`, `/version` and the like | as the engine of its [`Kind`] has them ([`facts`]) |
//! | `POST /tokenize`, `POST /detokenize` | the tokeniser that can be undone, for the kinds that have one |
//! | `GET`, `POST`, `DELETE /_control` | counters; arms a fault; disarms all ([`control`]) |
//! | `GET /_control/last` | the last generation request as it came: head, blank line, body |

pub mod answer;
mod connection;
pub mod control;
mod facts;
mod prefix_cache;
mod render;
mod request;
mod stream;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::{net::TcpListener, task::JoinSet};

use self::{control::Control, prefix_cache::PrefixCache};
use crate::http1::Connection;

/// Connections that the kernel holds for one listener.
const BACKLOG: u32 = 4096;
/// How long an accept loop rests when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Whose habits the mock has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// `continue_final_message`, token-id prompts, `return_token_ids`; unknown models are 404.
    Vllm,
    /// As vLLM, but it asks for no model and has other facts about itself.
    Sglang,
    /// Continues a trailing assistant message without being asked to.
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// Nothing beyond OpenAI's own fields: text prompts alone can be continued.
    Plain,
}

/// What the engines of one process share.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Whose habits they have.
    pub kind: Kind,
    /// The model that they say they serve.
    pub model: String,
    /// The most tokens of prompt and answer together.
    pub max_model_len: u32,
    /// Words of an answer that is not cut short by `max_tokens` or a stop string.
    pub words: u32,
    /// Words in one event: engines put several into one where the reader is slower than they are.
    pub words_per_event: usize,
    /// Time to the first word.
    pub ttft: Duration,
    /// Time from one event to the next; zero is back to back.
    pub itl: Duration,
    /// Generation requests at once; `busy_status` above.
    pub max_concurrency: usize,
    /// 503 or 429.
    pub busy_status: u16,
    /// Blocks of 16 tokens that the simulated prefix cache remembers; 0 is off.
    pub prefix_cache_blocks: usize,
}

/// One engine: a listener's own faults, counters and prefix cache.
pub struct Engine {
    config: Arc<EngineConfig>,
    control: Control,
    cache: Mutex<PrefixCache>,
    created: u64,
    /// In every event, so that a reader can tell who said it.
    fingerprint: String,
}

impl Engine {
    /// An engine without faults, known to readers by its port.
    pub fn new(config: Arc<EngineConfig>, port: u16) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            control: Control::default(),
            cache: Mutex::new(PrefixCache::new(config.prefix_cache_blocks)),
            created: since_epoch.map_or(0, |time| time.as_secs()),
            config,
            fingerprint: format!("mock-{port}"),
        }
    }

    /// What tests and people do to it.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Serves connections for ever. Each has a task of its own, which ends with its connection.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            match listener
                .accept()
                .await
                .and_then(|(stream, _peer)| Connection::new(stream))
            {
                Ok(connection) => {
                    connections.spawn(Arc::clone(&self).connection(connection));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
            while connections.try_join_next().is_some() {}
        }
    }
}

/// Binds a port of an address; 0 takes a free one.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        tokio::net::TcpSocket::new_v4()
    } else {
        tokio::net::TcpSocket::new_v6()
    }?;
    // An engine that was killed comes back on its port at once.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
