//! The router's end of the stream, driven by the test.

use std::net::SocketAddr;

use orchestra_proto::v1::{
    RouterMessage, Welcome, WorkerHello, WorkerMessage,
    router_message::Message as Down,
    worker_gateway_server::{WorkerGateway, WorkerGatewayServer},
    worker_message::Message as Up,
};
use tokio::{
    runtime::{Handle, Runtime},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    transport::{Server, server::TcpIncoming},
};

use super::PATIENCE;

/// Bytes that a session takes in without reading. This is where every HTTP/2 stream begins: a smaller one would be
/// announced to a worker that may have sent more than that by then.
const WINDOW_BYTES: u32 = 65_535;

/// A router that accepts attachments and leaves the rest to the test.
pub(crate) struct FakeRouter {
    runtime: Runtime,
    pub(crate) address: SocketAddr,
    sessions: mpsc::Receiver<Session>,
}

/// One attachment, at its router.
pub(crate) struct Session {
    runtime: Handle,
    up: Streaming<WorkerMessage>,
    down: mpsc::Sender<Result<RouterMessage, Status>>,
}

impl FakeRouter {
    /// A router on any free port.
    pub(crate) fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap())
    }

    /// A router at `address`.
    pub(crate) fn start_at(address: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (sender, sessions) = mpsc::channel(8);
        let guard = runtime.enter();
        let incoming = TcpIncoming::bind(address).unwrap().with_nodelay(Some(true));
        let address = incoming.local_addr().unwrap();
        let gateway = Gateway {
            runtime: runtime.handle().clone(),
            sessions: sender,
        };
        let server = Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .add_service(WorkerGatewayServer::new(gateway))
            .serve_with_incoming(incoming);
        runtime.spawn(server);
        drop(guard);
        Self {
            runtime,
            address,
            sessions,
        }
    }

    /// The next attachment.
    pub(crate) fn accept(&mut self) -> Session {
        let Self {
            runtime, sessions, ..
        } = self;
        let session = runtime.block_on(async { timeout(PATIENCE, sessions.recv()).await });
        session.expect("a worker attaches").unwrap()
    }

    /// The next attachment, welcomed; with its hello.
    pub(crate) fn welcome(&mut self) -> (Session, WorkerHello) {
        let mut session = self.accept();
        let hello = session.hello();
        session.send(Down::Welcome(Welcome {
            wants_model_files: false,
        }));
        (session, hello)
    }

    /// Dies: every connection breaks, the port is free afterwards.
    pub(crate) fn die(self) -> SocketAddr {
        self.runtime.shutdown_timeout(PATIENCE);
        self.address
    }
}

impl Session {
    /// The next message; `None` when the worker has ended the stream.
    pub(crate) fn next(&mut self) -> Option<Up> {
        let Self { runtime, up, .. } = self;
        let message = runtime.block_on(async { timeout(PATIENCE, up.message()).await });
        let message = message.expect("the worker sends something").unwrap()?;
        Some(message.message.expect("a message has a content"))
    }

    /// The next message, however long it takes; `None` when the stream is over in any way.
    pub(crate) fn try_next(&mut self) -> Option<Up> {
        let Self { runtime, up, .. } = self;
        runtime.block_on(up.message()).ok()??.message
    }

    /// The first message that `pick` takes.
    pub(crate) fn wait_for<T>(&mut self, pick: impl Fn(Up) -> Option<T>) -> T {
        loop {
            let message = self.next().expect("the stream goes on");
            if let Some(found) = pick(message) {
                return found;
            }
        }
    }

    /// The next message, which is the hello.
    pub(crate) fn hello(&mut self) -> WorkerHello {
        match self.next() {
            Some(Up::Hello(hello)) => hello,
            other => panic!("the first message was {other:?}"),
        }
    }

    /// Sends a message to the worker.
    pub(crate) fn send(&mut self, message: Down) {
        self.sender().send(message);
    }

    /// The sending half, for another thread.
    pub(crate) fn sender(&self) -> SessionSender {
        SessionSender(self.down.clone())
    }
}

/// Where messages to the worker go in.
pub(crate) struct SessionSender(mpsc::Sender<Result<RouterMessage, Status>>);

impl SessionSender {
    pub(crate) fn send(&self, message: Down) {
        let message = RouterMessage {
            message: Some(message),
        };
        self.0.blocking_send(Ok(message)).unwrap();
    }

    /// [`send`](Self::send) to a worker that may have gone.
    pub(crate) fn try_send(&self, message: Down) {
        let message = RouterMessage {
            message: Some(message),
        };
        let _ = self.0.blocking_send(Ok(message));
    }
}

struct Gateway {
    runtime: Handle,
    sessions: mpsc::Sender<Session>,
}

#[async_trait]
impl WorkerGateway for Gateway {
    type AttachStream = ReceiverStream<Result<RouterMessage, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (down, receiver) = mpsc::channel(64);
        let session = Session {
            runtime: self.runtime.clone(),
            up: request.into_inner(),
            down,
        };
        self.sessions.send(session).await.unwrap();
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
