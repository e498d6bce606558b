//! A router, engines by hand, and HTTP without a library.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use orchestra_router::{Router, RouterConfig};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{self, Instant},
};

pub(crate) use crate::http_client::{Answer, Client, ask, get};

/// No step of a test takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The model that engines serve unless a test says otherwise.
pub(crate) const MODEL: &str = "org/tiny";

/// Waits for `future`, and fails the test where that takes too long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(time::error::Elapsed { .. }) => panic!("no {what} within {PATIENCE:?}"),
    }
}

/// Asks until it is so.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what} did not come about");
        time::sleep(Duration::from_millis(5)).await;
    }
}

/// A request that reached an engine, and the connection that waits for its answer.
pub(crate) struct Call {
    pub(crate) path: String,
    pub(crate) head: String,
    pub(crate) body: String,
    socket: TcpStream,
    back: mpsc::Sender<TcpStream>,
}

impl Call {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Writes these bytes and nothing else.
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        // The router may have gone.
        let _ = self.socket.write_all(bytes.as_ref()).await;
    }

    /// A whole answer; the connection carries on.
    pub(crate) async fn answer(mut self, status: u16, body: &str) {
        self.write(answer(status, "", body)).await;
        let _ = self.back.send(self.socket).await;
    }

    /// The head of a stream of events.
    pub(crate) async fn begin_stream(&mut self) {
        self.write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            .await;
    }

    /// One event, in a chunk of its own.
    pub(crate) async fn event(&mut self, data: &str) {
        self.write(chunk(&format!("data: {data}\n\n"))).await;
    }

    /// A piece of text of choice 0 of a chat.
    pub(crate) async fn say(&mut self, text: &str) {
        self.event(&delta(0, text, None)).await;
    }

    /// The same, where the router may have gone.
    pub(crate) async fn try_say(&mut self, text: &str) -> std::io::Result<()> {
        let event = chunk(&format!("data: {}\n\n", delta(0, text, None)));
        self.socket.write_all(event.as_bytes()).await
    }

    /// The rest of a stream that is complete; the connection carries on.
    pub(crate) async fn finish_stream(mut self) {
        self.event(&delta(0, "", Some("stop"))).await;
        self.event("[DONE]").await;
        self.write("0\r\n\r\n").await;
        let _ = self.back.send(self.socket).await;
    }

    /// A whole stream.
    pub(crate) async fn stream(mut self, words: &[&str]) {
        self.begin_stream().await;
        for word in words {
            self.say(word).await;
        }
        self.finish_stream().await;
    }

    /// Breaks the connection with a reset.
    pub(crate) fn reset(self) {
        let _ = self.socket.set_zero_linger();
    }

    /// Returns when the router has closed the connection.
    pub(crate) async fn gone(mut self) {
        let mut rest = Vec::new();
        let _ = within("end of the connection", self.socket.read_to_end(&mut rest)).await;
    }
}

/// A chunk of HTTP's.
pub(crate) fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// A whole answer.
pub(crate) fn answer(status: u16, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
}

/// The data of an event of a chat.
pub(crate) fn delta(index: u32, text: &str, finish_reason: Option<&str>) -> String {
    let choice = serde_json::json!({
        "index": index,
        "delta": {"content": text},
        "logprobs": null,
        "finish_reason": finish_reason,
    });
    serde_json::json!({
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [choice],
    })
    .to_string()
}

/// An engine that answers questions about itself, and hands every other request to the test.
pub(crate) struct Engine {
    pub(crate) address: SocketAddr,
    calls: mpsc::Receiver<Call>,
    pub(crate) num_connections: Arc<AtomicUsize>,
    is_hung: Arc<AtomicBool>,
    accepting: AbortHandle,
    tasks: JoinSet<()>,
}

impl Engine {
    pub(crate) async fn start() -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), MODEL, "vllm").await
    }

    pub(crate) async fn start_at(address: SocketAddr, model: &str, owner: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, calls) = mpsc::channel(64);
        let num_connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&num_connections);
        let is_hung = Arc::new(AtomicBool::new(false));
        let hung = Arc::clone(&is_hung);
        let models = serde_json::json!({
            "object": "list",
            "data": [{"id": model, "object": "model", "owned_by": owner, "max_model_len": 4096}],
        })
        .to_string();
        let mut tasks = JoinSet::new();
        let accepting = tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let hung = Arc::clone(&hung);
                connections.spawn(serve(socket, models.clone(), sender.clone(), hung));
            }
        });
        Self {
            address,
            calls,
            num_connections,
            is_hung,
            accepting,
            tasks,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next request.
    pub(crate) async fn call(&mut self) -> Call {
        within("request to the engine", self.calls.recv())
            .await
            .unwrap()
    }

    /// From now on it reads, and answers nothing by itself.
    pub(crate) fn hang(&self) {
        self.is_hung.store(true, Ordering::Relaxed);
    }

    /// Whether no request waits.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.calls.try_recv().is_err()
    }

    /// Ends as a process does: the listener and every connection close. What a test holds lives on.
    pub(crate) async fn stop(mut self) -> SocketAddr {
        self.accepting.abort();
        while self.tasks.join_next().await.is_some() {}
        self.address
    }
}

