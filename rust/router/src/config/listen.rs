//! Where clients and workers connect, and what a connection may cost.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use super::{ByteSize, Span};

/// The listeners and what a connection may cost.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenConfig {
    /// OpenAI HTTP, health and metrics.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_HTTP")]
    #[arg(default_value_t = Self::default().http)]
    pub http: SocketAddr,
    /// gRPC `orchestra.v1.Inference`, health and reflection.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_GRPC")]
    #[arg(default_value_t = Self::default().grpc)]
    pub grpc: SocketAddr,
    /// Where workers attach. Whoever reaches it can serve models: keep it on an internal network.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_WORKERS")]
    #[arg(default_value_t = Self::default().workers)]
    pub workers: SocketAddr,
    /// HTTP for operators: workers, drains, settings. Whoever reaches it can stop the router's work.
    #[arg(long, value_name = "ADDRESS", env = "ORCHESTRA_ADMIN")]
    #[arg(default_value_t = Self::default().admin)]
    pub admin: SocketAddr,
    /// Open connections per listener; more wait in the kernel's queue.
    #[arg(long, value_name = "COUNT", env = "ORCHESTRA_MAX_CONNECTIONS")]
    #[arg(default_value_t = Self::default().max_connections)]
    pub max_connections: usize,
    /// The largest request body.
    #[arg(long, value_name = "SIZE", env = "ORCHESTRA_MAX_BODY_SIZE")]
    #[arg(default_value_t = Self::default().max_body_size)]
    pub max_body_size: ByteSize,
    /// How long a request's head may take to arrive, counted from the connection or from its first byte.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_HEADER_TIMEOUT")]
    #[arg(default_value_t = Self::default().header_timeout)]
    pub header_timeout: Span,
    /// How long a request's body may take to arrive.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_BODY_TIMEOUT")]
    #[arg(default_value_t = Self::default().body_timeout)]
    pub body_timeout: Span,
    /// How long an HTTP/1 connection may stay open between requests, and how long a client may read nothing of its
    /// answer; above the 60 s of common load balancers, so that it is they who close.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_IDLE_TIMEOUT")]
    #[arg(default_value_t = Self::default().idle_timeout)]
    pub idle_timeout: Span,
    /// Silence after which a stream of events gets a comment, so that proxies keep it open.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_SSE_KEEP_ALIVE")]
    #[arg(default_value_t = Self::default().sse_keep_alive)]
    pub sse_keep_alive: Span,
    /// How long running requests may go on after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", env = "ORCHESTRA_DRAIN_TIMEOUT")]
    #[arg(default_value_t = Self::default().drain_timeout)]
    pub drain_timeout: Span,
}

impl Default for ListenConfig {
    fn default() -> Self {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            http: local(8000),
            grpc: local(8001),
            workers: local(8002),
            admin: local(8003),
            max_connections: 16_384,
            max_body_size: ByteSize(16 << 20),
            header_timeout: Span(Duration::from_secs(30)),
            body_timeout: Span(Duration::from_secs(30)),
            idle_timeout: Span(Duration::from_secs(120)),
            sse_keep_alive: Span(Duration::from_secs(15)),
            drain_timeout: Span(Duration::from_secs(30)),
        }
    }
}

impl ListenConfig {
    /// The listeners by name.
    pub(super) fn doors(&self) -> [(&'static str, SocketAddr); 4] {
        [
            ("http", self.http),
            ("grpc", self.grpc),
            ("workers", self.workers),
            ("admin", self.admin),
        ]
    }
}
