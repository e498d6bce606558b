//! HTTP/1.1 without a library: what goes over the wire is what the test says.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::within;

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }
}

/// The head of a request that ends its connection.
pub(crate) fn head(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n")
}

/// A JSON request that ends its connection.
pub(crate) fn post(path: &str, body: &str) -> String {
    let headers = format!(
        "content-type: application/json\r\ncontent-length: {}\r\n",
        body.len()
    );
    head("POST", path, &headers) + body
}

/// A socket to the router's HTTP door.
pub(crate) struct Client {
    pub(crate) socket: TcpStream,
    /// Read and not yet looked at.
    received: Vec<u8>,
}

impl Client {
    /// Connects and sends these bytes.
    pub(crate) async fn send(address: SocketAddr, request: impl AsRef<[u8]>) -> Self {
        let mut socket = TcpStream::connect(address).await.unwrap();
        // The router may answer and close before it has everything.
        let _ = socket.write_all(request.as_ref()).await;
        Self {
            socket,
            received: Vec::new(),
        }
    }

    /// Reads to the end of the connection.
    pub(crate) async fn rest(mut self) -> String {
        let reading = async { while self.read().await > 0 {} };
        within("end of the connection", reading).await;
        String::from_utf8(self.received).unwrap()
    }

    /// The one answer of the connection.
    pub(crate) async fn answer(self) -> Answer {
        let text = self.rest().await;
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head
            .split(' ')
            .nth(1)
            .unwrap_or_default()
            .parse()
            .unwrap_or_default();
        let is_chunked = head.contains("transfer-encoding: chunked");
        let body = if is_chunked {
            unchunk(body)
        } else {
            body.to_owned()
        };
        Answer {
            status,
            head: head.to_owned(),
            body,
        }
    }

    /// Reads until `text` has come; how far it goes in what was received and is still to be looked at.
    pub(crate) async fn wait_for(&mut self, text: &str) -> usize {
        let reading = async {
            loop {
                let so_far = String::from_utf8_lossy(&self.received).into_owned();
                if let Some(at) = so_far.find(text) {
                    return at + text.len();
                }
                assert!(self.read().await > 0, "closed before {text:?}: {so_far:?}");
            }
        };
        within(text, reading).await
    }

    /// Reads until `text` has come, which is returned with what came before.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        let end = self.wait_for(text).await;
        String::from_utf8(self.received.drain(..end).collect()).unwrap()
    }

    /// Reads once; 0 at the end. A reset is an end too.
    async fn read(&mut self) -> usize {
        self.socket.read_buf(&mut self.received).await.unwrap_or(0)
    }
}

/// The body within HTTP's own chunks.
fn unchunk(mut chunked: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = chunked.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        let Some(piece) = rest.get(..size) else { break };
        body.push_str(piece);
        chunked = rest.get(size + 2..).unwrap_or("");
    }
    body
}

/// Sends a request and reads its answer.
pub(crate) async fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    Client::send(address, request).await.answer().await
}

/// A GET.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Answer {
    ask(address, head("GET", path, "")).await
}