/// Serves one connection.
async fn serve(
    mut socket: TcpStream,
    models: String,
    calls: mpsc::Sender<Call>,
    is_hung: Arc<AtomicBool>,
) {
    loop {
        let Some((head, body)) = read_request(&mut socket).await else {
            return;
        };
        if is_hung.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let own = match path.as_str() {
            "/health" => Some(answer(200, "", "")),
            "/v1/models" => Some(answer(200, "", &models)),
            // A word is a token.
            "/tokenize" => {
                let asked: Value = serde_json::from_str(&body).unwrap();
                let count = asked["prompt"].as_str().unwrap().split_whitespace().count();
                Some(answer(
                    200,
                    "",
                    &format!("{{\"count\": {count}, \"tokens\": []}}"),
                ))
            }
            _ if head.starts_with("GET ") => Some(answer(404, "", "{}")),
            _ => None,
        };
        if let Some(answer) = own {
            if socket.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
            continue;
        }
        let (back, mut returned) = mpsc::channel(1);
        let call = Call {
            path,
            head,
            body,
            socket,
            back,
        };
        if calls.send(call).await.is_err() {
            return;
        }
        match returned.recv().await {
            Some(again) => socket = again,
            None => return,
        }
    }
}

/// Head and body of the next request, or `None` at the end.
async fn read_request(socket: &mut TcpStream) -> Option<(String, String)> {
    let mut received = Vec::new();
    let head_end = loop {
        if let Some(at) = received.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if socket.read_buf(&mut received).await.unwrap_or(0) == 0 {
            return None;
        }
    };
    let head = String::from_utf8(received[..head_end].to_vec()).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok())
        .unwrap_or(0);
    while received.len() < head_end + length {
        if socket.read_buf(&mut received).await.unwrap_or(0) == 0 {
            return None;
        }
    }
    let body = String::from_utf8(received[head_end..].to_vec()).unwrap();
    Some((head, body))
}

/// Settings under which nothing times out by itself.
pub(crate) fn config() -> RouterConfig {
    let mut config = RouterConfig::default();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    (
        config.listen.http,
        config.listen.grpc,
        config.listen.workers,
        config.listen.admin,
    ) = (any, any, any, any);
    config.engines.engine_ttft_timeout.0 = PATIENCE;
    config.engines.engine_stall_timeout.0 = PATIENCE;
    config
}

/// A router with these engines, all of them up.
pub(crate) async fn start(mut config: RouterConfig, engines: &[&Engine]) -> (Router, SocketAddr) {
    config.engines.urls = engines
        .iter()
        .map(|engine| engine.url().parse().unwrap())
        .collect();
    let router = Router::start(&config).unwrap();
    let address = router.addresses().http;
    eventually("all engines up", || async move {
        let models = get(address, "/v1/models").await.json();
        models["data"]
            .as_array()
            .is_some_and(|models| !models.is_empty())
    })
    .await;
    // The list tells of the first engine only.
    let count = engines.len();
    eventually("all engines up", || {
        let is_up = num_up(&router) == count;
        async move { is_up }
    })
    .await;
    (router, address)
}

/// A router that follows a file of engines.
pub(crate) fn start_with_file(path: &std::path::Path) -> (Router, SocketAddr) {
    let mut config = config();
    config.engines.engines_file = Some(path.to_owned());
    let router = Router::start(&config).unwrap();
    let address = router.addresses().http;
    (router, address)
}

/// How many engines take requests.
pub(crate) fn num_up(router: &Router) -> usize {
    let engines = router.state().list_engines();
    engines
        .iter()
        .filter(|engine| engine.is_up && engine.breaker == "closed")
        .count()
}

impl Answer {
    pub(crate) fn code(&self) -> String {
        self.json()["error"]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// The data of its events.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = self.body.split_terminator("\n\n");
        events
            .filter_map(|event| event.strip_prefix("data: "))
            .map(str::to_owned)
            .collect()
    }

    /// The text of choice 0, and whether the stream ended as it should.
    pub(crate) fn text(&self) -> (String, bool) {
        let events = self.events();
        let is_whole = events.last().is_some_and(|last| last == "[DONE]");
        let pieces = events
            .iter()
            .filter_map(|event| serde_json::from_str::<Value>(event).ok());
        let text = pieces.filter_map(|piece| {
            let choice = &piece["choices"][0];
            let text = choice["delta"]["content"]
                .as_str()
                .or(choice["text"].as_str());
            text.map(str::to_owned)
        });
        (text.collect(), is_whole)
    }
}

/// A JSON request that ends its connection.
pub(crate) fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nx-request-id: test-1\r\n\r\n{body}"
    )
}

/// A chat; `fields` begins with a comma where there are any.
pub(crate) fn chat(fields: &str) -> String {
    let body = format!(
        "{{\"model\": \"{MODEL}\", \"messages\": [{{\"role\": \"user\", \"content\": \"hi\"}}]{fields}}}"
    );
    post("/v1/chat/completions", &body)
}
