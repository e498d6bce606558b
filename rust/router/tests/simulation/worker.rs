//! A worker's host: speaks the real protocol, computes nothing, and misbehaves when it is told to.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use orchestra_proto::v1::{
    self, router_message::Message as Down, worker_gateway_client::WorkerGatewayClient,
    worker_message::Message as Up,
};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};
use tower::service_fn;
use turmoil::net::TcpStream;

use crate::{
    faults::Orders,
    fixtures,
    router::{ROUTER, WORKERS_PORT},
    trace::{Trace, token},
};

/// The model that all workers serve.
pub(crate) const MODEL: &str = "tiny";
const STEP: Duration = Duration::from_millis(5);
const REPORT_EVERY: Duration = Duration::from_millis(100);
const REDIAL_AFTER: Duration = Duration::from_millis(20);

/// How a worker misbehaves once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misdeed {
    /// Tokens under the wrong index.
    WrongIndex,
    /// A token that the model does not have.
    UnknownToken,
    /// KV events with a hole in their numbers.
    KvGap,
    /// Every running sequence fails.
    Fail,
    /// Every running sequence is refused for now.
    Refuse,
    /// It reports and makes no step until it is dropped.
    Stuck,
    /// It says nothing until it is dropped.
    Silent,
    /// It announces that it leaves, and leaves in the middle of what runs.
    Leave,
}

/// Attaches, works, and attaches again whenever that ends.
pub(crate) async fn run(name: String, orders: Orders<Misdeed>, trace: Trace) -> turmoil::Result {
    loop {
        if let Some(mut worker) = Worker::attach(&name).await {
            trace.note("attached", name.len() as u64);
            // An order that came too late for an earlier life would end this one at its first step.
            orders.take_if(|_| true);
            worker.work(&orders).await;
        }
        time::sleep(REDIAL_AFTER).await;
    }
}

struct Sequence {
    id: u64,
    seed: u64,
    index: u32,
    max_tokens: u32,
}

struct Worker {
    outgoing: mpsc::Sender<v1::WorkerMessage>,
    incoming: Streaming<v1::RouterMessage>,
    running: Vec<Sequence>,
    steps: u64,
    is_draining: bool,
}

impl Worker {
    /// `None` where the router could not be reached or broke off.
    async fn attach(name: &str) -> Option<Self> {
        let connect = service_fn(|_| async {
            let stream = TcpStream::connect((ROUTER, WORKERS_PORT)).await;
            stream.map(TokioIo::new)
        });
        let channel = Endpoint::from_static("http://router")
            .http2_keep_alive_interval(Duration::from_millis(400))
            .keep_alive_timeout(Duration::from_millis(400))
            .keep_alive_while_idle(true)
            .connect_with_connector(connect)
            .await
            .ok()?;
        let (outgoing, messages) = mpsc::channel(4096);
        outgoing.send(up(Up::Hello(hello(name)))).await.ok()?;
        let mut client = WorkerGatewayClient::new(channel);
        let attached = client.attach(ReceiverStream::new(messages)).await;
        let mut incoming = attached.ok()?.into_inner();
        let welcome = incoming.message().await.ok()??.message?;
        if matches!(welcome, Down::Welcome(welcome) if welcome.wants_model_files) {
            outgoing
                .send(up(Up::ModelFiles(model_files())))
                .await
                .ok()?;
        }
        Some(Self {
            outgoing,
            incoming,
            running: Vec::new(),
            steps: 0,
            is_draining: false,
        })
    }

    /// Works until the stream ends or an order ends it.
    async fn work(&mut self, orders: &Orders<Misdeed>) {
        let mut step_at = Instant::now() + STEP;
        let mut report_at = Instant::now();
        loop {
            tokio::select! {
                biased;
                message = self.incoming.message() => match message {
                    Ok(Some(message)) => self.take(message),
                    Ok(None) | Err(_) => return,
                },
                () = time::sleep_until(report_at) => {
                    report_at += REPORT_EVERY;
                    self.report().await;
                }
                () = time::sleep_until(step_at) => {
                    step_at += STEP;
                    match orders.take_if(|_| true) {
                        None => self.step().await,
                        Some(misdeed) => if self.misbehave(misdeed).await.is_none() { return },
                    }
                }
            }
        }
    }

    fn take(&mut self, message: v1::RouterMessage) {
        match message.message {
            Some(Down::Start(start)) => {
                let sampling = start.sampling.unwrap();
                self.running.push(Sequence {
                    id: start.sequence_id,
                    seed: sampling.seed(),
                    index: start.output_token_ids.len() as u32,
                    max_tokens: sampling.max_tokens(),
                });
            }
            Some(Down::Abort(abort)) => self.running.retain(|it| it.id != abort.sequence_id),
            Some(Down::Welcome(_) | Down::FromPeer(_) | Down::Keeper(_)) | None => {}
        }
    }

