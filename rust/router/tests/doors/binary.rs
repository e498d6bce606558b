//! The real binary as a process, with a worker by hand: what signals do to it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use orchestra_proto::v1;
use orchestra_router::Addresses;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::time;

use crate::{
    settings::file,
    support::{Answer, Client, MODEL, Worker, ask, eventually, get, head, post, within},
};

/// A router process. It is killed where the test ends before it.
struct Binary {
    child: Child,
    at: Addresses,
    log: PathBuf,
}

impl Binary {
    /// Starts it with this settings file on free ports.
    fn start(name: &str, config: &Path, flags: &[&str]) -> Self {
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.log"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_orchestra-router"))
            .env_clear()
            .args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
            .args(["--workers", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args(["--heartbeat-timeout", "60s", "--hang-timeout", "60s"])
            .args(["--print-addresses", "--config"])
            .arg(config)
            .args(flags)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        let address = |door: &str| -> SocketAddr { said[door].as_str().unwrap().parse().unwrap() };
        let at = Addresses {
            http: address("http"),
            grpc: address("grpc"),
            workers: address("workers"),
            admin: address("admin"),
        };
        Self { child, at, log }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The exit status of a process that was told to stop.
    async fn status(&mut self) -> Option<i32> {
        let waiting = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status.code();
                }
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        within("end of the process", waiting).await
    }

    fn logged(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for a metric's line.
    async fn metric(&self, line: &str) {
        let waiting = async {
            while !get(self.at.http, "/metrics").await.body.contains(line) {
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        within(line, waiting).await;
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stream(header: &str) -> String {
    let body = format!(r#"{{"model": "{MODEL}", "prompt": "x", "stream": true}}"#);
    post("/v1/completions", &body).replacen("\r\n", &format!("\r\n{header}"), 1)
}

async fn models(at: SocketAddr, key: &str) -> Answer {
    let authorization = format!("authorization: Bearer {key}\r\n");
    ask(at, head("GET", "/v1/models", &authorization)).await
}

#[tokio::test]
async fn sighup_changes_the_next_request_and_no_running_one() {
    let config = file("hup.toml", "api_key = 'sk-old'\n");
    let router = Binary::start("hup", &config, &[]);
    let mut worker = Worker::attach(router.at).await;
    let authorization = "authorization: Bearer sk-old\r\n";
    let mut running = Client::send(router.at.http, stream(authorization)).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;

    let engines = "[[engine]]\nurl = 'http://127.0.0.1:9'\n";
    let settings = "api_key = 'sk-new'\nmax_connections = 7\nlog = 'debug'\n";
    file("hup.toml", &format!("{settings}{engines}"));
    router.signal(Signal::HUP);
    router
        .metric("orchestra_config_reloads_total{outcome=\"applied\"} 1")
        .await;
    assert_eq!(models(router.at.http, "sk-old").await.status, 401);
    assert_eq!(models(router.at.http, "sk-new").await.status, 200);
    let log = router.logged();
    assert!(log.contains("key=\"max_connections\""), "{log}");
    assert!(!log.contains("sk-"), "{log}");
    let shown = get(router.at.admin, "/admin/config").await.body;
    assert!(
        shown.contains(r#"{"key":"max_connections","values":["16384"],"source":"default"}"#),
        "{shown}"
    );
    assert!(shown.contains(r#"{"key":"log","values":["debug"],"source":"#));
    assert!(shown.contains(r#"{"key":"api_key","values":["***"],"source":"#));

    let listed = get(router.at.admin, "/admin/workers").await.body;
    assert!(listed.contains(r#""url":"http://127.0.0.1:9""#), "{listed}");

    file("hup.toml", settings);
    router.signal(Signal::HUP);
    router
        .metric("orchestra_config_reloads_total{outcome=\"applied\"} 2")
        .await;
    let gone = async {
        while get(router.at.admin, "/admin/workers")
            .await
            .body
            .contains("127.0.0.1:9")
        {
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("end of the engine", gone).await;

    worker.finish(start.sequence_id, 3, "two").await;
    running.until("data: [DONE]\n\n").await;
}

#[tokio::test]
async fn a_file_that_cannot_be_used_changes_nothing() {
    let config = file("broken-later.toml", "api_key = 'sk-old'\n");
    let router = Binary::start("broken-later", &config, &[]);
    file(
        "broken-later.toml",
        "api_key = 'sk-new'\nmax_replays = 'x'\nlogg = 'debug'\n",
    );
    router.signal(Signal::HUP);
    router
        .metric("orchestra_config_reloads_total{outcome=\"refused\"} 1")
        .await;
    assert_eq!(models(router.at.http, "sk-new").await.status, 401);
    assert_eq!(models(router.at.http, "sk-old").await.status, 200);
    let log = router.logged();
    for key in ["key=\"max_replays\"", "key=\"logg\""] {
        assert!(log.contains(key), "{log}");
    }
}

#[tokio::test]
async fn an_operator_changes_what_is_logged() {
    let config = file("log.toml", "log = 'error'\n");
    let router = Binary::start("log", &config, &[]);
    let refused = post("/v1/completions", r#"{"model": "a", "prompt": "x"}"#);
    assert_eq!(ask(router.at.http, &refused).await.status, 503);
    assert_eq!(router.logged(), "");
    let wish = post("/admin/log", r#"{"filter": "debug"}"#).replacen("POST", "PUT", 1);
    let answer = ask(router.at.admin, wish).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, r#"{"filter":"debug"}"#)
    );
    assert_eq!(ask(router.at.http, &refused).await.status, 503);
    let log = router.logged();
    assert!(log.contains("request refused"), "{log}");
}

/// A worker, a client that has the first of what it wrote, and the sequence of the two.
async fn stream_begun(router: &Binary) -> (Worker, Client, v1::StartSequence) {
    let mut worker = Worker::attach(router.at).await;
    let mut running = Client::send(router.at.http, stream("")).await;
    let start = worker.start().await;
    worker.write(start.sequence_id, 0, "one").await;
    running.until("one").await;
    (worker, running, start)
}

#[tokio::test]
async fn sigterm_refuses_the_new_and_lets_the_running_finish() {
    let config = file("term.toml", "");
    let mut router = Binary::start("term", &config, &[]);
    let (mut worker, mut running, start) = stream_begun(&router).await;

    router.signal(Signal::TERM);
    eventually(router.at.http, "/ready", 503).await;
    let refused = ask(router.at.http, stream("")).await;
    assert_eq!(
        (refused.status, refused.error().0.as_str()),
        (503, "shutting_down")
    );
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(get(router.at.http, "/live").await.status, 200);

    worker.finish(start.sequence_id, 3, "two").await;
    running.until("data: [DONE]\n\n").await;
    assert_eq!(router.status().await, Some(0));
    worker.told_to_go().await;
}

#[tokio::test]
async fn what_outlasts_the_drain_ends_with_an_error_event() {
    let config = file("deadline.toml", "drain_timeout = '100ms'\n");
    let mut router = Binary::start("deadline", &config, &[]);
    let (_worker, running, _) = stream_begun(&router).await;
    router.signal(Signal::TERM);
    let last = running.rest().await;
    assert!(last.contains("\"code\":\"shutting_down\""), "{last}");
    assert!(!last.contains("[DONE]"), "{last}");
    assert_eq!(router.status().await, Some(0));
}
