//! A router with a worker listener, workers by hand, and requests.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use orchestra_core::{TokenId, step::FinishReason};
use orchestra_proto::v1::{
    self, router_message::Message as Down, worker_gateway_client::WorkerGatewayClient,
    worker_message::Message as Up,
};
use orchestra_router::{
    caller::Caller,
    corridor::{TokenStream, generate},
    error::ApiError,
    metrics::Metrics,
    observe::Record,
    request::{Chunk, GenerateInput, Prompt, SamplingPatch},
    state::{CorridorLimits, RouterState},
    workers::gateway_service,
};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
    time::{self, Instant},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Status, Streaming, transport::Server};

use crate::fixtures;

/// No step of a test takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The model that workers serve unless a test says otherwise.
pub(crate) const MODEL: &str = "tiny";

/// Limits under which workers by hand need send no heartbeats.
pub(crate) fn limits() -> CorridorLimits {
    CorridorLimits {
        heartbeat_timeout: Duration::from_secs(60),
        hang_timeout: Duration::from_secs(60),
        ..CorridorLimits::default()
    }
}

/// Waits for `future`, and fails the test where that takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let result = time::timeout(PATIENCE, future).await;
    result.unwrap_or_else(|_| panic!("no {what} within {PATIENCE:?}"))
}

/// Polls `condition` until it holds: for what the router does in its own time and shows only as state.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "{what} did not come about");
        time::sleep(Duration::from_millis(2)).await;
    }
}

/// A router that workers can attach to.
pub(crate) struct TestRouter {
    pub(crate) state: Arc<RouterState>,
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl TestRouter {
    pub(crate) async fn start(limits: CorridorLimits) -> Self {
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

    /// A router with one attached worker.
    pub(crate) async fn with_worker(limits: CorridorLimits) -> (Self, Worker) {
        let router = Self::start(limits).await;
        let worker = router.attach("w0").await;
        (router, worker)
    }

    /// Attaches a worker of the usual kind.
    pub(crate) async fn attach(&self, worker_id: &str) -> Worker {
        self.attach_as(hello(worker_id)).await
    }

    /// Attaches a worker, and returns once requests can be placed on it.
    pub(crate) async fn attach_as(&self, hello: v1::WorkerHello) -> Worker {
        let model = hello.model.clone();
        let workers_before = self.num_workers(&model);
        let replaces = self
            .state
            .metrics
            .encode()
            .unwrap()
            .contains(&format!("worker=\"{}\"", hello.worker_id));
        let mut worker = self.dial(hello, model_files()).await.unwrap();
        worker
            .report(v1::LoadReport {
                kv_blocks_total: 1,
                ..v1::LoadReport::default()
            })
            .await;
        if replaces {
            // The count need not change, so the model's presence has to do.
            eventually("the model", || self.num_workers(&model) > 0).await;
        } else {
            eventually("the worker", || self.num_workers(&model) > workers_before).await;
        }
        worker
    }

    /// Dials the gateway with any first message and any files.
    pub(crate) async fn dial(
        &self,
        hello: v1::WorkerHello,
        files: v1::ModelFiles,
    ) -> Result<Worker, Status> {
        let mut client = WorkerGatewayClient::connect(format!("http://{}", self.address))
            .await
            .unwrap();
        let (outgoing, messages) = mpsc::channel(1024);
        outgoing.send(up(Up::Hello(hello))).await.unwrap();
        let incoming = client
            .attach(ReceiverStream::new(messages))
            .await?
            .into_inner();
        let mut worker = Worker {
            outgoing,
            incoming,
            was_asked_for_files: false,
            kv_sequence: 0,
        };
        let Down::Welcome(welcome) = worker.next().await? else {
            panic!("no welcome")
        };
        worker.was_asked_for_files = welcome.wants_model_files;
        if welcome.wants_model_files {
            worker.send(Up::ModelFiles(files)).await;
        }
        Ok(worker)
    }

    /// Dials, and returns how the router refused, with its first answer or its second.
    pub(crate) async fn dial_refused(
        &self,
        hello: v1::WorkerHello,
        files: v1::ModelFiles,
    ) -> Status {
        match self.dial(hello, files).await {
            Ok(mut worker) => worker.closed().await,
            Err(status) => status,
        }
    }

    pub(crate) fn num_workers(&self, model: &str) -> u32 {
        let models = self.state.list_models();
        models
            .iter()
            .find(|info| info.id == model)
            .map_or(0, |info| info.num_workers)
    }

    pub(crate) async fn generate(&self, input: GenerateInput) -> Result<TokenStream, ApiError> {
        within("answer", generate(&self.state, input)).await
    }

    /// One figure of `GET /metrics`; the ones that tests look at are whole numbers.
    pub(crate) fn metric(&self, name: &str) -> Option<i64> {
        let text = self.state.metrics.encode().unwrap();
        let mut lines = text.lines();
        let figure = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(figure.parse::<f64>().unwrap() as i64)
    }
}

/// What a worker of the usual kind says first.
pub(crate) fn hello(worker_id: &str) -> v1::WorkerHello {
    v1::WorkerHello {
        worker_id: worker_id.to_owned(),
        model: MODEL.to_owned(),
        weights_epoch: 7,
        block_size: 16,
        num_blocks: 1000,
        max_num_seqs: 64,
        max_model_len: 4096,
        model_files_digest: "digest".to_owned(),
        eos_token_ids: vec![fixtures::END],
        block_hashes: Vec::new(),
        vocab_size: fixtures::VOCAB_SIZE,
        ..v1::WorkerHello::default()
    }
}

pub(crate) fn model_files() -> v1::ModelFiles {
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}>";
    v1::ModelFiles {
        tokenizer_json: fixtures::byte_level(fixtures::LLAMA3_WORDS),
        tokenizer_config_json: serde_json::json!({"chat_template": template})
            .to_string()
            .into_bytes(),
        generation_config_json: br#"{"temperature": 0.5, "top_k": 40, "top_p": 7.5}"#.to_vec(),
        chat_template: String::new(),
    }
}

fn up(message: Up) -> v1::WorkerMessage {
    v1::WorkerMessage {
        message: Some(message),
    }
}

/// A worker by hand. Dropping it breaks its stream.
pub(crate) struct Worker {
    outgoing: mpsc::Sender<v1::WorkerMessage>,
    incoming: Streaming<v1::RouterMessage>,
    pub(crate) was_asked_for_files: bool,
    kv_sequence: u64,
}

impl Worker {
    pub(crate) async fn send(&self, message: Up) {
        // The stream may be gone; then the test looks at how it ended.
        let _ = self.outgoing.send(up(message)).await;
    }

