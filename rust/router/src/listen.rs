//! The listeners: one accept loop for all, so that every door has the same limits on what a connection may cost.
//!
//! * `TCP_NODELAY` on every accepted socket: with Nagle on, a client's first token waits for its delayed ACK, 40 ms.
//! * Connections are bounded; the ones above wait in the kernel's queue, which is bounded too.
//! * A head that does not arrive in time closes its connection ([`HeadClock`]), idle ones close later, and a
//!   silent HTTP/2 peer is found by pings.

mod head;
mod unread;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use hyper::{body::Incoming, rt::Executor, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
};

use self::{
    head::{AnswerBody, HeadClock, HeadWatched},
    unread::Unread,
};
use crate::{config::ListenConfig, http::App, state::RouterState, tasks::Tasks};

/// Connections that the kernel holds for us before it refuses more.
const BACKLOG: u32 = 4096;
/// The largest head of a request; a larger one is answered 431.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Requests at once on one HTTP/2 connection.
const HTTP2_STREAMS_MAX: u32 = 4096;
/// What an HTTP/2 peer may send before we have read it: per request, and per connection.
const HTTP2_WINDOW_BYTES: (u32, u32) = (1 << 20, 8 << 20);
/// HTTP/2 pings: a peer that is silent for the sum of the two is gone.
const HTTP2_PING: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// How long an accept loop rests when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection may take to write its last words once shutdown has begun.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Which listener: a label and a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// OpenAI HTTP, health and metrics: HTTP/1 and HTTP/2.
    Http,
    /// gRPC for clients: HTTP/2.
    Grpc,
    /// gRPC for workers: HTTP/2.
    Workers,
    /// HTTP for operators: HTTP/1 and HTTP/2.
    Admin,
}

impl Door {
    /// The door as flags and metrics spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::Workers => "workers",
            Self::Admin => "admin",
        }
    }
}

/// A bound listener.
#[derive(Debug)]
pub(crate) struct Listener {
    door: Door,
    tcp: TcpListener,
}

impl Listener {
    /// Binds `address`; port 0 takes a free one.
    pub(crate) fn bind(door: Door, address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        // A restart need not wait for the old process's connections to time out.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(Self {
            door,
            tcp: socket.listen(BACKLOG)?,
        })
    }

    /// The address with its real port.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Accepts until shutdown and serves each connection in a task of its own.
    pub(crate) async fn serve(self, app: App, state: Arc<RouterState>) {
        let slots = Arc::new(Semaphore::new(state.settings().listen.max_connections));
        let shutdown = state.tasks.shutdown_token().clone();
        let server = Arc::new(Server {
            door: self.door,
            app,
            state,
        });
        let accepting = async {
            loop {
                // Never fails: the semaphore is not closed. A connection holds its slot to its end.
                let slot = Arc::clone(&slots).acquire_owned().await;
                let stream = self.accept().await;
                let counted = server.state.metrics.connection(self.door.as_str());
                let connection = Arc::clone(&server).connection(stream);
                server.state.tasks.spawn(async move {
                    connection.await;
                    drop((slot, counted));
                });
            }
        };
        let _: Option<()> = shutdown.run_until_cancelled(accepting).await;
    }

    /// The next connection. Errors of one connection (it was reset before we came) are skipped.
    async fn accept(&self) -> TcpStream {
        loop {
            match self.tcp.accept().await.and_then(|(stream, _peer)| {
                stream.set_nodelay(true)?;
                Ok(stream)
            }) {
                Ok(stream) => return stream,
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    let door = self.door.as_str();
                    tracing::warn!(door, %error, "cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, InvalidInput};
    // Setting an option on a socket that was reset meanwhile gives EINVAL.
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | InvalidInput
    )
}

/// What the connections of one listener share.
struct Server {
    door: Door,
    app: App,
    state: Arc<RouterState>,
}

impl Server {
    /// Serves one connection until it ends, breaks a limit, or shutdown has given it its last words.
    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let clock = HeadClock::new();
        let io = TokioIo::new(HeadWatched::new(stream, Arc::clone(&clock)));
        let service = service_fn(|request: hyper::Request<Incoming>| {
            let answering = clock.head_arrived(request.version());
            let server = Arc::clone(&self);
            async move {
                let (request, unread) = Unread::watch(request);
                let mut response = server.app.answer(request).await;
                unread.tell(response.headers_mut());
                Ok::<_, Infallible>(response.map(|body| AnswerBody::new(body, answering)))
            }
        });
        let settings = self.state.settings();
        let builder = self.builder(&settings.listen);
        let mut connection = pin!(builder.serve_connection(io, service));
        let shutdown = self.state.tasks.shutdown_token();
        tokio::select! {
            // How a connection ends is the peer's affair: nothing is logged.
            _ = connection.as_mut() => return,
            () = clock.expired(settings.listen.header_timeout.0, settings.listen.idle_timeout.0) => return,
            () = shutdown.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(LAST_WORDS, connection).await;
    }

    fn builder(&self, limits: &ListenConfig) -> Builder<TaskExecutor> {
        let mut builder = Builder::new(TaskExecutor(self.state.tasks.clone()));
        if matches!(self.door, Door::Grpc | Door::Workers) {
            builder = builder.http2_only();
        }
        builder
            .http1()
            .timer(TokioTimer::new())
            // hyper counts the idle time as part of the next head; the head proper is timed by the clock.
            .header_read_timeout(limits.idle_timeout.0)
            .max_buf_size(HEAD_BYTES_MAX);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(HTTP2_PING.0)
            .keep_alive_timeout(HTTP2_PING.1)
            .max_concurrent_streams(HTTP2_STREAMS_MAX)
            .initial_stream_window_size(HTTP2_WINDOW_BYTES.0)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES.1)
            .max_header_list_size(HEAD_BYTES_MAX as u32);
        builder
    }
}

/// Runs hyper's HTTP/2 streams among the router's own tasks, so that they are joined too.
#[derive(Clone)]
struct TaskExecutor(Tasks);

impl<F> Executor<F> for TaskExecutor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let future: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async {
            future.await;
        });
        self.0.spawn(future);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_accepted_socket_sends_at_once() {
        for door in [Door::Http, Door::Grpc, Door::Workers, Door::Admin] {
            let listener = Listener::bind(door, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
            let address = listener.local_addr().unwrap();
            let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            assert!(
                !client.unwrap().nodelay().unwrap(),
                "the kernel's default is Nagle"
            );
            assert!(accepted.nodelay().unwrap());
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let first = Listener::bind(Door::Http, any).unwrap();
        let again = Listener::bind(Door::Grpc, first.local_addr().unwrap());
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
