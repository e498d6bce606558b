//! A driven manager, and another process that has one too.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_memory::{
    BlockSet, BufferManager, Chime, Driver, Lease, ManagerConfig, PeerId, Pool, PoolConfig,
    RemoteGrant, Rights, Transfer, TransferOptions,
};

use crate::rig;

/// The argument by which this program is the other process.
pub(crate) const PEER: &str = "--peer";
pub(crate) const THEM: PeerId = PeerId(1);
pub(crate) const BLOCK_BYTES: u64 = 64 << 10;
const LEASE: Duration = Duration::from_secs(50);

pub(crate) struct Node {
    pub(crate) driver: Driver,
    pub(crate) pool: Arc<Pool>,
    kind: String,
}

impl Node {
    pub(crate) fn new(kind: &str, config: PoolConfig) -> Self {
        let transport = rig::open(kind).into();
        let limits = ManagerConfig::default();
        let manager = BufferManager::new(PeerId(0), limits, vec![transport]).unwrap();
        let pool = manager.create_pool(config).unwrap();
        let driver = Driver::start(manager).unwrap();
        let kind = kind.to_owned();
        Self { driver, pool, kind }
    }

    pub(crate) fn metadata(&self) -> String {
        rig::to_hex(&self.driver.manager().local_metadata(&self.kind).unwrap())
    }

    pub(crate) fn connect(&self, metadata: &str) {
        let metadata = rig::from_hex(metadata);
        let manager = self.driver.manager();
        manager.connect(THEM, &self.kind, &metadata).unwrap();
        self.driver.ring();
    }

    /// Blocks of one set, granted to the peer for as long as leases last.
    fn grant(&self, set: &BlockSet) -> String {
        let lease = Lease {
            peer: THEM,
            rights: Rights::Write,
            lasts: LEASE,
        };
        let (manager, now) = (self.driver.manager(), self.driver.now());
        let grant = manager.grant(&self.pool, &set.handles(), lease, now);
        rig::to_hex(&grant.unwrap().encode(now))
    }

    pub(crate) fn sealed(&self, n: u32) -> BlockSet {
        let set = self.pool.allocate(n).unwrap();
        set.seal().unwrap();
        set
    }

    /// Puts a set into the beginning of a grant, which goes on.
    pub(crate) fn put(&self, set: &BlockSet, grant: &RemoteGrant) -> Transfer {
        let options = TransferOptions {
            ends_grant: false,
            timeout: LEASE,
            ..TransferOptions::default()
        };
        let (manager, now) = (self.driver.manager(), self.driver.now());
        let put = manager.put(&self.pool, &set.handles(), grant, &options, now);
        self.driver.ring();
        put.unwrap()
    }
}

/// Sleeps until a transfer is over.
pub(crate) fn wait(transfer: &Transfer, chime: &Arc<Chime>) {
    let waker = chime.waker(1);
    while !transfer.wake(&waker) {
        chime.sleep(Duration::from_secs(1));
        drop(chime.take());
    }
}

/// The other process.
pub(crate) struct Peer {
    pub(crate) child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    pub(crate) fn start(program: impl AsRef<OsStr>, arguments: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            stdin,
            stdout,
        }
    }

    /// Starts one, and connects it with a node both ways.
    pub(crate) fn connected(node: &Node) -> Self {
        let this = std::env::current_exe().unwrap();
        let mut peer = Self::start(this, &[PEER, &node.kind]);
        let metadata = peer.answer();
        node.connect(&metadata);
        assert_eq!(
            peer.ask(&format!("connect {}", node.metadata())),
            "connected"
        );
        peer
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").unwrap();
        self.answer()
    }

    /// So many blocks of its, to be written.
    pub(crate) fn grant(&mut self, node: &Node, n: u32) -> RemoteGrant {
        let grant = rig::from_hex(&self.ask(&format!("grant {n}")));
        RemoteGrant::decode(&grant, THEM, node.driver.now(), 1 << 20).unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is the other process until its input ends.
pub(crate) fn serve(kind: &str) {
    let node = Node::new(kind, config(BLOCK_BYTES, 256 << 20));
    let mut sets = Vec::new();
    let say = |line: &str| {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{line}").unwrap();
        stdout.flush().unwrap();
    };
    say(&node.metadata());
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.split_once(' ') {
            Some(("connect", metadata)) => {
                node.connect(metadata);
                say("connected");
            }
            Some(("grant", n)) => {
                sets.push(node.pool.allocate(n.parse().unwrap()).unwrap());
                let grant = node.grant(sets.last().unwrap());
                node.driver.ring();
                say(&grant);
            }
            _ => {
                // Takes what has arrived, so that nothing waits for room.
                while node.driver.manager().take_event().is_some() {}
                let processor = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
                say(&format!(
                    "{}",
                    processor.tv_sec * 1_000_000_000 + processor.tv_nsec
                ));
            }
        }
    }
}

pub(crate) fn config(block_bytes: u64, slab_bytes: u64) -> PoolConfig {
    PoolConfig {
        block_bytes,
        slab_bytes,
        ..PoolConfig::default()
    }
}

/// Processor time of this process so far, seconds.
pub(crate) fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Asks again until it is true; seconds that took.
pub(crate) fn until(mut is_true: impl FnMut() -> bool) -> f64 {
    let started = Instant::now();
    while !is_true() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "it never happened"
        );
        std::thread::sleep(Duration::from_micros(100));
    }
    started.elapsed().as_secs_f64()
}