    pub(crate) async fn next(&mut self) -> Result<Down, Status> {
        let message = within("message to the worker", self.incoming.message()).await?;
        Ok(message
            .expect("the stream ended")
            .message
            .expect("an empty message"))
    }

    /// The next sequence that the worker is to start.
    pub(crate) async fn start(&mut self) -> v1::StartSequence {
        match self.next().await {
            Ok(Down::Start(start)) => start,
            other => panic!("a start was due, got {other:?}"),
        }
    }

    /// The next sequence that the worker is to end.
    pub(crate) async fn abort(&mut self) -> u64 {
        match self.next().await {
            Ok(Down::Abort(abort)) => abort.sequence_id,
            other => panic!("an abort was due, got {other:?}"),
        }
    }

    /// How the router closed the stream; what it sent before that is passed over.
    pub(crate) async fn closed(&mut self) -> Status {
        loop {
            match within("end of the stream", self.incoming.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a status"),
                Err(status) => return status,
            }
        }
    }

    pub(crate) async fn output(&self, output: v1::SequenceOutput) {
        self.send(Up::Tokens(v1::TokenBatch {
            outputs: vec![output],
        }))
        .await;
    }

    /// Tokens of a sequence from `first_index` on.
    pub(crate) async fn tokens(&self, sequence_id: u64, first_index: u32, token_ids: &[TokenId]) {
        self.output(tokens(sequence_id, first_index, token_ids))
            .await;
    }

    /// The last tokens of a sequence.
    pub(crate) async fn finish(
        &self,
        sequence_id: u64,
        first_index: u32,
        token_ids: &[TokenId],
        reason: v1::FinishReason,
    ) {
        let mut output = tokens(sequence_id, first_index, token_ids);
        output.set_finish_reason(reason);
        self.output(output).await;
    }

