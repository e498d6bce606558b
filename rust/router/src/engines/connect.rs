//! How a connection to an engine comes about. A trait, so that a simulated network can stand in for TCP.

use std::{io, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use super::url::EngineUrl;

/// A connection as bytes.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Socket for T {}

/// Opens connections to engines.
pub trait Connect: Send + Sync + 'static {
    /// Opens one. The caller bounds the time.
    fn connect(&self, url: &EngineUrl) -> BoxFuture<'static, io::Result<Box<dyn Socket>>>;
}

/// Plain TCP.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Connect for Tcp {
    fn connect(&self, url: &EngineUrl) -> BoxFuture<'static, io::Result<Box<dyn Socket>>> {
        let (host, port) = (url.host().to_owned(), url.port());
        Box::pin(async move {
            let stream = TcpStream::connect((host, port)).await?;
            // With Nagle on, the end of a request would wait for the engine's delayed ACK.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Socket>)
        })
    }
}

/// The network that a router uses.
pub(crate) type Network = Arc<dyn Connect>;
