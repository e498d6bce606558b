//! A test's two processes: this one and a peer.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use orchestra_memory::{
    Direction, Notification, PeerId, Progress, Quiet, Segment, Slab, SlabId, TransferError,
    TransferId, Transport,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::rig;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const MIB: u64 = 1 << 20;
/// How the peer calls this process.
pub(crate) const US: PeerId = PeerId(900);
/// How this process calls the peer.
pub(crate) const THEM: PeerId = PeerId(1);

/// The peer process.
pub(crate) struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    pub(crate) metadata: Vec<u8>,
}

impl Peer {
    /// Starts one with slabs 0, 1, … of so many MiB.
    pub(crate) fn start(kind: &str, slabs_mib: &[u64]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memory-peer"))
            .arg(kind)
            .args(slabs_mib.iter().map(u64::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut peer = Self {
            child,
            stdin,
            stdout,
            metadata: Vec::new(),
        };
        peer.metadata = rig::from_hex(&peer.answer());
        peer
    }

    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answer()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether its memory holds a pattern.
    pub(crate) fn holds(&mut self, slab: u32, offset: u64, len: u64, seed: u64) -> bool {
        self.ask(&format!("holds {slab} {offset} {len} {seed}")) == "true"
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// This process: a transport with slabs, and a peer that it is connected to.
pub(crate) struct Two {
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) slabs: Vec<Arc<Slab>>,
    pub(crate) peer: Peer,
}

impl Two {
    /// Two processes with a slab of 8 MiB and one of 2 MiB each, connected both ways; none where the transport is not
    /// installed.
    pub(crate) fn connected(kind: &str) -> Self {
        let transport = rig::open(kind);
        let slabs = vec![rig::slab(0, 8 * MIB), rig::slab(1, 2 * MIB)];
        for slab in &slabs {
            transport.register(slab).unwrap();
        }
        let peer = Peer::start(kind, &[8, 2]);
        let mut two = Self {
            transport,
            slabs,
            peer,
        };
        two.transport.connect(THEM, &two.peer.metadata).unwrap();
        assert_eq!(two.peer_connects(US), "Ok(())");
        two
    }

    /// The peer connects to us under a name of its choice.
    pub(crate) fn peer_connects(&mut self, name: PeerId) -> String {
        let metadata = rig::to_hex(&self.transport.local_metadata().unwrap());
        self.peer.tell(&format!("connect {} {metadata}", name.0));
        self.peer.answer()
    }

    /// Makes progress until something is true.
    pub(crate) fn until<T>(
        &self,
        what: &str,
        mut ready: impl FnMut(&dyn Transport) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut naps = rig::Naps::new();
        loop {
            if let Some(value) = ready(&*self.transport) {
                return value;
            }
            assert!(Instant::now() < deadline, "not in time: {what}");
            naps.turn(&*self.transport);
        }
    }

    /// The peer's next answer, while this side makes progress too.
    pub(crate) fn answer(&mut self) -> String {
        let (transport, peer) = (&*self.transport, &mut self.peer);
        let has_answered = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !has_answered.load(Ordering::Relaxed) {
                    rig::turn(transport, Duration::from_millis(1));
                }
            });
            let answer = peer.answer();
            has_answered.store(true, Ordering::Relaxed);
            answer
        })
    }

    pub(crate) fn outcome(&self, id: TransferId) -> Progress {
        self.until("an outcome", |transport| match transport.poll(id) {
            Progress::Pending => None,
            ended => Some(ended),
        })
    }

    pub(crate) fn notification(&self) -> Notification {
        self.until("a notification", |transport| transport.take_notification())
    }

    pub(crate) fn put(&self, segments: &[Segment]) -> Result<TransferId, TransferError> {
        self.transport.post(Direction::Put, THEM, segments, None)
    }

    /// Asks until the peer is known to be quiet.
    pub(crate) fn disconnected(&self, peer: PeerId) {
        self.until("proof of quiet", |transport| {
            match transport.disconnect(peer).unwrap() {
                Quiet::Proven => Some(()),
                Quiet::Unproven => None,
            }
        });
    }
}

/// `len` bytes between two places.
pub(crate) const fn segment(local: (u32, u64), remote: (u32, u64), len: u64) -> Segment {
    Segment {
        local_slab: SlabId(local.0),
        local_offset: local.1,
        remote_slab: SlabId(remote.0),
        remote_offset: remote.1,
        len,
    }
}