    /// Ends a sequence with an error.
    pub(crate) async fn fail(&self, sequence_id: u64, code: &str, message: &str) {
        let error = v1::SequenceError {
            code: code.to_owned(),
            message: message.to_owned(),
        };
        let mut output = tokens(sequence_id, 0, &[]);
        output.error = Some(error);
        output.set_finish_reason(v1::FinishReason::Error);
        self.output(output).await;
    }

    pub(crate) async fn report(&mut self, report: v1::LoadReport) {
        self.send(Up::Load(report)).await;
    }

    /// Says that it takes no more requests; returns once its router, which has no other, knows.
    pub(crate) async fn drain(&mut self, router: &TestRouter) {
        self.report(v1::LoadReport {
            is_draining: true,
            ..v1::LoadReport::default()
        })
        .await;
        eventually("the drain", || !router.state.is_ready()).await;
    }

    pub(crate) async fn kv_stored(&mut self, block_hashes: Vec<u64>) {
        self.kv_sequence += 1;
        let event = v1::kv_event::Event::Stored(v1::KvStored {
            block_hashes,
            ..v1::KvStored::default()
        });
        let events = vec![v1::KvEvent { event: Some(event) }];
        self.send(Up::KvEvents(v1::KvEvents {
            sequence: self.kv_sequence,
            events,
        }))
        .await;
    }

    /// Pretends that KV events were lost on the way.
    pub(crate) fn skip_kv_events(&mut self, count: u64) {
        self.kv_sequence += count;
    }
}

pub(crate) fn tokens(
    sequence_id: u64,
    first_index: u32,
    token_ids: &[TokenId],
) -> v1::SequenceOutput {
    v1::SequenceOutput {
        sequence_id,
        first_index,
        token_ids: token_ids.to_vec(),
        ..v1::SequenceOutput::default()
    }
}

/// A request for a text prompt.
pub(crate) fn text(prompt: &str) -> GenerateInput {
    input(Prompt::Text(prompt.to_owned()))
}

/// A request for any prompt, greedy and with a seed.
pub(crate) fn input(prompt: Prompt) -> GenerateInput {
    GenerateInput {
        model: MODEL.to_owned(),
        prompt,
        sampling: SamplingPatch {
            max_tokens: Some(100),
            seed: Some(42),
            ..SamplingPatch::default()
        },
        stop: Vec::new(),
        n: 1,
        timeout: None,
        cache_salt: String::new(),
        caller: Caller::default(),
        record: Record::default(),
    }
}

/// The next chunk.
pub(crate) async fn next(stream: &mut TokenStream) -> Result<Chunk, ApiError> {
    within("chunk", stream.next())
        .await
        .expect("the stream ended")
}

/// What one choice came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<TokenId>,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) stop_string: Option<String>,
    pub(crate) cached_tokens: u32,
    pub(crate) completion_tokens: u32,
}

/// Reads a stream to its end; asserts that each choice ends once.
pub(crate) async fn collect(mut stream: TokenStream, n: usize) -> Result<Vec<Answer>, ApiError> {
    let mut answers = vec![Answer::default(); n];
    while let Some(chunk) = within("chunk", stream.next()).await {
        let chunk = chunk?;
        let answer = &mut answers[chunk.index as usize];
        assert_eq!(answer.finish, None, "a chunk after the end");
        answer.text.push_str(&chunk.text);
        answer.token_ids.extend(chunk.token_ids);
        if let Some(finish) = chunk.finish {
            answer.finish = Some(finish.reason);
            answer.stop_string = finish.stop_string;
            answer.cached_tokens = finish.cached_tokens;
            answer.completion_tokens = finish.completion_tokens;
        }
    }
    assert!(
        answers.iter().all(|answer| answer.finish.is_some()),
        "a choice without an end"
    );
    Ok(answers)
}

/// Token ids of ASCII text, a byte each.
pub(crate) fn bytes(text: &str) -> Vec<TokenId> {
    text.bytes().map(TokenId::from).collect()
}
