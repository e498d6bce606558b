//! The other process of the transport tests: has slabs, makes progress, and does what its standard input says, one
//! line each, one line back. Ends with its input.

#![expect(
    unsafe_code,
    reason = "maps over its own memory, which the crate has no way to do"
)]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a program of the tests: what goes wrong here must fail them"
)]

mod rig;

use std::{
    io::{BufRead, Write},
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, TryRecvError, sync_channel},
    },
    time::{Duration, Instant},
};

use orchestra_memory::{Direction, PeerId, Progress, Segment, Slab, SlabId, Transport};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// How long a command that waits for the other side waits.
const PATIENCE: Duration = Duration::from_secs(20);

struct Peer {
    transport: Box<dyn Transport>,
    slabs: Vec<Arc<Slab>>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let transport = rig::open(&arguments[1]);
    let slabs: Vec<_> = arguments[2..]
        .iter()
        .zip(0..)
        .map(|(mib, id)| rig::slab(id, mib.parse::<u64>().unwrap() << 20))
        .collect();
    for slab in &slabs {
        transport.register(slab).unwrap();
    }
    let peer = Peer { transport, slabs };
    say(&rig::to_hex(&peer.transport.local_metadata().unwrap()));
    let (lines, commands) = sync_channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let mut naps = rig::Naps::new();
    loop {
        naps.turn(&*peer.transport);
        match commands.try_recv() {
            Ok(line) if line == "sleep" => match commands.recv_timeout(PATIENCE) {
                // No progress until the next line: a peer whose processor is elsewhere.
                Ok(line) => say(&peer.obey(&line)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            },
            Ok(line) => say(&peer.obey(&line)),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
        }
    }
}

fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").unwrap();
    stdout.flush().unwrap();
}

impl Peer {
    fn obey(&self, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        match words[0] {
            "connect" => format!(
                "{:?}",
                self.transport
                    .connect(PeerId(number(1)), &rig::from_hex(words[2]))
            ),
            "disconnect" => format!("{:?}", self.transport.disconnect(PeerId(number(1)))),
            "deregister" => format!("{:?}", self.transport.deregister(SlabId(number(1) as u32))),
            "base" => self.slabs[number(1) as usize].as_ptr().addr().to_string(),
            "crc" => {
                let mut bytes = vec![0; number(3) as usize];
                let slab = &self.slabs[number(1) as usize];
                slab.read(number(2), &mut bytes).unwrap();
                rig::crc32(&bytes).to_string()
            }
            "map-over" => self.map_over(number(1) as usize),
            "fill" => {
                let bytes = rig::pattern(number(4), number(3) as usize);
                self.slabs[number(1) as usize]
                    .write(number(2), &bytes)
                    .unwrap();
                "filled".to_owned()
            }
            "holds" => self.holds(&words[1..]),
            "notified" => self.notified(&words[1..]),
            "put" => self.put(&words[1..]),
            other => panic!("no command is called {other}"),
        }
    }

    /// Other pages at a slab's address, under its registration.
    fn map_over(&self, slab: usize) -> String {
        let slab = &self.slabs[slab];
        // SAFETY: the range is the slab's own mapping, and the new one can be read and written like it.
        let mapped = unsafe {
            mmap_anonymous(
                slab.as_ptr().cast(),
                slab.len() as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        format!("{:?}", mapped.map(drop))
    }

    fn holds(&self, words: &[&str]) -> String {
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let slab = &self.slabs[number(0) as usize];
        rig::holds(slab, number(1), number(2) as usize, number(3)).to_string()
    }

    /// Waits for a notification, and looks at memory the moment that it is there.
    fn notified(&self, words: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(notification) = self.transport.take_notification() {
                let holds = self.holds(words);
                return format!(
                    "{} {} {holds}",
                    notification.peer.0,
                    rig::to_hex(&notification.payload)
                );
            }
            if Instant::now() > deadline {
                return "nothing".to_owned();
            }
            rig::turn(&*self.transport, Duration::from_millis(1));
        }
    }

    fn put(&self, words: &[&str]) -> String {
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let segment = Segment {
            local_slab: SlabId(number(1) as u32),
            local_offset: number(2),
            remote_slab: SlabId(number(3) as u32),
            remote_offset: number(4),
            len: number(5),
        };
        let id =
            match self
                .transport
                .post(Direction::Put, PeerId(number(0)), &[segment], Some(b"put"))
            {
                Ok(id) => id,
                Err(error) => return format!("{error:?}"),
            };
        loop {
            match self.transport.poll(id) {
                Progress::Pending => drop(rig::turn(&*self.transport, Duration::from_millis(1))),
                ended => return format!("{ended:?}"),
            }
        }
    }
}
