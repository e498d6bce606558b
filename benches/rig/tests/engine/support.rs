//! One engine in this process, and a client that reads what it says.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use orchestra_rig::{
    engine::{Engine, EngineConfig, Kind, bind, control::Order},
    http1::{BodyLength, BodyReader, Chunked, Connection},
    words,
};
use serde_json::{Value, json};
use tokio::net::TcpStream;

pub(crate) const ASKED: &[u8] = b"<|user|>hi\n<|assistant|>";

pub(crate) fn config(kind: Kind) -> EngineConfig {
    EngineConfig {
        kind,
        model: "mock".to_owned(),
        max_model_len: 10_000,
        words: 6,
        words_per_event: 1,
        ttft: Duration::ZERO,
        itl: Duration::ZERO,
        max_concurrency: 1000,
        busy_status: 429,
        prefix_cache_blocks: 100,
    }
}

pub(crate) struct Rig {
    pub(crate) engine: Arc<Engine>,
    pub(crate) address: SocketAddr,
    pub(crate) serving: tokio::task::JoinSet<()>,
}

impl Rig {
    pub(crate) fn start(config: EngineConfig) -> Self {
        let listener = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let engine = Arc::new(Engine::new(Arc::new(config), address.port()));
        let mut serving = tokio::task::JoinSet::new();
        serving.spawn(Arc::clone(&engine).serve(listener));
        Self {
            engine,
            address,
            serving,
        }
    }

    pub(crate) fn arm(&self, order: Value) {
        let order: Order = serde_json::from_value(order).unwrap();
        self.engine.control().arm(order).unwrap();
    }

    pub(crate) async fn connect(&self) -> Connection {
        Connection::new(TcpStream::connect(self.address).await.unwrap()).unwrap()
    }

    /// Status and body of one request on its own connection.
    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let mut connection = self.connect().await;
        send(&mut connection, path, &body).await;
        let (status, body) = receive(&mut connection).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    /// A streamed answer: the words, its finish reason where it has one, and how the body ended.
    pub(crate) async fn stream(
        &self,
        path: &str,
        mut body: Value,
    ) -> (String, Option<String>, io::Result<()>) {
        body["stream"] = json!(true);
        let mut connection = self.connect().await;
        send(&mut connection, path, &body).await;
        let mut text = Vec::new();
        let ended = receive_into(&mut connection, &mut text).await.map(drop);
        let (mut said, mut finish) = (String::new(), None);
        for event in String::from_utf8(text).unwrap().split_terminator("\n\n") {
            let Ok(event) = serde_json::from_str::<Value>(event.strip_prefix("data: ").unwrap())
            else {
                continue;
            };
            let choice = &event["choices"][0];
            let piece = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            said += piece.unwrap_or_default();
            finish = finish.or(choice["finish_reason"].as_str().map(str::to_owned));
        }
        (said, finish, ended)
    }
}

pub(crate) async fn send(connection: &mut Connection, path: &str, body: &Value) {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write((head + &body).as_bytes()).await.unwrap();
}

pub(crate) async fn receive(connection: &mut Connection) -> io::Result<(u16, Vec<u8>)> {
    let mut body = Vec::new();
    let status = receive_into(connection, &mut body).await?;
    Ok((status, body))
}

pub(crate) async fn receive_into(
    connection: &mut Connection,
    body: &mut Vec<u8>,
) -> io::Result<u16> {
    let head = connection
        .head()
        .await?
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = std::str::from_utf8(&connection.ahead()[9..12])
        .unwrap()
        .parse()
        .unwrap();
    connection.skip(head.len);
    let mut reader = match head.body {
        BodyLength::Bytes(bytes) => BodyReader::Bytes(bytes),
        BodyLength::Chunked => BodyReader::Chunked(Chunked::default()),
        BodyLength::Unsaid => BodyReader::ToEnd,
    };
    while connection.body(&mut reader, body).await? {}
    Ok(status)
}

pub(crate) fn answer(words: std::ops::Range<u32>) -> String {
    words
        .map(|index| words::word(words::key(ASKED, 7, 0), index))
        .collect()
}

pub(crate) fn chat(more: &Value) -> Value {
    let mut body =
        json!({"model": "mock", "seed": 7, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const TEXT: &str = "/v1/completions";
