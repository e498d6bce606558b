//! Against a real etcd, which is killed, stopped and emptied. `make test` brings one; `ETCD` names another. Where there is
//! none, these tests say so and check nothing.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

use std::{
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    pin::{Pin, pin},
    process::{Child, Command, Stdio},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _};
use orchestra_cluster::{
    Entries, StoreUrl, VALUE_BYTES_MAX, watch,
    wire::{CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest, kv_client::KvClient},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time;
use tonic::transport::Channel;

const PATIENCE: Duration = Duration::from_secs(30);

/// An etcd of one member in a folder of its own.
struct Etcd {
    program: PathBuf,
    folder: PathBuf,
    ports: (u16, u16),
    process: Child,
}

impl Etcd {
    /// `None` where this machine has no etcd.
    async fn start(test: &str) -> Option<Self> {
        let program = binary()?;
        let folder = env::temp_dir().join(format!("orchestra-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (clients, peers) = (free(), free());
        let ports = [&clients, &peers].map(|it| it.local_addr().unwrap().port());
        drop((clients, peers));
        let ports = (ports[0], ports[1]);
        let process = spawn(&program, &folder, ports);
        let etcd = Self {
            program,
            folder,
            ports,
            process,
        };
        etcd.client().await;
        Some(etcd)
    }

    fn url(&self) -> StoreUrl {
        format!("etcd://127.0.0.1:{}/test", self.ports.0)
            .parse()
            .unwrap()
    }

    /// Returns once the store answers.
    async fn client(&self) -> Client {
        let endpoint = format!("http://127.0.0.1:{}", self.ports.0);
        let answering = async {
            loop {
                if let Ok(mut client) = KvClient::connect(endpoint.clone()).await
                    && client.range(any_key()).await.is_ok()
                {
                    return Client(client);
                }
                time::sleep(Duration::from_millis(50)).await;
            }
        };
        time::timeout(PATIENCE, answering)
            .await
            .expect("etcd does not answer")
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.process = spawn(&self.program, &self.folder, self.ports);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

fn any_key() -> RangeRequest {
    RangeRequest {
        key: b"x".to_vec(),
        ..RangeRequest::default()
    }
}

/// Whoever writes into the store.
struct Client(KvClient<Channel>);

impl Client {
    /// Answers with the store's revision.
    async fn put(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> i64 {
        let (key, value) = (key.into(), value.into());
        let put = self.0.put(PutRequest { key, value }).await.unwrap();
        put.into_inner().header.unwrap().revision
    }

    async fn delete(&mut self, key: &str) {
        let key = key.into();
        self.0
            .delete_range(DeleteRangeRequest { key })
            .await
            .unwrap();
    }

    async fn compact(&mut self, revision: i64) {
        let physical = true;
        self.0
            .compact(CompactionRequest { revision, physical })
            .await
            .unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn binary() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/etcd");
    let found = env::var_os("ETCD").map(PathBuf::from);
    let found = found.or_else(|| own.exists().then_some(own));
    if found.is_none() {
        eprintln!("skipped: no etcd; `make test` brings one where it can");
    }
    found
}

fn spawn(program: &Path, folder: &Path, (clients, peers): (u16, u16)) -> Child {
    let clients = format!("http://127.0.0.1:{clients}");
    let peers = format!("http://127.0.0.1:{peers}");
    Command::new(program)
        .arg("--data-dir")
        .arg(folder)
        .args([
            "--listen-client-urls",
            &clients,
            "--advertise-client-urls",
            &clients,
        ])
        .args([
            "--listen-peer-urls",
            &peers,
            "--initial-advertise-peer-urls",
            &peers,
        ])
        .args(["--initial-cluster", &format!("default={peers}")])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("etcd does not start")
}

type Watch<'a> = Pin<&'a mut dyn Stream<Item = Entries>>;

/// The next entries, as `key=value` in order.
async fn next(watch: &mut Watch<'_>) -> String {
    let entries = time::timeout(PATIENCE, watch.next())
        .await
        .expect("no change came")
        .unwrap();
    let pairs = entries
        .iter()
        .map(|(key, value)| format!("{key}={}", String::from_utf8_lossy(value)));
    pairs.collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn changes_arrive_and_other_keys_do_not() {
    let Some(etcd) = Etcd::start("changes").await else {
        return;
    };
    let mut client = etcd.client().await;
    client.put("/test/engines/a", "1").await;
    client.put("/test/other/a", "no").await;
    let mut watch: Watch<'_> = pin!(watch(&etcd.url(), "engines"));
    assert_eq!(next(&mut watch).await, "a=1");
    client.put("/test/engines/b", "2").await;
    assert_eq!(next(&mut watch).await, "a=1 b=2");
    client.put("/test/engines/a", "3").await;
    assert_eq!(next(&mut watch).await, "a=3 b=2");
    client.put("/test/enginesx", "no").await;
    client.delete("/test/engines/a").await;
    assert_eq!(next(&mut watch).await, "b=2");
}

#[tokio::test]
async fn a_store_that_comes_back_has_its_changes_taken_in_and_nothing_is_lost_meanwhile() {
    let Some(mut etcd) = Etcd::start("restart").await else {
        return;
    };
    let mut client = etcd.client().await;
    client.put("/test/engines/a", "1").await;
    let url = etcd.url();
    let mut watch: Watch<'_> = pin!(watch(&url, "engines"));
    assert_eq!(next(&mut watch).await, "a=1");
    etcd.kill();
    // Long enough for several attempts to fail.
    let silence = time::timeout(Duration::from_millis(700), watch.next()).await;
    assert!(silence.is_err(), "the store is away, and {silence:?}");
    etcd.start_again();
    let mut client = etcd.client().await;
    client.put("/test/engines/b", "2").await;
    // Equal entries are not told again, so the next ones have the change.
    assert_eq!(next(&mut watch).await, "a=1 b=2");
}

#[tokio::test]
async fn a_store_that_stands_still_is_left_and_found_again() {
    let Some(etcd) = Etcd::start("stopped").await else {
        return;
    };
    let mut client = etcd.client().await;
    let url = etcd.url();
    let mut watch: Watch<'_> = pin!(watch(&url, "engines"));
    assert_eq!(next(&mut watch).await, "");
    etcd.signal(Signal::STOP);
    let silence = time::timeout(Duration::from_secs(5), watch.next()).await;
    assert!(silence.is_err(), "the store stands still, and {silence:?}");
    etcd.signal(Signal::CONT);
    client.put("/test/engines/a", "1").await;
    assert_eq!(next(&mut watch).await, "a=1");
}

#[tokio::test]
async fn history_that_is_compacted_away_is_read_anew() {
    let Some(mut etcd) = Etcd::start("compacted").await else {
        return;
    };
    let mut client = etcd.client().await;
    let url = etcd.url();
    let mut watch: Watch<'_> = pin!(watch(&url, "engines"));
    client.put("/test/engines/a", "0").await;
    assert_eq!(next(&mut watch).await, "a=0");
    etcd.kill();
    etcd.start_again();
    let mut client = etcd.client().await;
    let mut revision = 0;
    for value in 1..=5 {
        revision = client.put("/test/engines/a", value.to_string()).await;
    }
    client.compact(revision).await;
    // The watch reconnects at some moment among these writes; what it ends with is what the store has.
    while next(&mut watch).await != "a=5" {}
}

#[tokio::test]
async fn keys_and_values_are_bounded() {
    let Some(etcd) = Etcd::start("bounds").await else {
        return;
    };
    let mut client = etcd.client().await;
    client.put("/test/engines/a", "1").await;
    client
        .put("/test/engines/large", vec![b'x'; VALUE_BYTES_MAX + 1])
        .await;
    client
        .put([&b"/test/engines/"[..], b"\xff"].concat(), "1")
        .await;
    let url = etcd.url();
    let mut watch: Watch<'_> = pin!(watch(&url, "engines"));
    assert_eq!(next(&mut watch).await, "a=1");
    client
        .put("/test/engines/a", vec![b'x'; VALUE_BYTES_MAX + 1])
        .await;
    assert_eq!(next(&mut watch).await, "");
    client
        .put("/test/engines/a", vec![b'x'; VALUE_BYTES_MAX])
        .await;
    assert_eq!(next(&mut watch).await.len(), 2 + VALUE_BYTES_MAX);
}
