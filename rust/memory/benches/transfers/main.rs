//! Puts and gets of 256 blocks between two processes, each beside the limit that physics sets here, the same way and in
//! the same rounds: a copy within the process for `shm`, the kernel's copy between processes for `nixl`, a plain socket
//! for `tcp`.
//!
//! `cargo bench -p orchestra-memory --bench transfers -- [shm|tcp|nixl …]`. GB/s as median (best).

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench prints, and fails by panicking"
)]

mod limits;

#[path = "../../peer/rig.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod rig;

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_memory::{Direction, PeerId, Progress, Segment, Slab, SlabId, Transport};

const BLOCKS: u64 = 256;
const SLAB_MIB: u64 = 512;
const PEER: &str = env!("CARGO_BIN_EXE_memory-peer");
const THEM: PeerId = PeerId(1);

struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").unwrap();
        self.answer()
    }
}

/// Two processes, connected both ways.
struct Two {
    transport: Box<dyn Transport>,
    slab: Arc<Slab>,
    peer: Peer,
    /// Where the peer's slab lies in its address space.
    remote_base: usize,
}

fn connected(kind: &str) -> Two {
    let transport = rig::open(kind);
    let slab = rig::slab(0, SLAB_MIB << 20);
    transport.register(&slab).unwrap();
    let mut child = Command::new(PEER)
        .args([kind, &SLAB_MIB.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut peer = Peer {
        child,
        stdin,
        stdout,
    };
    let metadata = rig::from_hex(&peer.answer());
    transport.connect(THEM, &metadata).unwrap();
    let ours = rig::to_hex(&transport.local_metadata().unwrap());
    assert_eq!(peer.ask(&format!("connect 9 {ours}")), "Ok(())");
    let remote_base = peer.ask("base 0").parse().unwrap();
    Two {
        transport,
        slab,
        peer,
        remote_base,
    }
}

impl Two {
    fn run(&self, direction: Direction, segments: &[Segment], notification: Option<&[u8]>) -> f64 {
        let started = Instant::now();
        let id = self
            .transport
            .post(direction, THEM, segments, notification)
            .unwrap();
        let mut naps = rig::Naps::new();
        loop {
            match self.transport.poll(id) {
                Progress::Pending => drop(naps.turn(&*self.transport)),
                Progress::Done => break,
                Progress::Failed(error) => panic!("{error}"),
            }
        }
        let elapsed = started.elapsed().as_secs_f64();
        let _ = self.transport.release(id);
        elapsed
    }
}

/// 256 blocks: neighbours on both sides, or drawn from twice as many places on both.
fn blocks(len: u64, is_scattered: bool) -> Vec<Segment> {
    // Odd steps through a power of two visit every place once.
    let place = |at: u64, step: u64| {
        if is_scattered {
            at * step % (2 * BLOCKS)
        } else {
            at
        }
    };
    (0..BLOCKS)
        .map(|at| Segment {
            local_slab: SlabId(0),
            local_offset: place(at, 311) * len,
            remote_slab: SlabId(0),
            remote_offset: place(at, 171) * len,
            len,
        })
        .collect()
}

fn median_and_best(mut seconds: Vec<f64>, bytes: u64) -> (f64, f64) {
    seconds.sort_unstable_by(f64::total_cmp);
    let speed = |seconds: f64| bytes as f64 / seconds / 1e9;
    (speed(seconds[seconds.len() / 2]), speed(seconds[0]))
}

fn beside(name: &str, ours: (f64, f64), limit: (f64, f64)) -> String {
    format!(
        "{name} {:6.2} ({:6.2}) limit {:6.2} ({:6.2}) = {:4.2}x",
        ours.0,
        ours.1,
        limit.0,
        limit.1,
        ours.0 / limit.0
    )
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

fn measure(kind: &str) {
    let two = connected(kind);
    let mut limit = limits::of(kind, &two.slab, two.peer.child.id(), two.remote_base);
    println!(
        "{kind}: put and get beside {}; load {}",
        limit.name(),
        load()
    );
    for len in [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20] {
        for is_scattered in [false, true] {
            let segments = blocks(len, is_scattered);
            let mut taken = [const { Vec::new() }; 4];
            // A round of small blocks is over in 50 us: more of them, for a median that means something.
            for _ in 0..if len > 64 << 10 { 21 } else { 51 } {
                // There and back each time, so that every copy finds its bytes where the one before it left them.
                let both = [Direction::Put, Direction::Get];
                let limits = both.map(|direction| limit.run(direction, &segments));
                let ours = both.map(|direction| two.run(direction, &segments, None));
                for (all, one) in taken.iter_mut().zip(limits.into_iter().chain(ours)) {
                    all.push(one);
                }
            }
            let [limit_put, limit_get, put, get] =
                taken.map(|seconds| median_and_best(seconds, BLOCKS * len));
            println!(
                "{kind} {:>5} KiB {:<10} {}  {}",
                len >> 10,
                if is_scattered {
                    "scattered"
                } else {
                    "contiguous"
                },
                beside("put", put, limit_put),
                beside("get", get, limit_get),
            );
        }
    }
    rounds(kind, &two, &mut limit);
    small_writes(kind, &two);
    idle(kind, &two);
    let Two { mut peer, .. } = two;
    let _ = peer.child.kill();
    let _ = peer.child.wait();
}

/// What a round costs beside its bytes, which are next to none here.
fn rounds(kind: &str, two: &Two, limit: &mut limits::Limit) {
    let segments = blocks(64, true);
    let [mut limits, mut puts] = [const { Vec::new() }; 2];
    for _ in 0..501 {
        limits.push(limit.run(Direction::Put, &segments));
        puts.push(two.run(Direction::Put, &segments, None));
    }
    let [limit, put] = [limits, puts].map(|mut seconds| {
        seconds.sort_unstable_by(f64::total_cmp);
        seconds[seconds.len() / 2] * 1e6
    });
    println!(
        "{kind} put of 256 blocks of 64 bytes, scattered: limit {limit:.2} us, put {put:.2} us = {:.1} ns a block more",
        (put - limit) * 1e3 / BLOCKS as f64,
    );
}

fn small_writes(kind: &str, two: &Two) {
    let segments = &blocks(256, false)[..1];
    let mut micros: Vec<f64> = (0..500)
        .map(|_| two.run(Direction::Put, segments, Some(b"written")) * 1e6)
        .collect();
    micros.sort_unstable_by(f64::total_cmp);
    println!(
        "{kind} put of 256 bytes with a notification: median {:.1} us, best {:.1} us",
        micros[250], micros[0]
    );
}

/// Processor time of a progress loop that has nothing to do, as a share of a core.
fn idle(kind: &str, two: &Two) {
    while two.transport.progress(Duration::ZERO) > 0 {}
    let (started, before) = (Instant::now(), limits::processor_seconds());
    while started.elapsed() < Duration::from_secs(2) {
        rig::turn(&*two.transport, Duration::from_millis(5));
    }
    let share = (limits::processor_seconds() - before) / started.elapsed().as_secs_f64();
    println!("{kind} idle: {:.2} % of a core", 100.0 * share);
}

fn main() {
    let asked: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    for kind in ["shm", "tcp", "nixl"] {
        if !asked.is_empty() && !asked.iter().any(|asked| asked == kind) {
            continue;
        }
        if rig::is_installed(kind) {
            measure(kind);
        } else {
            println!("{kind}: skipped, it is not installed");
        }
    }
}