    async fn report(&self) {
        let report = v1::LoadReport {
            num_running: self.running.len() as u32,
            kv_blocks_total: 1000,
            steps: self.steps,
            is_draining: self.is_draining,
            ..v1::LoadReport::default()
        };
        self.send(Up::Load(report)).await;
    }

    /// One to three tokens for each sequence.
    async fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        self.steps += 1;
        let mut outputs = Vec::new();
        for sequence in &mut self.running {
            let count = 1 + (self.steps % 3) as u32;
            let end = (sequence.index + count).min(sequence.max_tokens);
            let mut output = v1::SequenceOutput {
                sequence_id: sequence.id,
                first_index: sequence.index,
                token_ids: (sequence.index..end)
                    .map(|index| token(sequence.seed, index))
                    .collect(),
                ..v1::SequenceOutput::default()
            };
            sequence.index = end;
            if end == sequence.max_tokens {
                output.set_finish_reason(v1::FinishReason::Length);
            }
            outputs.push(output);
        }
        self.running.retain(|it| it.index < it.max_tokens);
        self.send(Up::Tokens(v1::TokenBatch { outputs })).await;
    }

    /// Does one wrong thing; `None` where the worker leaves with it.
    async fn misbehave(&mut self, misdeed: Misdeed) -> Option<()> {
        match misdeed {
            Misdeed::WrongIndex => self.spoil(|output| output.first_index += 1).await,
            Misdeed::UnknownToken => {
                let unknown = |output: &mut v1::SequenceOutput| {
                    output.token_ids = vec![fixtures::VOCAB_SIZE];
                };
                self.spoil(unknown).await;
            }
            Misdeed::KvGap => {
                let events = Vec::new();
                let gap = v1::KvEvents {
                    sequence: u64::MAX,
                    events,
                };
                self.send(Up::KvEvents(gap)).await;
            }
            Misdeed::Fail => self.fail("worker_failed").await,
            Misdeed::Refuse => self.fail("queue_full").await,
            Misdeed::Stuck => loop {
                self.report().await;
                if !self.still_attached().await {
                    return None;
                }
            },
            Misdeed::Silent => while self.still_attached().await {},
            Misdeed::Leave => {
                self.is_draining = true;
                self.report().await;
                time::sleep(STEP).await;
                return None;
            }
        }
        Some(())
    }

    /// The next token of each running sequence, changed.
    async fn spoil(&mut self, change: fn(&mut v1::SequenceOutput)) {
        let spoiled = self.running.iter().map(|sequence| {
            let mut output = v1::SequenceOutput {
                sequence_id: sequence.id,
                first_index: sequence.index,
                token_ids: vec![token(sequence.seed, sequence.index)],
                ..v1::SequenceOutput::default()
            };
            change(&mut output);
            output
        });
        let outputs = spoiled.collect();
        self.send(Up::Tokens(v1::TokenBatch { outputs })).await;
    }

    async fn fail(&mut self, code: &str) {
        let failed = self.running.drain(..).map(|sequence| {
            let error = v1::SequenceError {
                code: code.to_owned(),
                message: "as told".to_owned(),
            };
            let mut output = v1::SequenceOutput {
                sequence_id: sequence.id,
                error: Some(error),
                ..v1::SequenceOutput::default()
            };
            output.set_finish_reason(v1::FinishReason::Error);
            output
        });
        let outputs = failed.collect();
        self.send(Up::Tokens(v1::TokenBatch { outputs })).await;
    }

    /// Waits a while for the router to break off.
    async fn still_attached(&mut self) -> bool {
        match time::timeout(REPORT_EVERY, self.incoming.message()).await {
            Ok(Ok(Some(message))) => self.take(message),
            Ok(Ok(None) | Err(_)) => return false,
            Err(_) => {}
        }
        true
    }

    async fn send(&self, message: Up) {
        // Where the stream is gone, the next read says so.
        let _ = self.outgoing.send(up(message)).await;
    }
}

fn up(message: Up) -> v1::WorkerMessage {
    v1::WorkerMessage {
        message: Some(message),
    }
}

fn hello(name: &str) -> v1::WorkerHello {
    v1::WorkerHello {
        worker_id: name.to_owned(),
        model: MODEL.to_owned(),
        weights_epoch: 1,
        block_size: 16,
        num_blocks: 1000,
        // Fewer places than clients, so that batch requests have to give way.
        max_num_seqs: 2,
        max_model_len: 4096,
        model_files_digest: "digest".to_owned(),
        eos_token_ids: vec![fixtures::END],
        block_hashes: Vec::new(),
        vocab_size: fixtures::VOCAB_SIZE,
        ..v1::WorkerHello::default()
    }
}

fn model_files() -> v1::ModelFiles {
    v1::ModelFiles {
        tokenizer_json: fixtures::byte_level(fixtures::LLAMA3_WORDS),
        ..v1::ModelFiles::default()
    }
}
