//! A whole router, and a worker by hand.

use std::{net::SocketAddr, time::Duration};

use orchestra_proto::v1::{
    self, router_message::Message as Down, worker_gateway_client::WorkerGatewayClient,
    worker_message::Message as Up,
};
use orchestra_router::{Addresses, Router, RouterConfig};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::fixtures;
pub(crate) use crate::http_client::{Answer, Client, ask, get, head, post};

/// No step of a test takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// The model that the worker serves.
pub(crate) const MODEL: &str = "org/tiny";

/// Waits for `future`, and fails the test where that takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(time::error::Elapsed { .. }) => panic!("no {what} within {PATIENCE:?}"),
    }
}

/// Free ports, and workers by hand that need send no heartbeats.
pub(crate) fn config() -> RouterConfig {
    let mut config = RouterConfig::default();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    (
        config.listen.http,
        config.listen.grpc,
        config.listen.workers,
        config.listen.admin,
    ) = (any, any, any, any);
    config.corridor.heartbeat_timeout.0 = Duration::from_secs(60);
    config.corridor.hang_timeout.0 = Duration::from_secs(60);
    config.corridor.replay_wait.0 = Duration::ZERO;
    config
}

/// A started router and where it listens.
pub(crate) fn start(config: &RouterConfig) -> (Router, Addresses) {
    let router = Router::start(config).unwrap();
    let addresses = router.addresses();
    (router, addresses)
}

/// A router with a worker that takes requests.
pub(crate) async fn start_with_worker(config: &RouterConfig) -> (Router, Addresses, Worker) {
    let (router, addresses) = start(config);
    let worker = Worker::attach(addresses).await;
    (router, addresses, worker)
}

impl Answer {
    /// `error.code` and `error.param`.
    pub(crate) fn error(&self) -> (String, Option<String>) {
        let error = &self.json()["error"];
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        assert!(
            text("message").is_some_and(|message| !message.is_empty()),
            "{self:?}"
        );
        (text("code").unwrap(), text("param"))
    }
}

/// Asks until the status is this one.
pub(crate) async fn eventually(address: SocketAddr, path: &str, status: u16) {
    let began = Instant::now();
    while get(address, path).await.status != status {
        assert!(began.elapsed() < PATIENCE, "{path} did not become {status}");
        time::sleep(Duration::from_millis(5)).await;
    }
}

/// A worker by hand. Dropping it breaks its stream.
pub(crate) struct Worker {
    outgoing: mpsc::Sender<v1::WorkerMessage>,
    incoming: Streaming<v1::RouterMessage>,
}

impl Worker {
    /// A worker that takes requests.
    pub(crate) async fn attach(addresses: Addresses) -> Self {
        let worker = Self::attach_unready(addresses).await;
        worker.report(false).await;
        eventually(addresses.http, "/ready", 200).await;
        worker
    }

    /// A worker that has not reported yet.
    pub(crate) async fn attach_unready(addresses: Addresses) -> Self {
        let endpoint = format!("http://{}", addresses.workers);
        let mut client = WorkerGatewayClient::connect(endpoint).await.unwrap();
        let (outgoing, messages) = mpsc::channel(64);
        let mut worker = {
            let hello = v1::WorkerHello {
                worker_id: "w0".to_owned(),
                model: MODEL.to_owned(),
                weights_epoch: 1,
                block_size: 16,
                num_blocks: 1000,
                max_num_seqs: 64,
                max_model_len: 4096,
                model_files_digest: "digest".to_owned(),
                eos_token_ids: vec![fixtures::END],
                block_hashes: Vec::new(),
                vocab_size: fixtures::VOCAB_SIZE,
                ..v1::WorkerHello::default()
            };
            let message = Some(Up::Hello(hello));
            outgoing.send(v1::WorkerMessage { message }).await.unwrap();
            let incoming = client.attach(ReceiverStream::new(messages)).await.unwrap();
            Self {
                outgoing,
                incoming: incoming.into_inner(),
            }
        };
        let Down::Welcome(welcome) = worker.next().await else {
            panic!("no welcome")
        };
        if !welcome.wants_model_files {
            return worker;
        }
        let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
        worker
            .send(Up::ModelFiles(v1::ModelFiles {
                tokenizer_json: fixtures::byte_level(fixtures::LLAMA3_WORDS),
                chat_template: template.to_owned(),
                ..v1::ModelFiles::default()
            }))
            .await;
        worker
    }

    /// Says how it stands.
    pub(crate) async fn report(&self, is_draining: bool) {
        self.send(Up::Load(v1::LoadReport {
            kv_blocks_total: 1000,
            is_draining,
            ..Default::default()
        }))
        .await;
    }

    /// Waits for the end of the stream; sequences that are ended meanwhile are skipped.
    pub(crate) async fn told_to_go(&mut self) {
        let going = async { while let Ok(Some(_)) = self.incoming.message().await {} };
        within("end of the worker's stream", going).await;
    }

    async fn send(&self, message: Up) {
        self.outgoing
            .send(v1::WorkerMessage {
                message: Some(message),
            })
            .await
            .unwrap();
    }

    async fn next(&mut self) -> Down {
        let message = within("message to the worker", self.incoming.message())
            .await
            .unwrap();
        message
            .expect("the stream ended")
            .message
            .expect("an empty message")
    }

    /// The next sequence that the worker is to start.
    pub(crate) async fn start(&mut self) -> v1::StartSequence {
        match self.next().await {
            Down::Start(start) => start,
            other => panic!("a start was due, got {other:?}"),
        }
    }

    /// The next sequence that the worker is to end.
    pub(crate) async fn abort(&mut self) -> u64 {
        match self.next().await {
            Down::Abort(abort) => abort.sequence_id,
            other => panic!("an abort was due, got {other:?}"),
        }
    }

    /// Produces ASCII text, a token per byte, from `first_index` on.
    pub(crate) async fn write(&self, sequence_id: u64, first_index: u32, text: &str) {
        self.produce(
            sequence_id,
            first_index,
            text,
            v1::FinishReason::Unspecified,
        )
        .await;
    }

    /// Produces the last text.
    pub(crate) async fn finish(&self, sequence_id: u64, first_index: u32, text: &str) {
        self.produce(sequence_id, first_index, text, v1::FinishReason::Length)
            .await;
    }

    async fn produce(&self, sequence_id: u64, index: u32, text: &str, reason: v1::FinishReason) {
        let token_ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let logprob = |&token_id: &u32| {
            let entry = v1::TokenLogprob {
                token_id,
                logprob: -0.5,
            };
            v1::TokenLogprobs {
                chosen: Some(entry),
                top: vec![entry],
            }
        };
        let output = v1::SequenceOutput {
            sequence_id,
            first_index: index,
            logprobs: token_ids.iter().map(logprob).collect(),
            token_ids,
            finish_reason: reason.into(),
            ..v1::SequenceOutput::default()
        };
        self.send(Up::Tokens(v1::TokenBatch {
            outputs: vec![output],
        }))
        .await;
    }
}
